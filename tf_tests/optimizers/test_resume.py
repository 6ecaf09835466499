"""Training that is saved, interrupted and resumed in another process ends with the same bits as training in one go."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ngd
from tf_tests import paper, small
from tf_tests.small import array, assert_same, captured, compiled, kfac, mlp, weights

EPOCHS = 3


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 6, 6, 2)).astype("float32")
    return x, (x[:, 0, :4, 0] > 0).astype("float32")


RATE = keras.optimizers.schedules.ExponentialDecay(0.05, 4, 0.9)
SHARED = {"factor_interval": 2, "inverse_interval": 4, "use_ema": True, "weight_decay": 1e-3}
METHODS = {
    "kfac": lambda: paper.KFAC(RATE, keras.optimizers.schedules.PolynomialDecay(0.1, 10, 0.01), **SHARED),
    "ekfac": lambda: keras_ngd.EKFAC(RATE, **SHARED),
    "ekfac-examples": lambda: keras_ngd.EKFAC(RATE, scale="examples", **SHARED),
    "eigen-adam": lambda: keras_ngd.EigenAdam(RATE, **SHARED),
    "soap": lambda: keras_ngd.EigenAdam(RATE, basis="gradient", **SHARED),
}


def build(method="kfac"):
    """A convolutional model under an optimizer whose every kind of state is mid-flight after each epoch of 3 steps."""
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )
    optimizer = METHODS[method]()
    return compiled(model, optimizer) if method == "soap" else captured(model, optimizer)


def everything(model):
    """All weights, statistics and optimizer variables, by number and path."""
    return {f"{i} {v.path}": array(v) for i, v in enumerate(model.weights + model.optimizer.variables)}


class Interrupt(keras.callbacks.Callback):
    """Breaks off in the middle of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch, self.now = epoch, False

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch == self.epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.now:
            raise KeyboardInterrupt


RESUME = f"""
import sys
import keras, numpy as np
from tf_tests.optimizers import test_resume as t
from tf_tests.small import fit

saved, backup, results, method = sys.argv[1:]
keras.utils.set_random_seed(123)
loaded = keras.models.load_model(saved)
fit(loaded, *t.data(), epochs={2 * EPOCHS}, initial_epoch={EPOCHS})
np.savez(results + "/loaded.npz", *t.everything(loaded).values())
restarted = t.build(method)
fit(restarted, *t.data(), epochs={2 * EPOCHS}, callbacks=[keras.callbacks.BackupAndRestore(backup)])
np.savez(results + "/restarted.npz", *t.everything(restarted).values())
"""


def in_a_new_process(code, *arguments):
    root = os.path.dirname(os.path.dirname(os.path.abspath(small.__file__)))
    environment = {**os.environ, "KERAS_BACKEND": keras.backend.backend(), "PYTHONPATH": root}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("method", METHODS)
def test_resuming_in_a_new_process_is_exact(method, tmp_path):
    keras.utils.set_random_seed(0)
    straight = build(method)
    start = straight.get_weights()
    small.fit(straight, *data(), epochs=2 * EPOCHS)
    # The others' intervals grow from 1.
    assert straight.optimizer.factor_updates == (9 if method == "kfac" else 18)
    assert straight.optimizer.inverse_updates >= 5
    expected = everything(straight)

    model = build(method)
    model.set_weights(start)
    saver = SaveAt(EPOCHS - 1, tmp_path / "half.keras")
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    with pytest.raises(KeyboardInterrupt):
        small.fit(model, *data(), epochs=2 * EPOCHS, callbacks=[backup, saver, Interrupt(EPOCHS)])
    in_a_new_process(RESUME, tmp_path / "half.keras", tmp_path / "backup", tmp_path, method)

    for kind in ("loaded", "restarted"):
        with np.load(tmp_path / f"{kind}.npz") as found:
            assert len(found.files) == len(expected)
            assert_same(dict(zip(expected, (found[name] for name in found.files), strict=True)), expected)


class SaveAt(keras.callbacks.Callback):
    """Saves the whole model at the end of an epoch."""

    def __init__(self, epoch, path):
        super().__init__()
        self.epoch, self.path = epoch, path

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            self.model.save(self.path)


# Checkpoints loaded by hand


@pytest.fixture
def checkpoint(tmp_path):
    """A model trained for five steps, whose statistics are not due at the sixth, and its file of weights."""
    model = captured(mlp(), kfac(factor_interval=3, inverse_interval=3))
    small.fit(model, *small.regression(40))
    model.save_weights(tmp_path / "saved.weights.h5")
    return model, tmp_path / "saved.weights.h5"


@pytest.mark.parametrize("explicitly", [True, False], ids=["built", "built by fit"])
def test_state_loaded_before_the_optimizer_is_built_waits_for_it(explicitly, checkpoint):
    model, path = checkpoint
    resumed = captured(mlp(), kfac(factor_interval=3, inverse_interval=3))
    resumed.load_weights(path)
    assert not resumed.optimizer.built
    assert resumed.optimizer.factor_updates == 0
    if explicitly:
        resumed.optimizer.build(resumed.trainable_variables)
        assert resumed.optimizer.factor_updates == 2
        assert_same(everything(resumed), everything(model))
    for each in (resumed, model):
        small.fit(each, *small.regression(40))
    assert_same(everything(resumed), everything(model))
    assert model.optimizer.factor_updates == 4


def test_state_waiting_for_build_may_be_replaced(checkpoint, tmp_path):
    model, path = checkpoint
    small.fit(model, *small.regression(40))
    model.save_weights(tmp_path / "later.weights.h5")
    resumed = captured(mlp(), kfac(factor_interval=3, inverse_interval=3))
    resumed.load_weights(path)
    resumed.load_weights(tmp_path / "later.weights.h5")
    resumed.optimizer.build(resumed.trainable_variables)
    assert_same(everything(resumed), everything(model))


