"""The optimizer under everything else that Keras does with an optimizer."""

import copy
import json

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras.optimizers.schedules import CosineDecay, ExponentialDecay, PiecewiseConstantDecay

import keras_ngd
from tf_tests import paper
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
    policy,
    regression,
    statistics,
    weights,
)

STEPS = 4


def trained(optimizer=None, epochs=1, seed=0, **kwargs):
    """A captured model after training, always from the same weights."""
    keras.utils.set_random_seed(seed)
    model = captured(mlp(), optimizer, **kwargs)
    fit(model, *regression(), epochs=epochs)
    return model


# Configuration

FULL = {
    "learning_rate": 0.03,
    "damping": 0.2,
    "momentum": 0.8,
    "factor_decay": 0.7,
    "factor_interval": 3,
    "inverse_interval": 6,
    "inverse": "eigen",
    "damping_mode": "exact",
    "weight_sharing": "reduce",
    "losses_per_example": 2.0,
    "statistics_fraction": 0.5,
    "kl_clip": None,
    "name": "mine",
    "nesterov": True,
    "weight_decay": 0.01,
    "clipnorm": 2.0,
    "use_ema": True,
    "ema_momentum": 0.9,
    "ema_overwrite_frequency": 5,
    "loss_scale_factor": 8.0,
}


def test_config_round_trip():
    config = json.loads(json.dumps(paper.KFAC(**FULL).get_config()))
    assert {key: config[key] for key in FULL} == pytest.approx(FULL)
    assert keras_ngd.KFAC.from_config(config).get_config() == config


def test_config_round_trip_with_schedules():
    optimizer = paper.KFAC(
        learning_rate=CosineDecay(0.1, 100),
        damping=ExponentialDecay(0.1, 10, 0.5),
        factor_interval=PiecewiseConstantDecay([10], [1, 5]),
        inverse_interval=PiecewiseConstantDecay([10], [10, 50]),
    )
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer)))
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is keras_ngd.KFAC
    assert type(again.damping) is ExponentialDecay
    assert type(again.factor_interval) is PiecewiseConstantDecay
    assert again.get_config() == optimizer.get_config()
    assert keras.saving.get_registered_object("keras_ngd>KFAC") is keras_ngd.KFAC


def test_every_argument_at_once_trains():
    optimizer = paper.KFAC(**{**FULL, "factor_interval": 1, "inverse_interval": 1})
    model = trained(keras_ngd.KFAC.from_config(optimizer.get_config()), epochs=2)
    assert model.optimizer.factor_updates == 2 * STEPS
    assert model.optimizer.skipped_steps == 0
    assert all(np.all(np.isfinite(v)) for v in weights(model).values())


def test_by_name():
    model = mlp()
    keras_ngd.capture(model, "keras_ngd>KFAC")
    compiled(model, "keras_ngd>KFAC")
    fit(model, *regression())
    assert type(model.optimizer) is keras_ngd.KFAC
    # Intervals grow from 1: at first, every step is an update.
    assert model.optimizer.factor_updates == 4
    assert model.optimizer.factor_interval == 10


def test_schedules_of_damping_and_intervals():
    optimizer = kfac(
        damping=ExponentialDecay(0.1, 10, 0.5),
        factor_interval=PiecewiseConstantDecay([3], [1, 4]),
        inverse_interval=PiecewiseConstantDecay([4], [2, 100]),
    )
    trained(optimizer, epochs=3)
    assert optimizer.factor_updates == 6  # steps 0, 1, 2, 3, 4 and 8: the interval after step 3 is still 1
    assert optimizer.inverse_updates == 4  # steps 0, 2, 4 and 6 would be due every 2; from step 5 on every 100


# Precision


def test_mixed_bfloat16():
    with policy("mixed_bfloat16"):
        model = captured(mlp())
    x, y = regression()
    before = model.evaluate(x, y, verbose=0)
    history = fit(model, x, y, epochs=6)
    assert history.history["loss"][-1] < before
    assert model.optimizer.factor_updates == 6 * STEPS
    assert model.get_layer("hidden").compute_dtype == "bfloat16"
    assert {v.dtype for v in model.get_layer("hidden").statistics.weights} == {"float32"}
    with policy("mixed_bfloat16"):
        keras.utils.set_random_seed(0)


def test_statistics_of_bfloat16_are_close_to_those_of_float32():
    with policy("mixed_bfloat16"):
        rough = trained()
    exact = trained()
    for path in ("hidden/statistics/input_factor", "hidden/statistics/output_factor"):
        a, b = statistics(rough)[path], statistics(exact)[path]
        assert np.abs(a - b).max() < 0.03 * np.abs(b).max()


