"""The Kronecker factors that a training step leaves behind, against float64 computations from the definition."""

import keras
import numpy as np
import pytest

import keras_ngd
from tf_tests import paper
from tf_tests.reference import kronecker
from tf_tests.reference import rows as reference
from tf_tests.reference.running import close, drawn

pytestmark = pytest.mark.neutral

BATCH = 6


def dense(units, **arguments):
    return keras.layers.Dense(units, kernel_initializer=drawn, bias_initializer=drawn, **arguments)


def convolution(rank, filters, size, **arguments):
    kind = {1: keras.layers.Conv1D, 2: keras.layers.Conv2D, 3: keras.layers.Conv3D}[rank]
    return kind(filters, size, kernel_initializer=drawn, bias_initializer=drawn, **arguments)


CAPTURED = {
    "dense": lambda: (dense(3, activation="tanh"), (5,)),
    "dense_sequence": lambda: (dense(4, activation="tanh"), (3, 5)),
    "dense_grid_no_bias": lambda: (dense(2, use_bias=False), (2, 3, 4)),
    "conv1d_valid": lambda: (convolution(1, 3, 4, activation="tanh"), (9, 2)),
    "conv1d_causal": lambda: (convolution(1, 3, 3, padding="causal", dilation_rate=2), (7, 2)),
    "conv1d_strided": lambda: (convolution(1, 3, 4, padding="same", strides=2), (8, 2)),
    "conv2d_same": lambda: (convolution(2, 3, 3, padding="same", activation="tanh"), (5, 6, 2)),
    "conv2d_valid_no_bias": lambda: (convolution(2, 3, (2, 4), use_bias=False), (5, 6, 2)),
    "conv2d_strided": lambda: (convolution(2, 3, 3, padding="same", strides=2), (6, 7, 2)),
    "conv2d_dilated": lambda: (convolution(2, 3, 3, padding="same", dilation_rate=2), (6, 6, 2)),
    "conv2d_grouped": lambda: (convolution(2, 6, 3, padding="same", groups=3), (4, 5, 6)),
    "conv2d_pointwise": lambda: (convolution(2, 3, 1, strides=2), (5, 4, 5)),
    "conv3d_valid": lambda: (convolution(3, 2, 2), (3, 4, 3, 2)),
    "conv3d_strided_grouped": lambda: (
        convolution(3, 4, (1, 2, 3), padding="same", strides=2, groups=2, use_bias=False),
        (3, 4, 5, 4),
    ),
}

REDUCED = ("dense_sequence", "dense_grid_no_bias", "conv1d_causal", "conv2d_same", "conv2d_grouped", "conv3d_valid")

CHANNELS_FIRST = {
    "conv1d": lambda: (convolution(1, 3, 3, data_format="channels_first", padding="same"), (2, 6)),
    "conv2d": lambda: (convolution(2, 3, 3, data_format="channels_first", padding="same", strides=2), (2, 5, 4)),
    "conv2d_grouped": lambda: (convolution(2, 4, 3, data_format="channels_first", groups=2), (4, 4, 4)),
    "conv3d": lambda: (convolution(3, 2, 2, data_format="channels_first", padding="same"), (2, 3, 4, 3)),
}


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype("float32")


def squared_error_gradient(layer, x, y):
    """Gradient of the mean squared error of `layer(x)` with respect to its pre-activation, in float64, as rows."""
    a, target = reference.layer_rows(layer, x), reference.layer_gradient_rows(layer, y)
    s = a @ reference.layer_matrix(layer)[:, None]
    if layer.activation is keras.activations.tanh:
        return a, 2 * (np.tanh(s) - target) * (1 - np.tanh(s) ** 2) / s.size
    return a, 2 * (s - target) / s.size


def branches(cases):
    """One model of many layers side by side, each with its own input and its own squared error, and one batch."""
    layers, shapes = zip(*(cases[name]() for name in cases), strict=True)
    inputs = [keras.Input(shape) for shape in shapes]
    model = keras.Model(inputs, [layer(x) for layer, x in zip(layers, inputs, strict=True)])
    x = [draw(BATCH, *shape, seed=i) for i, shape in enumerate(shapes)]
    y = [draw(BATCH, *output.shape[1:], seed=100 + i) for i, output in enumerate(model.outputs)]
    return model, layers, x, y


