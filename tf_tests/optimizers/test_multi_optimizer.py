"""Parts of a model trained by `keras.optimizers.MultiOptimizer` take the steps their optimizers take alone."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests.small import array, assert_close, compiled, fit, gradients, regression, weights

pytestmark = pytest.mark.neutral

METHODS = {
    "kfac": lambda: keras_ngd.KFAC(factor_interval=1, inverse_interval=1),
    "thor": lambda: keras_ngd.THOR(split=2, factor_interval=1, inverse_interval=1),
    "ekfac": lambda: keras_ngd.EKFAC(factor_interval=1, inverse_interval=1),
    "eigen-adam": lambda: keras_ngd.EigenAdam(factor_interval=1, inverse_interval=1),
    "skfac": lambda: keras_ngd.SKFAC(batch_size=16, interval=1),
    "sngd": lambda: keras_ngd.SNGD(batch_size=16, interval=1),
    "hylo": lambda: keras_ngd.HyLo(batch_size=16, interval=1, mode="kid"),
}


def parts(method):
    """A model, the optimizer of its layers named `natural`, and that of the rest."""
    keras.utils.set_random_seed(5)
    inputs = keras.Input((4,))
    h = layers.Dense(4, activation="tanh", name="natural_1")(inputs)
    h = layers.Dense(4, activation="tanh", name="plain")(h)
    model = keras.Model(inputs, layers.Dense(4, name="natural_2")(h))
    optimizer = METHODS[method]()
    keras_ngd.capture(model, optimizer, skip="plain")
    return model, optimizer, keras.optimizers.Adam(0.01)


def multi(optimizer, rest, **kwargs):
    by_path = keras.optimizers.OptimizerMap(rest, {"natural_.*": optimizer})
    return keras.optimizers.MultiOptimizer(by_path, **kwargs)


@pytest.mark.parametrize("method", ["kfac", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "kfac")])
def test_steps_are_those_of_the_parts(method):
    x, y = regression()
    expected, *optimizers = parts(method)
    own = [v for v in expected.trainable_variables if v.path.startswith("natural")]
    rest = [v for v in expected.trainable_variables if v.path.startswith("plain")]
    for i in (0, 16):
        found = gradients(expected, x[i : i + 16], y[i : i + 16])
        for optimizer, variables in zip(optimizers, (own, rest), strict=True):
            optimizer.apply([keras.ops.convert_to_tensor(found[v.path]) for v in variables], variables)
    model, *optimizers = parts(method)
    before = weights(model)
    fit(compiled(model, multi(*optimizers)), x, y, batch_size=16)
    assert_close(weights(model), weights(expected), 1e-5)
    assert all(np.abs(array(v) - before[v.path]).max() > 1e-4 for v in model.trainable_variables if v.path in before)
    assert optimizers[0].inverse_updates == 2


def test_loss_scale_of_the_whole_is_that_of_its_parts():
    model, *optimizers = parts("kfac")
    scaled = multi(*optimizers, loss_scale_factor=64.0)
    assert optimizers[0].loss_scale == 64
    x, y = regression()
    fit(compiled(model, scaled), x, y, batch_size=16)
    expected, *optimizers = parts("kfac")
    fit(compiled(expected, multi(*optimizers)), x, y, batch_size=16)
    assert_close(weights(model), weights(expected), 1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_dynamic_loss_scale_is_refused(whole):
    model, *optimizers = parts("kfac")
    optimizer = multi(*optimizers) if whole else optimizers[0]
    with pytest.raises(ValueError, match="cannot be wrapped in a LossScaleOptimizer.*mixed_bfloat16"):
        # MultiOptimizer of the TensorFlow backend does not hand on that it is wrapped.
        keras.optimizers.LossScaleOptimizer(optimizer).build(model.trainable_variables)
