"""Whole training steps, against a simulation in float64."""

import keras
import numpy as np
import pytest
from keras.optimizers.schedules import PiecewiseConstantDecay

import keras_ngd
from tf_tests import paper
from tf_tests.reference import kronecker
from tf_tests.reference import rows as reference
from tf_tests.reference.running import close, drawn
from tf_tests.reference.training import NaturalGradientTraining, Network

BATCH, STEPS = 8, 7
ON_JAX = keras.backend.backend() == "jax"


def layer_arguments():
    return {"kernel_initializer": drawn, "bias_initializer": drawn}


def build():
    """The network of `reference.training` in Keras, and its weights in NumPy."""
    layers = {
        "convolution": keras.layers.Conv1D(
            4, Network.KERNEL, padding="same", groups=Network.GROUPS, activation="tanh", **layer_arguments()
        ),
        "normalization": keras.layers.BatchNormalization(epsilon=1e-3),
        "flat": keras.layers.Flatten(),
        "first": keras.layers.Dense(12, activation="tanh", **layer_arguments()),
        "second": keras.layers.Dense(12, activation="tanh", **layer_arguments()),
        "logits": keras.layers.Dense(3, **layer_arguments()),
    }
    model = keras.Sequential([keras.Input((3, 4)), *layers.values()])
    return model, layers


def weights_of(layers):
    """Weights by their names in the reference network."""
    normalization = layers["normalization"]
    weights = {name: reference.layer_matrix(layers[name]) for name in Network.BLOCKS}
    plain = {"gamma": normalization.gamma, "beta": normalization.beta}
    return weights | {name: np.asarray(v).astype("float64") for name, v in plain.items()}


def batch(step):
    rng = np.random.default_rng(step)
    return rng.standard_normal((BATCH, 3, 4)).astype("float32"), rng.integers(0, 3, BATCH)


def piecewise(boundaries, values):
    """A Keras schedule, and the same as a function of the step."""
    return PiecewiseConstantDecay(boundaries, values), lambda step: values[sum(step > b for b in boundaries)]


rates = piecewise([2, 4], [0.2, 0.1, 0.05])
dampings = piecewise([3], [0.25, 0.0625])
factor_intervals = piecewise([1], [1.0, 2.0])
inverse_intervals = piecewise([3], [2.0, 3.0])

CONFIGURATIONS = {
    "every_step": (
        {"learning_rate": 0.1, "damping": 0.03, "factor_interval": 1, "inverse_interval": 1},
        {},
    ),
    "intervals": (
        {
            "learning_rate": 0.1,
            "damping": 0.03,
            "factor_interval": 2,
            "inverse_interval": 3,
            "nesterov": True,
            "weight_decay": 0.1,
            "kl_clip": None,
            "inverse": "cholesky",
            "damping_mode": "sqrt",
            "loss_scale_factor": 64.0,
        },
        {},
    ),
    "schedules": (
        {
            "learning_rate": rates[0],
            "damping": dampings[0],
            "factor_interval": factor_intervals[0],
            "inverse_interval": inverse_intervals[0],
            "momentum": 0.5,
            "factor_decay": 0.7,
            "kl_clip": 0.01,
            "inverse": "newton-schulz",
            "weight_sharing": "reduce",
        },
        {
            "learning_rate": rates[1],
            "damping": dampings[1],
            "factor_interval": factor_intervals[1],
            "inverse_interval": inverse_intervals[1],
        },
    ),
    "eigen": (
        {
            "learning_rate": rates[0],
            "damping": dampings[0],
            "factor_interval": 1,
            "inverse_interval": 2,
            "momentum": 0.0,
            "factor_decay": 0.0,
            "kl_clip": 0.1,
            "inverse": "eigen",
            "damping_mode": "exact",
        },
        {"learning_rate": rates[1], "damping": dampings[1], "damping_follows": True},
    ),
}
SIMULATED = {"every_step": {"kl_clip": 1e-3}, "intervals": {}, "schedules": {}, "eigen": {}}
NOT_SIMULATED = ("inverse", "loss_scale_factor")


