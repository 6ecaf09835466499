"""Whole networks of `keras.applications`: captured, trained for a step, released, and what they were."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ngd
from tf_tests import paper
from tf_tests.small import JIT

# XLA needs minutes to compile some of these; the layers they are made of are the same on both backends.
NETWORKS = {
    "tensorflow": ("MobileNetV3Small", "EfficientNetV2B0", "ResNet50", "ConvNeXtTiny", "DenseNet121"),
    "jax": ("MobileNetV3Small",),
}
# Four fifths of a test on ResNet50 went into making one step a graph and inverting factors of up to 4,608 rows. So it and
# the like take the step eagerly, with blocks of factors; the small one has whole factors, in a graph.
SMALL = ("MobileNetV3Small",)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS[keras.backend.backend()])
def test_captures_trains_and_releases(name):
    model = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3), classes=5)
    kinds = [type(layer) for layer in model._flatten_layers()]
    captured = (keras.layers.Dense, keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
    layers = [la for la in model._flatten_layers() if type(la) in captured]
    small = name in SMALL
    optimizer = paper.KFAC(0.01, damping=0.1) if small else paper.THOR(0.01, damping=0.1, split=64)
    report = keras_ngd.capture(model, optimizer)
    assert len(report.captured) == len(layers)
    left = {"not a captured kind", "left to the rule of the rest by default; `include` captures it"}
    assert set(report.not_captured.values()) <= left

    loss = "sparse_categorical_crossentropy"
    model.compile(optimizer=optimizer, loss=loss, jit_compile=JIT and small, run_eagerly=not small)
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 255, (4, 32, 32, 3)).astype("float32"), np.array([0, 3, 1, 2])
    before = [np.array(ops.convert_to_numpy(layer.kernel)) for layer in layers]
    model.train_on_batch(x, y)
    after = [ops.convert_to_numpy(layer.kernel) for layer in layers]
    assert optimizer.factor_updates == optimizer.inverse_updates == 1
    assert optimizer.skipped_steps == 0
    assert all(np.isfinite(kernel).all() for kernel in after)
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))

    expected = ops.convert_to_numpy(model(x, training=False))
    keras_ngd.release(model)
    assert [type(layer) for layer in model._flatten_layers()] == kinds
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x, training=False)), expected)
