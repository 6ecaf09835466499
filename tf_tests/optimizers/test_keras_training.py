"""The optimizer under all ways in which Keras trains, its learning rates and callbacks."""

import keras
import numpy as np
import pytest
from keras import layers
from keras.optimizers.schedules import PiecewiseConstantDecay

from tf_tests.small import (
    JIT,
    array,
    assert_close,
    assert_same,
    captured,
    compiled,
    fit,
    kfac,
    mlp,
    regression,
    statistics,
    trained,
    weights,
)

STEPS = 4


# Ways of training


@pytest.mark.skipif(JIT, reason="running JAX without compilation is very slow")
def test_run_eagerly_takes_the_same_steps():
    x, y = regression(16)
    models = []
    for arguments in ({"run_eagerly": True, "jit_compile": False}, {}):
        keras.utils.set_random_seed(0)
        models.append(captured(mlp(), **arguments))
        fit(models[-1], x, y)
    assert_close(weights(models[0]), weights(models[1]))
    assert_close(statistics(models[0]), statistics(models[1]))


def test_steps_per_execution_takes_the_same_steps():
    several = trained(steps_per_execution=2, epochs=2)
    assert several.optimizer.factor_updates == 2 * STEPS
    assert_close(weights(several), weights(trained(epochs=2)))


def test_last_batch_that_is_smaller():
    keras.utils.set_random_seed(0)
    model = captured(mlp())
    fit(model, *regression(27), epochs=2)
    assert model.optimizer.factor_updates == 8
    assert model.optimizer.skipped_statistics == 0


def test_train_on_batch_takes_the_steps_of_fit():
    x, y = regression()
    keras.utils.set_random_seed(0)
    model = captured(mlp())
    for i in range(0, 32, 8):
        model.train_on_batch(x[i : i + 8], y[i : i + 8])
    assert_close(weights(model), weights(trained()))


def test_sample_weight_scales_gradients_and_g_but_not_a():
    x, y = regression(8)
    found = []
    for scale in (1.0, 2.0):
        keras.utils.set_random_seed(0)
        model = captured(mlp())
        fit(model, x, y, sample_weight=np.full(8, scale))
        found.append(statistics(model))
    once, twice = found
    a, g = "hidden/statistics/input_factor", "hidden/statistics/output_factor"
    np.testing.assert_allclose(twice[a], once[a], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(twice[g], 4 * once[g], rtol=1e-4, atol=1e-7)


def test_class_weight_trains():
    x, _ = regression()
    labels = (x[:, 0] > 0).astype("int64")
    losses = []
    for class_weight in (None, {0: 1.0, 1: 0.0}):
        keras.utils.set_random_seed(0)
        model = captured(mlp(), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        fit(model, x, labels, epochs=2, class_weight=class_weight)
        losses.append(weights(model))
        assert model.optimizer.factor_updates == 2 * STEPS
    assert all(np.any(losses[0][path] != losses[1][path]) for path in losses[0])


def test_embedding_follows_the_plain_rule():
    """Rows of the table that no batch looks up stay; the others move, with momentum, as under SGD."""
    tokens = keras.Input((3,), dtype="int32")
    table = layers.Embedding(8, 4, name="table")
    h = layers.GlobalAveragePooling1D()(layers.Dense(4, activation="tanh")(table(tokens)))
    model = captured(keras.Model(tokens, h), kfac(learning_rate=0.1, momentum=0.9, weight_decay=None))
    rng = np.random.default_rng(0)
    x, (_, y), before = rng.integers(6, size=(32, 3)), regression(), array(table.embeddings)
    losses = fit(model, x, y, epochs=8).history["loss"]
    after = array(table.embeddings)
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(after[6:], before[6:])
    assert np.all(np.any(after[:6] != before[:6], axis=1))


def test_other_variables_take_the_step_of_sgd():
    x, y = regression()
    models = []
    for make in (lambda: kfac(learning_rate=0.1, momentum=0.9), lambda: keras.optimizers.SGD(0.1, momentum=0.9)):
        keras.utils.set_random_seed(0)
        h = layers.LayerNormalization(name="norm")(keras.Input((4,)))
        model = keras.Model(h._keras_history.operation.input, layers.Dense(4, name="outputs")(h))
        captured(model)
        models.append(compiled(model, make()))
        model.train_on_batch(x, y)
    ours, theirs = (weights(model) for model in models)
    for path in ours:
        if "norm" in path:
            np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-5)
        else:
            assert np.any(ours[path] != theirs[path])


# Learning rates and callbacks


def test_learning_rate_schedule_is_followed():
    """A rate of zero from step 2 on leaves only the momentum, which is zero too."""
    schedule = PiecewiseConstantDecay([1], [0.1, 0.0])
    keras.utils.set_random_seed(0)
    model, (x, y) = captured(mlp(), kfac(learning_rate=schedule, momentum=0.0)), regression()
    seen = [weights(model)]
    for i in range(0, 32, 8):
        model.train_on_batch(x[i : i + 8], y[i : i + 8])
        seen.append(weights(model))
    moved = [np.any(a["hidden/kernel"] != b["hidden/kernel"]) for a, b in zip(seen, seen[1:], strict=False)]
    assert moved == [True, True, False, False]
    assert model.optimizer.factor_updates == 4


def test_callbacks_set_the_learning_rate():
    keras.utils.set_random_seed(0)
    model, (x, y) = captured(mlp(), kfac(momentum=0.0)), regression()
    seen = {}
    record = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.update({epoch: weights(model)}))
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 if epoch == 0 else 0.0)
    history = fit(model, x, y, epochs=3, callbacks=[schedule, record])
    assert history.history["learning_rate"] == pytest.approx([0.1, 0.0, 0.0])
    assert_same(seen[1], seen[0])
    assert_same(seen[2], seen[0])
    model.optimizer.learning_rate = 0.1
    fit(model, x, y, callbacks=[record])
    assert any(np.any(seen[0][path] != seen[2][path]) for path in seen[2])


def test_callbacks_that_stop_save_and_restore(tmp_path):
    keras.utils.set_random_seed(0)
    model, (x, y) = captured(mlp()), regression()
    best = str(tmp_path / "best.keras")
    last = str(tmp_path / "last.weights.h5")
    history = fit(
        model,
        x,
        y,
        epochs=12,
        validation_data=(-x, y),  # soon gets worse
        callbacks=[
            keras.callbacks.EarlyStopping(monitor="val_loss", patience=2, restore_best_weights=True),
            keras.callbacks.ModelCheckpoint(best, monitor="val_loss", save_best_only=True),
            keras.callbacks.ModelCheckpoint(last, save_weights_only=True),
            keras.callbacks.ReduceLROnPlateau(monitor="val_loss", patience=1),
            keras.callbacks.TerminateOnNaN(),
            keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        ],
    ).history
    assert len(history["loss"]) < 12
    loaded = keras.models.load_model(best)
    assert_same(weights(loaded), weights(model))
    assert_same(statistics(loaded), statistics(model))
    assert loaded.evaluate(-x, y, verbose=0) == pytest.approx(min(history["val_loss"]), rel=1e-5)
    updates = model.optimizer.factor_updates
    fit(model, x, y)
    assert model.optimizer.factor_updates == updates + STEPS
    model.load_weights(last)
    assert model.optimizer.factor_updates == updates
