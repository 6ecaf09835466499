"""The rows that a training step leaves behind, one for each example, against the definition in float64."""

import keras
import numpy as np
import pytest

import keras_ngd
from tf_tests import paper, small
from tf_tests.reference import low_rank
from tf_tests.reference.running import close
from tf_tests.statistics.test_kronecker import (
    BATCH,
    CAPTURED,
    CHANNELS_FIRST,
    branches,
    convolution,
    dense,
    draw,
    squared_error_gradient,
)

CASES = ("dense", "dense_sequence", "conv1d_causal", "conv2d_strided", "conv2d_grouped", "conv3d_valid")


def observe(model, x, y, optimizer=None, jit_compile=small.JIT, **fitting):
    """Captures `model` and takes one step that changes none of its weights."""
    keras_ngd.capture(model, paper.SNGD(batch_size=BATCH) if optimizer is None else optimizer)
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", jit_compile=jit_compile)
    model.train_on_batch(x, y, **fitting)


def check_rows(layer, a, ghat, divisor=BATCH, mask=None, tolerance=1e-5):
    for rows, expected in zip(layer.statistics.averages, low_rank.example_rows(a, ghat, divisor, mask), strict=True):
        examples = expected.shape[1]
        close(np.asarray(rows)[:, :examples], expected, tolerance)
        assert not np.asarray(rows)[:, examples:].any()


@pytest.mark.parametrize("channels_first", [False, True])
def test_rows_after_a_step(channels_first):
    cases = {name: CHANNELS_FIRST[name] for name in ("conv1d", "conv2d_grouped")}
    model, layers, x, y = branches(cases if channels_first else {name: CAPTURED[name] for name in CASES})
    # Channels first, TensorFlow has no convolutions on a processor but those that XLA compiles.
    observe(model, x, y, jit_compile=small.JIT or channels_first)
    for layer, *batch in zip(layers, x, y, strict=True):
        check_rows(layer, *squared_error_gradient(layer, *batch))


def test_a_smaller_last_batch_leaves_rows_of_zeros():
    """What the rows say of it is exact: there is a term for each example, and the others contribute nothing."""
    layer = convolution(1, 3, 3, padding="same")
    model = keras.Sequential([keras.Input((5, 2)), layer])
    x, y = draw(10, 5, 2), draw(10, 5, 3)
    keras_ngd.capture(model, paper.SNGD(batch_size=8))
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", jit_compile=small.JIT)
    small.fit(model, x, y, batch_size=7)
    a, ghat = squared_error_gradient(layer, x[7:], y[7:])
    assert layer.statistics.averages[0].shape == (1, 8, 7)
    check_rows(layer, a, ghat, divisor=3)


def test_a_mask_takes_positions_out_of_the_mean():
    layer = dense(3)
    model = keras.Sequential([keras.Input((4, 5)), keras.layers.Masking(0.0), layer])
    x, y = draw(BATCH, 4, 5), draw(BATCH, 4, 3)
    mask = np.random.default_rng(0).random((BATCH, 4)) < 0.6
    mask[:, 1] = True
    x[~mask] = 0.0
    observe(model, x, y, paper.SNGD(batch_size=BATCH, losses_per_example=4))
    a, ghat = squared_error_gradient(layer, x, y)
    # Keras averages the loss over the visible positions only.
    check_rows(layer, a, ghat * mask[..., None] * mask.size / mask.sum(), 4 * BATCH, mask)


def test_sample_weights_scale_gradients_only():
    layer = dense(3)
    model = keras.Sequential([keras.Input((5,)), layer])
    x, y, weights = draw(BATCH, 5), draw(BATCH, 3), np.arange(BATCH, dtype="float32")
    a, ghat = squared_error_gradient(layer, x, y)
    observe(model, x, y, sample_weight=weights)
    check_rows(layer, a, ghat * weights[:, None, None])


def test_calls_of_a_layer_count_like_positions():
    """The mean over the calls of `a`, the sum of `g`: as if the layer had been called once, on both inputs."""
    layer = dense(3, activation="tanh")
    inputs = [keras.Input((5,)), keras.Input((5,))]
    model = keras.Model(inputs, [layer(x) for x in inputs])
    x, y = [draw(BATCH, 5, seed=i) for i in (1, 2)], [draw(BATCH, 3, seed=i) for i in (3, 4)]
    calls = [squared_error_gradient(layer, *call) for call in zip(x, y, strict=True)]
    expected = low_rank.example_rows(*(np.concatenate(side, axis=2) for side in zip(*calls, strict=True)), BATCH)
    optimizer = paper.SNGD(0.0, batch_size=BATCH)
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, loss=["mse", "mse"], jit_compile=small.JIT)
    for _ in range(2):
        model.train_on_batch(x, y)
        statistics = layer.statistics
        averages = [keras.ops.convert_to_tensor(v) for v in statistics.averages]
        found = optimizer.curvature_input(statistics, averages, statistics.tallied("calls"))
        assert float(statistics.tallied("calls")) == float(statistics.tallied("accepted")) == 2
        for rows, side in zip(found, expected, strict=True):
            close(rows, side, 1e-5)


def test_the_last_batch_alone_counts_and_a_closed_gate_none():
    model, layers, x, y = branches({name: CAPTURED[name] for name in ("dense", "conv1d_causal")})
    observe(model, x, y)
    before = [[np.asarray(v) for v in layer.statistics.averages] for layer in layers]
    layers[0].statistics.gate.assign(0.0)
    other = [draw(*batch.shape, seed=77) for batch in x]
    model.train_on_batch(other, y)
    for rows, old in zip(layers[0].statistics.averages, before[0], strict=True):
        np.testing.assert_array_equal(np.asarray(rows), old)
    assert float(layers[0].statistics.tallied("accepted")) == 0.0
    check_rows(layers[1], *squared_error_gradient(layers[1], other[1], y[1]))


def test_float64(float64):
    layer, batch = dense(4), 8
    model = keras.Sequential([keras.Input((2, 5)), layer])
    # Keras on JAX rounds the loss's divisor in float32, so it is a power of two here.
    x, y = draw(batch, 2, 5).astype("float64"), draw(batch, 2, 4).astype("float64")
    observe(model, x, y, paper.SNGD(batch_size=batch))
    check_rows(layer, *squared_error_gradient(layer, x, y), divisor=batch, tolerance=1e-12)
