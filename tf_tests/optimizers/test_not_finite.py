"""Batches with NaN or infinity in them: counted, left out, and without a trace in weights, factors or inverses."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from tf_tests.small import Restarting, array, captured, fit, kfac, mlp, regression, statistics, weights

STEPS = 8


def batches(bad=(), where="inputs", value=np.nan):
    """Eight batches of eight, with one entry of those in `bad` spoiled."""
    x, y = regression(8 * STEPS)
    for step in bad:
        (x if where == "inputs" else y)[8 * step + 3, 1] = value
    return x, y


def assert_finite(model):
    for path, value in {**weights(model), **statistics(model)}.items():
        assert np.all(np.isfinite(value)), path
    for variable in model.optimizer.variables:
        assert np.all(np.isfinite(array(variable))), variable.path


@pytest.fixture(scope="module")
def restarting():
    return Restarting(captured(mlp()))


@pytest.fixture
def model(restarting):
    """A network before its first step, which all tests share that do not say otherwise."""
    return restarting.restarted()


@pytest.mark.parametrize("bad", [0, 3], ids=["first batch", "fourth batch"])
@pytest.mark.parametrize(
    ("where", "value"),
    [("inputs", np.nan), ("inputs", np.inf), ("labels", np.nan), ("labels", -np.inf)],
    ids=["NaN inputs", "inf inputs", "NaN labels", "inf labels"],
)
def test_spoiled_batch_is_skipped_and_counted(where, value, bad, model):
    fit(model, *batches([bad], where, value))
    assert_finite(model)
    assert model.optimizer.skipped_statistics == 1
    assert model.optimizer.skipped_steps == 1
    assert model.optimizer.factor_updates == STEPS - 1
    assert int(array(model.optimizer.iterations)) == STEPS

    x, y = batches()
    before = model.evaluate(x, y, verbose=0)
    assert fit(model, x, y, epochs=3).history["loss"][-1] < before
    assert model.optimizer.skipped_statistics == model.optimizer.skipped_steps == 1


@pytest.mark.parametrize("inverse", ["cholesky", "newton-schulz", "eigen"])
def test_every_batch_spoiled_changes_nothing(inverse):
    model = captured(mlp(), kfac(inverse=inverse, momentum=0.0))
    before = weights(model)
    fit(model, *batches(range(STEPS)))
    assert_finite(model)
    assert all(np.array_equal(before[path], value) for path, value in weights(model).items())
    assert model.optimizer.skipped_statistics == model.optimizer.skipped_steps == STEPS
    assert model.optimizer.factor_updates == model.optimizer.inverse_updates == 0


def test_spoiled_batch_counts_as_a_zero_gradient():
    """Momentum carries on, exactly as far as it would."""
    model = captured(mlp(), kfac(momentum=0.5))
    x, y = batches([1])
    model.train_on_batch(x[:8], y[:8])
    momenta = [array(v) for v in model.optimizer.momentums if v is not None]
    before = [array(v) for v in model.trainable_variables if not hasattr(v, "keras_ngd_statistics")]
    model.train_on_batch(x[8:16], y[8:16])
    after = [array(v) for v in model.trainable_variables if not hasattr(v, "keras_ngd_statistics")]
    kept = [m for m in momenta if np.any(m != 0)]
    assert len(kept) == len(after) == 4
    for old, new, momentum in zip(before, after, kept, strict=True):
        np.testing.assert_allclose(new, old + 0.5 * momentum, rtol=1e-6, atol=1e-7)


def gates(model, x, y):
    """Whether statistics were recorded, step by step."""
    opened = []
    for i in range(0, len(x), 8):
        opened.append(float(array(model.layers[1].statistics.gate)) > 0)
        model.train_on_batch(x[i : i + 8], y[i : i + 8])
    return opened


def test_statistics_are_retried_at_the_next_step():
    model = captured(mlp(), kfac(factor_interval=3))
    assert gates(model, *batches([3, 4])) == [True, False, False, True, True, True, False, False]
    assert model.optimizer.skipped_statistics == 2
    assert model.optimizer.factor_updates == 2
    assert_finite(model)


def test_statistics_not_due_are_not_counted():
    model = captured(mlp(), kfac(factor_interval=3))
    assert gates(model, *batches([4])) == [True, False, False, True, False, False, True, False]
    assert model.optimizer.skipped_statistics == 0
    assert model.optimizer.skipped_steps == 1
    assert_finite(model)


def test_a_spoiled_batch_leaves_the_averages_as_they_were(model):
    x, y = batches([1])
    model.train_on_batch(x[:8], y[:8])
    before = {path: v for path, v in statistics(model).items() if path.endswith("factor")}
    model.train_on_batch(x[8:16], y[8:16])
    assert all(np.array_equal(v, statistics(model)[path]) for path, v in before.items())


def root_loss(y_true, y_pred):
    """Finite everywhere, with a gradient that is NaN where the label is zero."""
    return ops.mean(ops.sqrt(ops.square(y_pred * y_true)), axis=-1)


def test_gradients_alone_not_finite():
    x, y = batches()
    y[8:16] = 0
    model = captured(mlp(), loss=root_loss)
    history = fit(model, x, y)
    assert np.isfinite(history.history["loss"][0])
    assert_finite(model)
    assert model.optimizer.skipped_steps == 1
    assert model.optimizer.skipped_statistics == 1


def test_statistics_alone_not_finite():
    """Inputs whose square overflows, with gradients that do not."""
    x, y = batches()
    x[8:16] = 3e19
    model = captured(keras.Sequential([keras.Input((4,)), layers.Dense(4, activation="softsign")]))
    fit(model, x, y)
    assert_finite(model)
    assert model.optimizer.skipped_statistics == 1
    assert model.optimizer.skipped_steps == 0
    assert model.optimizer.factor_updates == STEPS - 1


@pytest.mark.parametrize("twice", [False, True], ids=["called once", "called twice"])
def test_embedding_and_every_other_variable_stays_finite(twice):
    tokens = keras.Input((3,), dtype="int32")
    dense = layers.Dense(4, activation="tanh", name="dense")
    h = dense(layers.Embedding(6, 4, name="embedding")(tokens))
    h = layers.LayerNormalization()(dense(h) if twice else h)
    model = captured(keras.Model(tokens, layers.GlobalAveragePooling1D()(h)))
    rng = np.random.default_rng(0)
    x, (_, y) = rng.integers(6, size=(64, 3)), batches([2], "labels")
    before = weights(model)
    fit(model, x, y)
    assert_finite(model)
    assert model.optimizer.skipped_steps == model.optimizer.skipped_statistics == 1
    assert all(np.any(before[path] != value) for path, value in weights(model).items())


def test_compiled_by_xla():
    model = captured(mlp(), jit_compile=True)
    fit(model, *batches([0, 3]))
    assert_finite(model)
    assert model.optimizer.skipped_statistics == model.optimizer.skipped_steps == 2


def test_counts_are_readable_during_training(model):
    class Reader(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(("begin", epoch, optimizer.skipped_statistics, optimizer.skipped_steps))

        def on_train_batch_end(self, batch, logs=None):
            if keras.backend.backend() == "jax":
                self.model.jax_state_sync()
            counts.append((optimizer.factor_updates, optimizer.skipped_steps))

        def on_epoch_end(self, epoch, logs=None):
            seen.append(("end", epoch, optimizer.skipped_statistics, optimizer.skipped_steps))

    seen, counts, optimizer = [], [], kfac()
    assert optimizer.skipped_statistics == optimizer.skipped_steps == 0
    assert optimizer.factor_updates == optimizer.inverse_updates == 0
    optimizer = model.optimizer
    x, y = batches([1, 2])
    fit(model, x[:32], y[:32], epochs=2, callbacks=[Reader()])
    assert seen == [("begin", 0, 0, 0), ("end", 0, 2, 2), ("begin", 1, 2, 2), ("end", 1, 4, 4)]
    assert counts == [(1, 0), (1, 1), (1, 2), (2, 2), (3, 2), (3, 3), (3, 4), (4, 4)]
    assert optimizer.skipped_statistics == optimizer.skipped_steps == 4
