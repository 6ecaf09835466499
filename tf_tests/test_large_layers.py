"""The report warns of layers whose second-order state is large; and optimizers by name."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests.small import JIT, fit, mlp, regression


def wide(units):
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(8, name="small"), layers.Dense(units, name="words")], name="wide"
    )


def captured_warnings(model, optimizer, **kwargs):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report = keras_ngd.capture(model, optimizer, **kwargs)
    return report, [str(w.message) for w in seen if "second-order state" in str(w.message)]


def test_kfac_warns_of_a_wide_layer():
    report, messages = captured_warnings(wide(4097), keras_ngd.KFAC())
    [message] = messages
    assert report.warnings == (message,)
    # Average and inverse of a factor 4,097 wide, and those of 9.
    assert message.startswith("Layer 'wide/words' keeps 134 MB of second-order state, of factors up to 4,097 wide")
    assert "skip=['wide/words']" in message
    for name in ("THOR(split=128)", "SKFAC", "SNGD", "HyLo"):
        assert name in message
    assert str(report).splitlines()[-1] == message


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras_ngd.THOR(split=128),
        lambda: keras_ngd.SKFAC(batch_size=8),
        lambda: keras_ngd.SNGD(batch_size=8),
        lambda: keras_ngd.HyLo(batch_size=8, mode="kid"),
    ],
)
def test_methods_that_cope_say_nothing(make):
    report, messages = captured_warnings(wide(4097), make())
    assert not messages
    assert not report.warnings
    assert report.bytes < 2**24


def test_nothing_is_said_of_small_layers_and_of_those_left_out():
    for model, skip in ((wide(2048), None), (wide(4097), "words")):
        assert not captured_warnings(model, keras_ngd.KFAC(), skip=skip)[1]


def test_whole_factors_of_thor_are_warned_of():
    assert len(captured_warnings(wide(4097), keras_ngd.THOR(split=None))[1]) == 1


def test_optimizers_by_name():
    model = mlp()
    keras_ngd.capture(model, "keras_ngd>KFAC")
    model.compile(optimizer="keras_ngd>KFAC", loss="mse", jit_compile=JIT)
    x, y = regression()
    assert np.isfinite(fit(model, x, y).history["loss"]).all()
    assert isinstance(model.optimizer, keras_ngd.KFAC)
    assert model.optimizer.factor_updates > 0