def test_static_loss_scale_changes_no_step():
    plain, scaled = trained(), trained(kfac(loss_scale_factor=1024.0))
    assert_close(weights(scaled), weights(plain))
    g = "hidden/statistics/output_factor"
    np.testing.assert_allclose(statistics(scaled)[g], statistics(plain)[g] * 1024.0**2, rtol=1e-4)


def test_mixed_float16_with_a_static_loss_scale():
    with policy("mixed_float16"):
        model = captured(mlp(), kfac(loss_scale_factor=256.0), auto_scale_loss=False)
    x, y = regression()
    before = model.evaluate(x, y, verbose=0)
    assert fit(model, x, y, epochs=6).history["loss"][-1] < before
    assert model.optimizer.skipped_steps == 0
    assert model.optimizer.factor_updates == 6 * STEPS


# SGD's own arguments


def test_every_argument_of_sgd_has_its_effect():
    plain = weights(trained(epochs=2))
    for arguments in (
        {"nesterov": True},
        {"weight_decay": 0.1},
        {"clipnorm": 1e-3},
        {"clipvalue": 1e-4},
        {"global_clipnorm": 1e-3},
        {"momentum": 0.0},
        {"use_ema": True, "ema_momentum": 0.5},
    ):
        model = trained(kfac(**arguments), epochs=2)
        found = weights(model)
        assert all(np.all(np.isfinite(v)) for v in found.values()), arguments
        assert all(np.any(found[path] != plain[path]) for path in plain if "kernel" in path), arguments
        assert model.optimizer.factor_updates == 2 * STEPS


def test_clipping_bounds_the_preconditioned_step_and_spares_the_statistics():
    keras.utils.set_random_seed(0)
    model = captured(mlp(), kfac(learning_rate=1.0, momentum=0.0, kl_clip=None, global_clipnorm=1e-2))
    before = weights(model)
    x, y = regression()
    model.train_on_batch(x, y)
    length = np.sqrt(sum(np.sum(np.square(v - before[path])) for path, v in weights(model).items()))
    assert length == pytest.approx(1e-2, rel=1e-3)
    rows = np.concatenate([x, np.ones((32, 1))], axis=1)
    np.testing.assert_allclose(
        array(model.get_layer("hidden").statistics.input_factor)[0], rows.T @ rows / 32, rtol=1e-4, atol=1e-5
    )


def test_weight_decay_spares_the_statistics():
    keras.utils.set_random_seed(0)
    model = captured(mlp(), kfac(weight_decay=0.5, factor_interval=100))
    x, y = regression()
    model.train_on_batch(x, y)
    recorded = {path: v for path, v in statistics(model).items() if path.endswith("factor")}
    kernel = array(model.get_layer("hidden").kernel)
    model.train_on_batch(x, y)
    assert all(np.array_equal(v, statistics(model)[path]) for path, v in recorded.items())
    assert np.any(kernel != array(model.get_layer("hidden").kernel))


@pytest.mark.parametrize("overwrite", [None, 3])
def test_averaged_weights(overwrite):
    model = trained(kfac(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=overwrite), epochs=1)
    averages = [v for v in model.optimizer._model_variables_moving_average if v is not None]
    own = [v for v in model.trainable_variables if not hasattr(v, "keras_ngd_statistics")]
    assert len(averages) == len(own) == 4
    assert all(np.array_equal(array(a), array(v)) for a, v in zip(averages, own, strict=True))
    fit(model, *regression(), epochs=2)
    assert model.optimizer.factor_updates == 3 * STEPS
    assert all(np.all(np.isfinite(v)) for v in statistics(model).values())


def test_averaged_weights_are_the_average():
    x, y = regression(16)
    keras.utils.set_random_seed(0)
    plain = captured(mlp())
    path = [array(plain.get_layer("hidden").kernel)]
    for i in (0, 8):
        plain.train_on_batch(x[i : i + 8], y[i : i + 8])
        path.append(array(plain.get_layer("hidden").kernel))
    keras.utils.set_random_seed(0)
    model = captured(mlp(), kfac(use_ema=True, ema_momentum=0.75))
    fit(model, x, y)
    expected = 0.75 * path[1] + 0.25 * path[2]  # the average starts at the weights after the first step
    np.testing.assert_allclose(array(model.get_layer("hidden").kernel), expected, rtol=1e-5, atol=1e-7)


# Ways of training


@pytest.mark.parametrize("jit", [True, "auto"])
def test_compiled_by_xla_takes_the_same_steps(jit):
    assert_close(weights(trained(jit_compile=jit)), weights(trained()), tolerance=1e-4)


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


class Counting(keras_ngd.KFAC):
    """Counts how often Python runs through the step."""

    runs = 0

    def apply(self, grads, trainable_variables=None):
        self.runs += 1
        return super().apply(grads, trainable_variables)


