"""Small networks and data for the tests of behaviour, and what these tests read from a model."""

import contextlib

import keras
import numpy as np
from keras import layers, ops

import keras_ngd
from tf_tests import paper

# JAX without jit is very slow, and TensorFlow's step is compiled by XLA only where that is what is tested.
JIT = keras.backend.backend() == "jax"


def regression(examples=32, inputs=4, outputs=4):
    """A smooth regression problem `(x, y)`."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, inputs)).astype("float32")
    return x, np.tanh(x @ rng.normal(size=(inputs, outputs))).astype("float32")


def mlp(dense=layers.Dense):
    """Two layers of one shape, `hidden` and `outputs`: what is compiled for a shape takes most of a test's time."""
    inputs = keras.Input((4,), name="inputs")
    hidden = dense(4, activation="tanh", name="hidden")(inputs)
    return keras.Model(inputs, dense(4, name="outputs")(hidden), name="mlp")


def kfac(**kwargs):
    """A `KFAC` that does everything at every step."""
    return paper.KFAC(**{"losses_per_example": "auto", "factor_interval": 1, "inverse_interval": 1, **kwargs})


# Each method, recording and refreshing at every step.
METHODS = {
    "kfac": kfac,
    "thor": lambda: keras_ngd.THOR(split=2, factor_interval=1, inverse_interval=1),
    "skfac": lambda: keras_ngd.SKFAC(batch_size=8, interval=1),
    "sngd": lambda: keras_ngd.SNGD(batch_size=8, interval=1),
    "hylo": lambda: keras_ngd.HyLo(batch_size=8, interval=1, mode="kid"),
    "ekfac": lambda: keras_ngd.EKFAC(factor_interval=1, inverse_interval=1),
    "ekfac_examples": lambda: keras_ngd.EKFAC(scale="examples", factor_interval=1, inverse_interval=2),
    "eigen_adam": lambda: keras_ngd.EigenAdam(factor_interval=1, inverse_interval=1),
}


def compiled(model, optimizer, loss="mse", **kwargs):
    """`model`, compiled the quick way of the running backend."""
    model.compile(**{"optimizer": optimizer, "loss": loss, "jit_compile": JIT, **kwargs})
    return model


def captured(model, optimizer=None, skip=None, **kwargs):
    """`model`, captured and compiled; its optimizer is `model.optimizer`."""
    optimizer = kfac() if optimizer is None else optimizer
    keras_ngd.capture(model, optimizer, skip=skip)
    return compiled(model, optimizer, **kwargs)


class Restarting:
    """A captured and compiled model that can be trained again from its start, and is compiled once.

    Of a module, since compiling a step takes longer than most of what a test does with it.
    """

    def __init__(self, model):
        self.model = model
        model.optimizer.build(model.trainable_variables)
        self._start = [array(v) for v in self._variables()]

    def _variables(self):
        return [*self.model.weights, *self.model.optimizer.variables]

    def restarted(self):
        """The model, as it was before its first step."""
        for variable, value in zip(self._variables(), self._start, strict=True):
            variable.assign(value)
        return self.model


def fit(model, x, y, batch_size=8, epochs=1, **kwargs):
    """Quiet training in the order of the data."""
    return model.fit(x, y, **{"batch_size": batch_size, "epochs": epochs, "shuffle": False, "verbose": 0, **kwargs})


def array(variable):
    """A copy of a variable's value."""
    return np.array(ops.convert_to_numpy(ops.convert_to_tensor(variable)))


def weights(model):
    """Copies of a model's own weights by path, the statistics left out."""
    return {v.path: array(v) for v in model.weights if not hasattr(v, "keras_ngd_statistics")}


def statistics(model):
    """Copies of all statistics weights by path."""
    return {v.path: array(v) for v in model.weights if hasattr(v, "keras_ngd_statistics")}


def assert_same(actual, expected):
    """Asserts that two dictionaries of arrays hold the same values, to the last bit and in the same order."""
    for found, (key, value) in zip(actual.values(), expected.items(), strict=True):
        np.testing.assert_array_equal(found, value, err_msg=key)


def assert_close(actual, expected, tolerance=1e-5):
    """Asserts that two dictionaries of arrays hold the same values up to rounding, in the same order."""
    for found, (key, value) in zip(actual.values(), expected.items(), strict=True):
        np.testing.assert_allclose(found, value, rtol=tolerance, atol=tolerance, err_msg=key)


def relative_distance(actual, expected):
    """`|actual - expected| / |expected|` of two dictionaries of arrays, each taken as one vector."""
    actual, expected = (np.concatenate([np.ravel(v) for v in d.values()]) for d in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def gradients(model, x, y):
    """Gradients of the mean squared error by path, of all trainable weights, statistics included."""
    variables = model.trainable_variables
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function
        def differentiate(x, y):
            with tf.GradientTape() as tape:
                loss = ops.mean(ops.square(model(x, training=True) - y))
            return tape.gradient(loss, [v.value for v in variables])
    else:
        import jax

        @jax.jit
        def differentiate(x, y):
            def loss(values):
                rest = [v.value for v in model.non_trainable_variables]
                return ops.mean(ops.square(model.stateless_call(values, rest, x, training=True)[0] - y))

            return jax.grad(loss)([v.value for v in variables])

    return {v.path: ops.convert_to_numpy(g) for v, g in zip(variables, differentiate(x, y), strict=True)}


@contextlib.contextmanager
def policy(name):
    """Layers made inside compute as the policy `name` says."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def trained(optimizer=None, epochs=1, seed=0, **kwargs):
    """A captured model after training, always from the same weights."""
    keras.utils.set_random_seed(seed)
    model = captured(mlp(), optimizer, **kwargs)
    fit(model, *regression(), epochs=epochs)
    return model
