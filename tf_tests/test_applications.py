"""Whole networks of `keras.applications`: captured, trained for a step, released, and what they were."""

import keras
import numpy as np
import pytest

import keras_ngd

# XLA needs minutes to compile some of these; the layers they are made of are the same on both backends.
NETWORKS = {
    "tensorflow": ("MobileNetV3Small", "EfficientNetV2B0", "ResNet50", "ConvNeXtTiny", "DenseNet121"),
    "jax": ("MobileNetV3Small",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS[keras.backend.backend()])
def test_captures_trains_and_releases(name):
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(32, 32, 3), classes=5, classifier_activation="softmax"
    )
    kinds = {type(layer) for layer in model.layers}
    captured_before = [layer for layer in model.layers if type(layer) in (keras.layers.Dense, keras.layers.Conv2D)]
    optimizer = keras_ngd.KFAC(0.01, damping=0.1)
    report = keras_ngd.capture(model, optimizer)
    assert len(report.captured) == len(captured_before)
    assert all(reason == "not a captured kind" for reason in report.not_captured.values())

    model.compile(
        optimizer=optimizer, loss="sparse_categorical_crossentropy", jit_compile=keras.backend.backend() == "jax"
    )
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 255, (2, 32, 32, 3)).astype("float32"), np.array([0, 3])
    before = keras.ops.convert_to_numpy(captured_before[0].kernel)
    model.train_on_batch(x, y)
    after = keras.ops.convert_to_numpy(captured_before[0].kernel)
    assert optimizer.factor_updates == optimizer.inverse_updates == 1
    assert optimizer.skipped_steps == 0
    assert np.isfinite(after).all()
    assert not np.array_equal(before, after)

    expected = keras.ops.convert_to_numpy(model(x, training=False))
    keras_ngd.release(model)
    assert {type(layer) for layer in model.layers} == kinds
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(x, training=False)), expected)
