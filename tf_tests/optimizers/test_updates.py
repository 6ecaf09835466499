"""Updates that TensorFlow has one operation for are those of Keras's optimizers."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ngd import backend
from tf_tests import paper, small

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
GRADIENTS = [np.random.default_rng(seed).normal(size=(3, 4)).astype("float32") for seed in range(3)]
tensorflow_alone = pytest.mark.skipif(not ON_TENSORFLOW, reason="JAX has no such operations")


def variables(count, dtype="float32"):
    return [keras.Variable(np.full((3, 4), i == 0, dtype), dtype=dtype) for i in range(count)]


def stepped(optimizer):
    """A variable of ones after a step along each of the gradients."""
    [variable] = variables(1)
    for gradient in GRADIENTS:
        optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
    return small.array(variable)


@tensorflow_alone
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_of_sgd(momentum, nesterov):
    variable, velocity = variables(2)
    for gradient in GRADIENTS:
        gradient, rate = ops.convert_to_tensor(gradient), ops.convert_to_tensor(0.1)
        assert backend.momentum_step(variable, velocity if momentum else None, gradient, rate, momentum, nesterov)
    expected = stepped(keras.optimizers.SGD(0.1, momentum=momentum, nesterov=nesterov))
    np.testing.assert_allclose(small.array(variable), expected, rtol=1e-6)


@tensorflow_alone
def test_steps_of_adam():
    variable, first, second = variables(3)
    for step, gradient in enumerate(GRADIENTS, 1):
        rate = 0.1 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        scalars = [ops.convert_to_tensor(value, "float32") for value in (rate, 0.9, 0.999, 1e-7)]
        assert backend.adam_step(variable, first, second, ops.convert_to_tensor(gradient), *scalars)
    np.testing.assert_allclose(small.array(variable), stepped(keras.optimizers.Adam(0.1)), rtol=1e-5)


def test_what_has_no_such_operation_is_left_to_keras():
    variable, velocity = variables(2)
    gradient = ops.convert_to_tensor(GRADIENTS[0])
    if ON_TENSORFLOW:
        import tensorflow as tf

        gradient = tf.IndexedSlices(gradient, [0, 1, 2], (3, 4))
    assert not backend.momentum_step(variable, velocity, gradient, 0.1, 0.9, False)
    assert not backend.adam_step(variable, velocity, velocity, gradient, 0.1, 0.9, 0.999, 1e-7)
    np.testing.assert_array_equal(small.array(variable), np.ones((3, 4)))


@tensorflow_alone
def test_a_step_has_one_of_them_for_each_variable():
    import tensorflow as tf

    model = small.captured(small.mlp(), paper.KFAC(rest="adam"), skip="outputs")
    model.optimizer.build(model.trainable_variables)
    batch = tuple(map(tf.constant, small.regression()))
    graph = tf.function(model.train_step, autograph=False).get_concrete_function(batch).graph
    kinds = [operation.type for operation in graph.get_operations()]
    assert kinds.count("ResourceApplyKerasMomentum") == kinds.count("ResourceApplyAdam") == 2


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_factor_of_zero_makes_zeros_of_what_is_not_finite(dtype):
    tensor = ops.cast(ops.convert_to_tensor([1.0, -2.0, np.nan, np.inf]), dtype)
    zeros = backend.times_or_zero(tensor, ops.cast(0.0, dtype))
    assert zeros.dtype == tensor.dtype
    assert ops.convert_to_numpy(ops.cast(zeros, "float32")).tolist() == [0, 0, 0, 0]
    doubled = ops.convert_to_numpy(ops.cast(backend.times_or_zero(tensor, ops.cast(2.0, dtype)), "float32"))
    np.testing.assert_array_equal(doubled, [2, -4, np.nan, np.inf])
