"""What Keras does with models whose optimizer is ours: summaries, copies, compiling again, loops of one's own."""

import copy

import numpy as np

import keras_ngd
from tf_tests.small import (
    array,
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


# Models


def test_summary_lists_the_model_as_it_was(capsys):
    model = captured(mlp())
    fit(model, *regression())
    model.summary()
    printed = capsys.readouterr().out
    assert "hidden (Dense)" in printed
    assert "outputs (Dense)" in printed


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
