"""The networks of `keras.applications`: captured, trained, saved, loaded and trained on, released, and what they were."""

import gc
import zlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_ngd
from benchmarks import coverage
from tf_tests import paper, small

# XLA needs minutes to compile some of these; the layers they are made of are the same on both backends.
OFTEN = {"tensorflow": ("MobileNetV3Small", "ResNet50", "ConvNeXtTiny"), "jax": ("MobileNetV3Small",)}
# Four fifths of a test on ResNet50 went into making one step a graph and inverting factors of up to 4,608 rows. So all but a
# small one take steps eagerly, with blocks of factors; that has whole factors, in a graph.
IN_A_GRAPH = ("MobileNetV3Small",)
KINDS = (keras.layers.Dense, keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.SeparableConv2D)
LEFT = {"not a captured kind", "left to the rule of the rest by default; `include` captures it"}


def networks():
    """All of them, by name; those that are not tested often are tested by night."""
    often = OFTEN[keras.backend.backend()]
    return [
        pytest.param(name, marks=pytest.mark.slow if name in often else pytest.mark.nightly)
        for name in coverage.constructors()
    ]


@pytest.fixture(autouse=True)
def freed():
    """The largest have 1.4 GB of weights, and as much of momenta: nothing of one is to be left when the next is made."""
    yield
    keras.backend.clear_session()
    gc.collect()


def made(name):
    """One of the networks, for the smallest of these images that it takes."""
    for size in (32, 75):
        try:
            return coverage.constructors()[name](weights=None, input_shape=(size, size, 3), classes=5)
        except ValueError as error:
            refusal = error
    raise refusal


def seeded(model):
    """`model`, whose dropout draws what that of any other does: Keras does not save what it was about to draw."""
    for layer in model._flatten_layers():
        for generator in layer._seed_generators:
            generator.state.assign((0, 0))
    return model


def digests(model):
    """What stands for the values of all weights, the optimizer's among them, by path."""
    return {v.path: zlib.crc32(small.array(v)) for v in [*model.weights, *model.optimizer.variables]}


def predicted(model, x):
    return ops.convert_to_numpy(model(x, training=False))


@pytest.mark.parametrize("name", networks())
def test_captures_trains_resumes_and_releases(name, tmp_path):
    model = made(name)
    kinds = [type(layer) for layer in model._flatten_layers()]
    layers = [la for la in model._flatten_layers() if type(la) in KINDS]
    graph = name in IN_A_GRAPH
    optimizer = paper.KFAC(0.01, damping=0.1) if graph else paper.THOR(0.01, damping=0.1, split=16)
    report = keras_ngd.capture(model, optimizer)
    assert len(report.captured) == len(layers)
    assert set(report.not_captured.values()) <= LEFT

    loss = "sparse_categorical_crossentropy"
    small.compiled(model, optimizer, loss, jit_compile=small.JIT and graph, run_eagerly=not graph)
    x = np.random.default_rng(0).uniform(0, 255, (4, *model.input_shape[1:])).astype("float32")
    y = np.array([0, 3, 1, 2])
    before = digests(model)
    model.train_on_batch(x, y)
    assert optimizer.factor_updates == optimizer.inverse_updates == 1
    assert optimizer.skipped_steps == 0
    assert all(np.isfinite(small.array(weight)).all() for weight in model.weights)
    after, kernels = digests(model), [layer.trainable_weights[0].path for layer in layers]
    assert any(after[path] != before[path] for path in kernels)

    path, saved = tmp_path / "model.keras", predicted(model, x)
    model.save(path)
    seeded(model).train_on_batch(x, y)
    trained, expected = digests(model), predicted(model, x)
    keras_ngd.release(model)
    assert [type(layer) for layer in model._flatten_layers()] == kinds
    np.testing.assert_array_equal(predicted(model, x), expected)

    # Never two of them at once.
    del model, optimizer, layers, report
    gc.collect()
    again = keras.models.load_model(path)
    path.unlink()
    assert again.optimizer.factor_updates == again.optimizer.inverse_updates == 1
    np.testing.assert_array_equal(predicted(again, x), saved)
    seeded(again).train_on_batch(x, y)
    small.assert_same(digests(again), trained)