def sgd_step(model, x, y, learning_rate=0.0, **capture_arguments):
    """One step of plain SGD on the captured model; returns the optimizer, whose momenta are then minus the gradient."""
    keras_ngd.capture(model, paper.KFAC(**capture_arguments))
    optimizer = keras.optimizers.SGD(learning_rate, momentum=0.5)
    model.compile(optimizer=optimizer, loss="mse", jit_compile=True)
    model.train_on_batch(x, y)
    return optimizer


def check_factors(layer, a, ghat, sharing="expand", divisor=BATCH, mask=None):
    input_factor, output_factor = layer.statistics.averages
    close(input_factor, kronecker.input_factor(a, sharing, mask), 1e-5)
    close(output_factor, kronecker.output_factor(ghat, divisor, sharing), 1e-5)


def check_step(model, layers, x, y, sharing="expand"):
    """A step's factors, and its gradients: `V = a^T ghat`."""
    expected = [squared_error_gradient(*case) for case in zip(layers, x, y, strict=True)]
    optimizer = sgd_step(model, x, y, learning_rate=1.0, weight_sharing=sharing)
    momenta = zip(model.trainable_variables, optimizer.momentums, strict=True)
    gradients = {v.path: -np.asarray(m) for v, m in momenta if m is not None}
    for layer, (a, ghat) in zip(layers, expected, strict=True):
        check_factors(layer, a, ghat, sharing)
        v = layer.statistics.geometry.to_matrix([gradients[v.path] for v in layer.statistics.parameters()])
        close(v, np.einsum("knti,knto->kio", a, ghat), 1e-5)


def test_factors_after_a_step():
    check_step(*branches(CAPTURED))


def test_reduced_factors_after_a_step():
    check_step(*branches({name: CAPTURED[name] for name in REDUCED}), sharing="reduce")


def test_channels_first():
    check_step(*branches(CHANNELS_FIRST))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_mask_takes_positions_out(sharing):
    layer = dense(3)
    model = keras.Sequential([keras.Input((4, 5)), keras.layers.Masking(0.0), layer])
    x, y = draw(BATCH, 4, 5), draw(BATCH, 4, 3)
    mask = np.random.default_rng(0).random((BATCH, 4)) < 0.6
    mask[:, 1] = True
    x[~mask] = 0.0
    a, ghat = squared_error_gradient(layer, x, y)
    # Keras averages the loss over the visible positions only.
    ghat = ghat * mask[..., None] * mask.size / mask.sum()
    sgd_step(model, x, y, weight_sharing=sharing)
    check_factors(layer, a, ghat, sharing, mask=mask)


def test_sample_weights_scale_gradients_only():
    layer = dense(3)
    model = keras.Sequential([keras.Input((5,)), layer])
    x, y, weights = draw(BATCH, 5), draw(BATCH, 3), np.arange(BATCH, dtype="float32")
    a, ghat = squared_error_gradient(layer, x, y)
    keras_ngd.capture(model, paper.KFAC())
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", jit_compile=True)
    model.train_on_batch(x, y, sample_weight=weights)
    check_factors(layer, a, ghat * weights[:, None, None])


@pytest.mark.parametrize(("fraction", "kept"), [(0.5, 3), (0.34, 2), (0.01, 1)])
def test_statistics_fraction_observes_the_leading_examples(fraction, kept):
    layer = convolution(1, 3, 2)
    model = keras.Sequential([keras.Input((4, 2)), layer])
    x, y = draw(BATCH, 4, 2), draw(BATCH, 3, 3)
    a, ghat = squared_error_gradient(layer, x, y)
    sgd_step(model, x, y, statistics_fraction=fraction)
    # The observed gradients' mean square stands for that of all of them.
    check_factors(layer, a[:, :kept], ghat[:, :kept], divisor=BATCH * BATCH / kept)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_losses_per_example(sharing):
    layer = dense(3)
    model = keras.Sequential([keras.Input((4, 5)), layer])
    x, y = draw(BATCH, 4, 5), draw(BATCH, 4, 3)
    a, ghat = squared_error_gradient(layer, x, y)
    sgd_step(model, x, y, weight_sharing=sharing, losses_per_example=4)
    check_factors(layer, a, ghat, sharing, divisor=4 * BATCH)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_last_batch_of_fit_is_smaller(fraction):
    layer = convolution(2, 3, 3, padding="same")
    model = keras.Sequential([keras.Input((4, 5, 2)), layer])
    x, y = draw(10, 4, 5, 2), draw(10, 4, 5, 3)
    keras_ngd.capture(model, paper.KFAC(statistics_fraction=fraction))
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", jit_compile=True)
    model.fit(x, y, batch_size=6, shuffle=False, verbose=0)
    a, ghat = squared_error_gradient(layer, x[6:], y[6:])
    kept = round(4 * fraction)
    check_factors(layer, a[:, :kept], ghat[:, :kept], divisor=4 * 4 / kept)