def simulation(name):
    arguments, schedules = CONFIGURATIONS[name]
    arguments = {k: v for k, v in arguments.items() if k not in NOT_SIMULATED}
    return NaturalGradientTraining(**{**SIMULATED[name], **arguments, **schedules})


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_steps_equal_the_simulation(name):
    model, layers = build()
    optimizer = paper.KFAC(**CONFIGURATIONS[name][0])
    keras_ngd.capture(model, optimizer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    xla = ON_JAX or name == "every_step"
    model.compile(optimizer=optimizer, loss=loss, jit_compile=xla, auto_scale_loss=False)
    network, training = Network(), simulation(name)
    start = weights_of(layers)
    weights, clipped = dict(start), []
    for step in range(STEPS):
        x, y = batch(step)
        training.apply(weights, *network.gradients(weights, x, y), BATCH)
        clipped.append(training.nu < 1)
        model.train_on_batch(x, y)
        for key, found in weights_of(layers).items():
            close(found - start[key], weights[key] - start[key], 1e-4)
        scale = (optimizer.loss_scale_factor or 1.0) ** 2
        for key in Network.BLOCKS:
            a, g = (np.asarray(v) for v in layers[key].statistics.averages)
            expected_a, expected_g = training.averages(key)
            close(a, expected_a, 1e-4)
            close(g / scale, expected_g, 1e-4)
    assert optimizer.factor_updates == len(training.recorded)
    assert optimizer.inverse_updates == len(training.refreshed)
    assert optimizer.skipped_statistics == optimizer.skipped_steps == 0
    # The configurations are chosen so that what they configure happens.
    if name == "intervals":
        assert training.recorded == [0, 2, 4, 6]
        assert training.refreshed == [0, 3, 6]
    if name == "schedules":
        assert training.recorded == [0, 1, 2, 4, 6]
        assert training.refreshed == [0, 2, 4]
    assert any(clipped) == (name != "intervals")


def one_layer(optimizer, seed=0):
    """A dense layer under mean squared error; the layer, a batch, its rows, and its gradient."""
    layer = keras.layers.Dense(3, **layer_arguments())
    model = keras.Sequential([keras.Input((5,)), layer])
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((BATCH, 5)).astype("float32"), rng.standard_normal((BATCH, 3)).astype("float32")
    a = reference.layer_rows(layer, x)
    ghat = 2 * (a @ reference.layer_matrix(layer)[:, None] - reference.dense_rows(y)) / y.size
    keras_ngd.capture(model, optimizer)
    # TensorFlow takes much longer to compile such a step than to run it a few times.
    model.compile(optimizer=optimizer, loss="mse", jit_compile=ON_JAX)
    return model, layer, (x, y), (a, ghat), np.einsum("knti,knto->io", a, ghat)


def taken_step(**arguments):
    """The first change of the layer's matrix, and what `one_layer` gives."""
    model, layer, data, observed, v = one_layer(paper.KFAC(momentum=0.0, inverse="eigen", **arguments))
    before = reference.layer_matrix(layer)
    model.train_on_batch(*data)
    return (reference.layer_matrix(layer) - before)[0], observed, v


def test_clipped_step_has_the_length_asked_for():
    """`nu^2 lr^2 |<P, V>| = kl_clip` where the clip binds, and the direction stays; else the step stays."""
    rate, kappa = 0.5, 1e-3
    free, (a, ghat), v = taken_step(learning_rate=rate, damping=0.01, kl_clip=None)
    p = kronecker.dense_preconditioned(
        kronecker.input_factor(a)[0], kronecker.output_factor(ghat, BATCH)[0], v, np.float32(0.01)
    )
    close(free, -rate * p, 1e-4)
    length = rate**2 * np.sum(p * v)
    assert length > 4 * kappa
    clipped, _, _ = taken_step(learning_rate=rate, damping=0.01, kl_clip=kappa)
    nu = np.sum(clipped * free) / np.sum(free * free)
    close(clipped, nu * free, 1e-4)
    np.testing.assert_allclose(nu**2 * length, kappa, rtol=1e-4)
    loose, _, _ = taken_step(learning_rate=rate, damping=0.01, kl_clip=1.01 * length)
    np.testing.assert_array_equal(loose, free)


def test_gate_and_statistics_follow_the_interval():
    """The gate carries the weight with which the next batch will count, and is zero where none will."""
    decay, interval = 0.8, 3
    optimizer = paper.KFAC(0.01, factor_decay=decay, factor_interval=interval, inverse_interval=2, inverse="eigen")
    model, layer, (x, y), _, _ = one_layer(optimizer)
    statistics = layer.statistics
    before, updates = [np.asarray(v) for v in statistics.averages], 0
    for step in range(8):
        model.train_on_batch(x * (step + 1), y + step)
        after = [np.asarray(v) for v in statistics.averages]
        changed = [not np.array_equal(old, new) for old, new in zip(before, after, strict=True)]
        opened = step % interval == 0
        updates += opened
        assert changed == [opened, opened]
        assert optimizer.factor_updates == updates
        assert optimizer.inverse_updates == step // 2 + 1
        due = (step + 1) % interval == 0
        expected = (1 - decay) / (1 - decay ** (updates + 1)) if due else 0.0
        np.testing.assert_allclose(float(statistics.gate), expected, rtol=1e-6)
        before = after


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_average_is_free_of_bias_from_the_start(decay):
    """Weights proportional to `decay ** age` that sum to one, from the first batch on."""
    optimizer = paper.KFAC(0.0, factor_decay=decay, factor_interval=1, inverse="eigen")
    model, layer, (x, y), _, _ = one_layer(optimizer)
    history = []
    for step in range(6):
        scaled = (x * (1 + step)).astype("float32")
        history.append(kronecker.input_factor(reference.layer_rows(layer, scaled)))
        model.train_on_batch(scaled, y)
        close(layer.statistics.input_factor, kronecker.running_average(history, decay), 1e-5)
        ones = np.asarray(layer.statistics.input_factor)[0, -1, -1]
        np.testing.assert_allclose(ones, 1.0, rtol=1e-6)  # the weights' sum


def test_first_step_uses_its_own_statistics():
    """Long intervals leave no step without curvature."""
    step, (a, ghat), v = taken_step(learning_rate=0.1, damping=0.5, kl_clip=None, inverse_interval=100)
    factors = kronecker.input_factor(a)[0], kronecker.output_factor(ghat, BATCH)[0]
    close(step, -0.1 * kronecker.dense_preconditioned(*factors, v, 0.5), 1e-4)


def test_order_of_examples_does_not_matter():
    changes = []
    for order in (slice(None), slice(None, None, -1)):
        model, layer, (x, y), _, _ = one_layer(paper.KFAC(0.1, inverse="eigen"))
        before = reference.layer_matrix(layer)
        model.train_on_batch(x[order], y[order])
        changes.append(reference.layer_matrix(layer) - before)
    close(changes[1], changes[0], 1e-4)