def test_one_trace_per_fit():
    keras.utils.set_random_seed(0)
    optimizer = Counting(factor_interval=2, inverse_interval=4, interval_growth=None)
    model, (x, y) = captured(mlp(), optimizer), regression(32)
    fit(model, x, y, epochs=2)
    runs = optimizer.runs
    # TensorFlow traces a second time after the trace that creates the optimizer's variables.
    assert runs == 1 if JIT else runs <= 2
    fit(model, x, y, epochs=5, initial_epoch=2, validation_data=(x, y))
    model.predict(x, verbose=0)
    fit(model, x, y)
    assert optimizer.runs == runs
    assert optimizer.factor_updates == 12


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


# Models


def test_summary_lists_the_model_as_it_was(capsys):
    model = captured(mlp())
    fit(model, *regression())
    model.summary()
    printed = capsys.readouterr().out
    assert "hidden (Dense)" in printed
    assert "outputs (Dense)" in printed


def test_clone_of_a_captured_model():
    model, (x, y) = trained(), regression()
    clone = keras.models.clone_model(model)
    assert type(clone.get_layer("hidden")) is keras_ngd.layers.Dense
    assert clone.get_layer("hidden").statistics is not model.get_layer("hidden").statistics
    assert all(np.all(v == 0) for path, v in statistics(clone).items() if path.endswith("factor"))
    clone.set_weights(model.get_weights())
    assert_same(statistics(clone), statistics(model))
    before = weights(model)
    fit(compiled(clone, kfac()), x, y)
    assert clone.optimizer.factor_updates == STEPS
    assert_same(weights(model), before)
    fit(model, x, y)
    assert model.optimizer.factor_updates == 2 * STEPS


def test_copy_of_a_captured_model():
    model, (x, y) = trained(), regression()
    twin = copy.deepcopy(model)
    assert_same(statistics(twin), statistics(model))
    for each in (twin, model):
        fit(each, x, y)
    assert_same(weights(twin), weights(model))
    assert twin.optimizer.factor_updates == 2 * STEPS


def test_capture_after_compile():
    model, optimizer = mlp(), kfac()
    compiled(model, optimizer)
    keras_ngd.capture(model, optimizer)
    fit(model, *regression())
    assert optimizer.factor_updates == STEPS


def test_compiling_with_a_fresh_optimizer_opens_the_gates():
    model = trained(kfac(factor_interval=100))
    assert model.optimizer.factor_updates == 1
    gate = model.get_layer("hidden").statistics.gate
    assert float(array(gate)) == 0
    recorded = statistics(model)["hidden/statistics/output_factor"]

    second = kfac(factor_interval=100)
    compiled(model, second)
    x, y = regression()
    model.train_on_batch(x, y)
    assert second.factor_updates == 1
    rows = np.concatenate([x, np.ones((32, 1))], axis=1)
    factors = statistics(model)
    np.testing.assert_allclose(factors["hidden/statistics/input_factor"][0], rows.T @ rows / 32, rtol=1e-4, atol=1e-5)
    assert np.any(recorded != factors["hidden/statistics/output_factor"])
    fit(model, x, y)
    assert second.factor_updates == 1
    assert float(array(gate)) == 0


def test_two_models_two_optimizers():
    first, second, (x, y) = trained(kfac(factor_interval=2)), trained(), regression()
    fit(first, x, y)
    fit(second, x, y)
    assert first.optimizer.factor_updates == 4
    assert second.optimizer.factor_updates == 8


def test_custom_loop_with_gradients():
    """`optimizer.apply` called by hand, outside of any trainer."""
    keras.utils.set_random_seed(0)
    model, (x, y), optimizer = mlp(), regression(8), kfac()
    keras_ngd.capture(model, optimizer)
    optimizer.build(model.trainable_variables)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function
        def differentiate(x, y):
            with tf.GradientTape() as tape:
                loss = ops.mean(ops.square(model(x, training=True) - y))
            return tape.gradient(loss, [v.value for v in model.trainable_variables])

        for _ in range(2):
            optimizer.apply(differentiate(x, y), model.trainable_variables)
    else:
        import jax

        @jax.jit
        def step(trainable, state):
            def loss(values):
                return ops.mean(ops.square(model.stateless_call(values, [], x, training=True)[0] - y))

            return optimizer.stateless_apply(state, jax.grad(loss)(trainable), trainable)

        values = [v.value for v in model.trainable_variables], [v.value for v in optimizer.variables]
        for _ in range(2):
            values = step(*values)
        for variables, new in zip((model.trainable_variables, optimizer.variables), values, strict=True):
            for variable, value in zip(variables, new, strict=True):
                variable.assign(value)
    assert optimizer.factor_updates == 2
    keras.utils.set_random_seed(0)
    reference = captured(mlp())
    for _ in range(2):
        reference.train_on_batch(x, y)
    assert_close(weights(model), weights(reference))
