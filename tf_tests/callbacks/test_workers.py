"""Callbacks of several workers, with one."""

import keras
import pytest

import keras_ngd
from tf_tests.small import captured, kfac, mlp, regression


def test_one_worker_has_everything_itself(tmp_path):
    model = captured(mlp(), kfac(gradient_worker_fraction=0, reduce_scatter=True))
    x, y = regression()
    callbacks = [
        keras_ngd.callbacks.BroadcastInitialState(),
        keras_ngd.callbacks.GatherStatistics(),
        keras.callbacks.ModelCheckpoint(tmp_path / "model.keras"),
    ]
    for _ in range(2):
        model.fit(x, y, batch_size=8, verbose=0, callbacks=callbacks)
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert loaded.reduce_scatter
    assert loaded.gradient_worker_fraction == 0
    assert model.optimizer.gathered


@pytest.mark.parametrize("save_freq", [0, -1, 1.5, "batch", None, True])
def test_frequency_is_an_epoch_or_a_number_of_batches(save_freq):
    with pytest.raises(ValueError, match="`save_freq` must be 'epoch' or an int of at least 1. Received: save_freq="):
        keras_ngd.callbacks.GatherStatistics(save_freq)


@pytest.mark.parametrize(("steps_per_execution", "expected"), [(1, [3, 6, 9, 10]), (2, [4, 7, 10, 10])])
def test_gathers_as_often_as_asked(steps_per_execution, expected):
    """Ten batches in two epochs, every third, and at the end."""
    seen = []

    class Optimizer:
        def gather_statistics(self):
            seen.append(done)

    class Model:
        optimizer = Optimizer()

    callback = keras_ngd.callbacks.GatherStatistics(3)
    callback.set_model(Model())
    callback.on_train_begin()
    done = 0
    for epoch in range(2):
        callback.on_epoch_begin(epoch)
        batches = 0
        while batches < 5:
            batches = min(5, batches + steps_per_execution)
            done = 5 * epoch + batches
            callback.on_train_batch_end(batches - 1)
        callback.on_epoch_end(epoch)
    callback.on_train_end()
    assert seen == expected


def test_other_optimizers_have_no_statistics():
    model = mlp()
    model.compile("sgd", "mse")
    callback = keras_ngd.callbacks.GatherStatistics()
    callback.set_model(model)
    with pytest.raises(ValueError, match="is for optimizers of keras_ngd"):
        callback.on_train_begin()
