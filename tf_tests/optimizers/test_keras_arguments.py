"""The optimizer's arguments as Keras has them: configuration, precision, and those of SGD."""

import keras
import numpy as np
import pytest
from keras.optimizers.schedules import ExponentialDecay, PiecewiseConstantDecay

import keras_ngd
from tf_tests import paper
from tf_tests.small import (
    array,
    assert_close,
    captured,
    compiled,
    fit,
    kfac,
    mlp,
    policy,
    regression,
    statistics,
    trained,
    weights,
)

pytestmark = pytest.mark.neutral

STEPS = 4


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
