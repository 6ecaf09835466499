"""Calling tensor functions from tests, and measuring how far off their results are."""

import functools

import keras
import numpy as np


@functools.cache
def compiled(function):
    """`function` compiled by XLA; the same object for the same function, so that nothing is compiled twice."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, jit_compile=True, autograph=False)


def run(function, *arrays, xla=False):
    """`function` of tensors made from `arrays`; NumPy arrays out.

    Compiled by XLA if `xla`, and always on JAX, where executing op by op is slow.
    """
    if xla or keras.backend.backend() == "jax":
        function = compiled(function)
    result = function(*(keras.ops.convert_to_tensor(a) for a in arrays))
    return keras.tree.map_structure(keras.ops.convert_to_numpy, result)


def drawn(shape, dtype=None):
    """Initializer of kernels and biases, the same on every backend."""
    values = np.random.default_rng(list(shape)).standard_normal(shape) / np.sqrt(np.prod(shape[:-1]) + 1)
    return keras.ops.convert_to_tensor(values.astype(dtype or keras.config.floatx()))


def error(actual, expected):
    """Largest deviation relative to the largest entry expected."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape, f"shape {actual.shape} instead of {expected.shape}"
    if actual.size == 0 or not np.all(np.isfinite(actual)):
        return float("inf")
    largest, deviation = np.abs(expected).max(), np.abs(actual - expected).max()
    return float(deviation / largest) if largest > 0 else float(deviation)


def close(actual, expected, tolerance):
    """Asserts that `error` is at most `tolerance`."""
    found = error(actual, expected)
    assert found <= tolerance, f"relative error {found:.2e} above {tolerance:.0e}"
