"""Tests that `keras.callbacks.SwapEMAWeights` swaps weights with their averages and leaves statistics as they are."""

import keras
import numpy as np
import pytest

import keras_ngd
from tf_tests.small import JIT, array, assert_close, assert_same, captured, fit, mlp, regression, statistics, weights

EVERY = {"factor_interval": 1, "inverse_interval": 1}
METHODS = {
    "kfac": lambda **kwargs: keras_ngd.KFAC(**EVERY, **kwargs),
    "thor": lambda **kwargs: keras_ngd.THOR(split=2, **EVERY, **kwargs),
    "skfac": lambda **kwargs: keras_ngd.SKFAC(batch_size=8, **kwargs),
    "sngd": lambda **kwargs: keras_ngd.SNGD(batch_size=8, **kwargs),
    "hylo": lambda **kwargs: keras_ngd.HyLo(batch_size=8, mode="kis", rank=0.5, **kwargs),
}

# TensorFlow's swap adds and subtracts, which rounds; on JAX values change places.
assert_equal = assert_same if JIT else assert_close


def averaging(method):
    keras.utils.set_random_seed(3)
    return captured(mlp(), METHODS[method](use_ema=True, ema_momentum=0.75))


def averages(optimizer):
    return {v.path: array(v) for v in optimizer.variables if v.path.endswith("_average")}


def loss_at(values, x, y):
    """The mean squared error of `mlp` with these weights, in NumPy."""
    kernel, bias, kernel2, bias2 = (np.float64(v) for v in values)
    return np.mean((np.tanh(x @ kernel + bias) @ kernel2 + bias2 - y) ** 2)


class Averages(keras.callbacks.Callback):
    """Keeps the averages at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(averages(self.model.optimizer).values())


@pytest.mark.parametrize(
    ("method", "swap_on_epoch"),
    [("kfac", False), *(pytest.param(method, True, marks=pytest.mark.slow) for method in METHODS)],
)
def test_evaluates_averages_and_trains_as_before(method, swap_on_epoch):
    x, y = regression()
    expected, seen = averaging(method), Averages()
    fit(expected, x, y, epochs=2, callbacks=[seen])
    model = averaging(method)
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
    history = fit(model, x, y, epochs=2, callbacks=[swap], validation_data=(x, y)).history
    np.testing.assert_allclose(history["val_loss"], [loss_at(v, x, y) for v in seen.seen], rtol=1e-5)
    assert_equal(weights(model), weights(expected))
    assert_equal(statistics(model), statistics(expected))
    assert_equal(averages(model.optimizer), averages(expected.optimizer))
    # It goes on, too.
    assert np.isfinite(fit(model, x, y, callbacks=[keras.callbacks.SwapEMAWeights()]).history["loss"]).all()


def test_saved_with_averages_in_place(tmp_path):
    x, y = regression()
    path = tmp_path / "model.keras"
    model, seen = averaging("kfac"), Averages()
    callbacks = [seen, keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]
    fit(model, x, y, callbacks=[*callbacks, keras.callbacks.ModelCheckpoint(path)])
    loaded = keras.models.load_model(path)
    for found, average in zip(weights(loaded).values(), seen.seen[0], strict=True):
        np.testing.assert_allclose(found, average, rtol=1e-5, atol=1e-6)
    assert_equal(statistics(loaded), statistics(model))
    assert np.isfinite(fit(loaded, x, y).history["loss"]).all()


def test_predicts_with_averages():
    x, y = regression()
    model = averaging("kfac")
    for i in range(0, 32, 8):
        model.train_on_batch(x[i : i + 8], y[i : i + 8])
    before, kept = averages(model.optimizer), statistics(model)
    predicted = model.predict(x, verbose=0, callbacks=[keras.callbacks.SwapEMAWeights()])
    np.testing.assert_allclose(np.mean((predicted - y) ** 2), loss_at(before.values(), x, y), rtol=1e-5)
    assert_equal(statistics(model), kept)


def test_nothing_to_swap_without_averages():
    model = captured(mlp())
    with pytest.raises(ValueError, match="use_ema=True"):
        fit(model, *regression(), callbacks=[keras.callbacks.SwapEMAWeights()], validation_data=regression())