class Batches(keras.utils.PyDataset):
    """Batches that may differ in their shapes."""

    def __init__(self, *batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


@pytest.mark.parametrize("strides", [1, 2])
def test_sequences_of_unknown_length(strides):
    layer = convolution(1, 3, 4, strides=strides, padding="same")
    model = keras.Sequential([keras.Input((None, 2)), layer])
    x, y = draw(BATCH, 8, 2), draw(BATCH, 8 // strides, 3)
    keras_ngd.capture(model, paper.KFAC())
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", jit_compile=True)
    model.fit(Batches((x[:, :6], y[:, : 6 // strides]), (x, y)), shuffle=False, verbose=0)
    check_factors(layer, *squared_error_gradient(layer, x, y))


def test_layer_called_twice():
    layer = dense(3, activation="tanh")
    inputs = [keras.Input((5,)), keras.Input((5,))]
    model = keras.Model(inputs, [layer(x) for x in inputs])
    x, y = [draw(BATCH, 5, seed=i) for i in (1, 2)], [draw(BATCH, 3, seed=i) for i in (3, 4)]
    calls = [squared_error_gradient(layer, *call) for call in zip(x, y, strict=True)]
    expected_a = np.mean([kronecker.input_factor(a) for a, _ in calls], axis=0)
    expected_g = np.sum([kronecker.output_factor(ghat, BATCH) for _, ghat in calls], axis=0)
    optimizer = paper.KFAC(0.0, factor_interval=1)
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, loss=["mse", "mse"], jit_compile=True)
    for _ in range(2):  # the second time, the mean over the calls meets a running average
        model.train_on_batch(x, y)
        statistics = layer.statistics
        averages = [keras.ops.convert_to_tensor(v) for v in statistics.averages]
        a, g = optimizer.curvature_input(statistics, averages, statistics.tallied("calls"))
        assert float(statistics.tallied("calls")) == float(statistics.tallied("accepted")) == 2
        close(a, expected_a, 1e-5)
        close(g, expected_g, 1e-5)


def test_closed_gate_leaves_the_averages_alone():
    model, layers, x, y = branches({name: CAPTURED[name] for name in ("dense", "conv2d_same")})
    sgd_step(model, x, y)
    before = [[np.asarray(v) for v in layer.statistics.averages] for layer in layers]
    layers[0].statistics.gate.assign(0.0)
    layers[1].statistics.gate.assign(0.25)
    other = [draw(*batch.shape, seed=77) for batch in x]
    model.train_on_batch(other, y)
    for average, old in zip(layers[0].statistics.averages, before[0], strict=True):
        np.testing.assert_array_equal(np.asarray(average), old)
    assert float(layers[0].statistics.gate) == 0.0
    assert float(layers[0].statistics.tallied("accepted")) == 0.0
    a, ghat = squared_error_gradient(layers[1], other[1], y[1])
    expected = kronecker.input_factor(a), kronecker.output_factor(ghat, BATCH)
    for average, old, new in zip(layers[1].statistics.averages, before[1], expected, strict=True):
        close(average, 0.75 * old.astype("float64") + 0.25 * new, 1e-5)


def test_float64(float64):
    layer, batch = dense(4), 8
    model = keras.Sequential([keras.Input((2, 5)), layer])
    # Keras on JAX rounds the loss's divisor in float32, so it is a power of two here.
    x, y = draw(batch, 2, 5).astype("float64"), draw(batch, 2, 4).astype("float64")
    a, ghat = squared_error_gradient(layer, x, y)
    sgd_step(model, x, y)
    close(layer.statistics.input_factor, kronecker.input_factor(a), 1e-12)
    close(layer.statistics.output_factor, kronecker.output_factor(ghat, batch), 1e-12)