def state(optimizer):
    """All variables of an optimizer, by path."""
    return {v.path: array(v) for v in optimizer.variables}


def mean_gradients(optimizer):
    """Of a trained EigenAdam the means of the gradients themselves, which it keeps in its bases: by their variables."""
    found = {}
    for curvature in optimizer.basis_curvatures():
        state = [ops.convert_to_tensor(v) for v in curvature.variables]
        found[curvature.first_moment.path] = array(curvature.rotated_back(state[-3], state))
    return found


@pytest.mark.parametrize("built", [True, False], ids=["built", "not built"])
@pytest.mark.parametrize("basis", ["fisher", "gradient"])
def test_means_of_gradients_of_older_files_are_turned_into_the_bases(basis, built, tmp_path):
    def make():
        optimizer = keras_ngd.EigenAdam(factor_interval=1, inverse_interval=1, basis=basis)
        return captured(mlp(), optimizer) if basis == "fisher" else compiled(mlp(), optimizer)

    model = make()
    small.fit(model, *small.regression(40))
    expected, store = state(model.optimizer), {}
    model.optimizer.save_own_variables(store)
    # So it was before there was a format.
    del store["format"]
    for i, variable in enumerate(model.optimizer.variables):
        if variable.path in (means := mean_gradients(model.optimizer)):
            store[str(i)] = means[variable.path]
    other = make()
    if built:
        other.optimizer.build(other.trainable_variables)
    other.optimizer.load_own_variables(store)
    other.optimizer.build(other.trainable_variables)
    small.assert_close(state(other.optimizer), expected)
    assert len(means) == 1


def test_state_of_a_later_version_is_an_error():
    model, store = captured(mlp()), {}
    model.optimizer.build(model.trainable_variables)
    small.fit(model, *small.regression())
    model.optimizer.save_own_variables(store)
    store["format"] = np.array(10)
    with pytest.raises(ValueError, match="later version of keras_ngd, format 10"):
        model.optimizer.load_own_variables(store)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The path of such a file, and the weights in it."""
    model = captured(mlp(), kfac(factor_interval=3, inverse_interval=3))
    small.fit(model, *small.regression(40))
    path = tmp_path_factory.mktemp("saved") / "saved.weights.h5"
    model.save_weights(path)
    return path, weights(model)


MISMATCHES = {
    "inverse": (lambda: captured(mlp(), kfac(inverse="eigen")), "has 22 variables but the checkpoint has 20"),
    "momentum": (lambda: captured(mlp(), kfac(momentum=0.0)), "has 16 variables but the checkpoint has 20"),
    "average": (lambda: captured(mlp(), kfac(use_ema=True)), "has 24 variables but the checkpoint has 20"),
    "missing layer": (lambda: captured(mlp(), skip="hidden"), "has shape .* but the checkpoint has"),
}


@pytest.mark.parametrize("built", [True, False], ids=["built", "not built"])
@pytest.mark.parametrize("difference", MISMATCHES)
def test_state_that_does_not_match_is_an_error(difference, built, saved):
    make, message = MISMATCHES[difference]
    model = make()
    if built:
        model.optimizer.build(model.trainable_variables)
        before = [array(v) for v in model.optimizer.variables]
        with pytest.raises(ValueError, match=message):
            model.load_weights(saved[0])
        assert all(np.array_equal(old, array(v)) for old, v in zip(before, model.optimizer.variables, strict=True))
        return
    model.load_weights(saved[0])
    with pytest.raises(ValueError, match=message):
        small.fit(model, *small.regression())


def test_state_that_does_not_match_is_not_forgotten(saved):
    model = captured(mlp(), kfac(momentum=0.0))
    model.load_weights(saved[0])
    for _ in range(2):
        with pytest.raises(ValueError, match="has 16 variables but the checkpoint has 20"):
            small.fit(compiled(model, model.optimizer), *small.regression())


def test_backup_of_another_optimizer_is_an_error(tmp_path):
    x, y = small.regression()
    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"), delete_checkpoint=False)
    small.fit(compiled(mlp(), keras.optimizers.Adam()), x, y, callbacks=[backup])
    with pytest.raises(ValueError, match="The checkpoint was written by another optimizer"):
        small.fit(captured(mlp()), x, y, epochs=2, callbacks=[backup])


def test_mismatch_may_be_skipped_when_asked_for(saved):
    model = captured(mlp(), kfac(momentum=0.0))
    model.optimizer.build(model.trainable_variables)
    with pytest.warns(UserWarning, match="has 16 variables but the checkpoint has 20"):
        model.load_weights(saved[0], skip_mismatch=True)
    assert_same(weights(model), saved[1])
    assert model.optimizer.factor_updates == 0


def test_file_without_optimizer_state_loads_and_keeps_what_the_optimizer_has(tmp_path):
    plain = mlp()
    plain.save_weights(tmp_path / "plain.weights.h5")
    model = captured(mlp())
    model.load_weights(tmp_path / "plain.weights.h5")
    small.fit(model, *small.regression())
    state = [array(v) for v in model.optimizer.variables]
    model.load_weights(tmp_path / "plain.weights.h5")
    assert_same(weights(model), weights(plain))
    assert all(np.array_equal(old, array(v)) for old, v in zip(state, model.optimizer.variables, strict=True))


def test_model_saved_before_its_first_step(tmp_path):
    model = captured(mlp())
    model.save(tmp_path / "untrained.keras")
    loaded = keras.models.load_model(tmp_path / "untrained.keras")
    for each in (model, loaded):
        small.fit(each, *small.regression())
    assert_same(everything(loaded), everything(model))
