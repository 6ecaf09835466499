"""Gradients of several passes added before one step."""

import keras
import numpy as np
import pytest

import keras_ngd
from keras_ngd import backend
from tf_tests.loops import custom_step
from tf_tests.optimizers.test_custom_steps import OPTIMIZERS, averages, factors
from tf_tests.reference.running import close
from tf_tests.small import JIT, array, kfac, mlp, regression

BATCH, PASSES = 8, 2


def prepared(optimizer, **arguments):
    model = mlp()
    keras_ngd.capture(model, optimizer)
    return model, custom_step(model, optimizer, **{"passes": PASSES, **arguments})


def curvature_input(optimizer, statistics):
    return optimizer.curvature_input(statistics, averages(statistics.owner()), array(statistics.tallied("calls")))


@pytest.mark.parametrize("method", ["kfac", "thor"])
@pytest.mark.parametrize("divided", [False, True])
def test_factors_add_up(divided, method):
    """Losses added are as they are; losses divided by the number of passes need it as `losses_per_example`."""
    optimizer = OPTIMIZERS[method](learning_rate=0.0, losses_per_example=PASSES if divided else 1)
    model, step = prepared(optimizer, divided=divided)
    x, y = regression(BATCH * PASSES)
    step(x, y)
    if divided:  # the mean loss over all
        expected = factors(model, x, y)
    else:  # the sum of the mean losses of the passes, which count like calls
        parts = [factors(model, *part) for part in zip(np.split(x, PASSES), np.split(y, PASSES), strict=True)]
        expected = [
            (np.mean([part[i][0] for part in parts], axis=0), np.sum([part[i][1] for part in parts], axis=0))
            for i in range(2)
        ]
    for layer, sides in zip(model.layers[1:], expected, strict=True):
        found = curvature_input(optimizer, layer.statistics)
        for tensor, side in zip(found, sides, strict=True):
            close(np.reshape(tensor, np.shape(side)), side, 1e-5)
    assert optimizer.factor_updates == 1
    if divided:
        optimizer.give_notices()
    else:
        with pytest.warns(UserWarning, match="losses_per_example=number_of_passes"):
            optimizer.give_notices()


@pytest.mark.parametrize("method", ["skfac", "sngd", "hylo"])
def test_rows_do_not(method):
    optimizer = OPTIMIZERS[method](learning_rate=0.0)
    model, step = prepared(optimizer)
    x, y = regression(BATCH * PASSES)
    if not JIT:
        with pytest.raises(Exception, match="passes were added up"):
            step(x, y)
        return
    before = [averages(layer) for layer in model.layers[1:]]
    for _ in range(2):
        step(x, y)
    for layer, old in zip(model.layers[1:], before, strict=True):
        for found, value in zip(averages(layer), old, strict=True):
            np.testing.assert_array_equal(found, value)
    assert optimizer.factor_updates == 0
    with pytest.warns(UserWarning, match="several passes"):
        optimizer.give_notices()


def test_averaged_gradients_have_the_factors_of_the_whole_batch():
    optimizer = kfac(learning_rate=0.0)
    model, step = prepared(optimizer, change=lambda gradients, variables: [g / PASSES for g in gradients])
    x, y = regression(BATCH * PASSES)
    step(x, y)
    for layer, sides in zip(model.layers[1:], factors(model, x, y), strict=True):
        for found, side in zip(averages(layer), sides, strict=True):
            close(found, side, 1e-5)
    assert float(array(model.layers[1].statistics.tallied("calls"))) == 1


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="JAX's steps raise no errors")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_message_is_that_of_what_is_wrong(compiled):
    import tensorflow as tf

    def check(wrong):
        backend.check_none(wrong, ["first", "second", "third"])
        return tf.zeros(())

    check = tf.function(check, autograph=False) if compiled else check
    check(tf.constant([False, False, False]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="second"):
        check(tf.constant([False, True, True]))
