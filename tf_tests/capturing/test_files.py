"""Files of captured and of released models."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests.capturing.models import (
    BUILDERS,
    STEPS,
    named,
)
from tf_tests.small import (
    assert_same,
    captured,
    compiled,
    fit,
    kfac,
    mlp,
    regression,
    statistics,
    weights,
)

# Files


def test_weight_files_go_both_ways(tmp_path):
    model, plain, (x, y) = captured(mlp()), mlp(), regression()
    fit(model, x, y)
    model.save_weights(tmp_path / "captured.weights.h5")
    plain.load_weights(tmp_path / "captured.weights.h5")
    assert_same(weights(plain), weights(model))
    np.testing.assert_array_equal(plain.predict(x, verbose=0), model.predict(x, verbose=0))

    fit(compiled(plain, keras.optimizers.SGD(0.1)), x, y)
    uncompiled = mlp()
    uncompiled.set_weights(plain.get_weights())
    uncompiled.save_weights(tmp_path / "plain.weights.h5")
    recorded = statistics(model)
    model.load_weights(tmp_path / "plain.weights.h5")
    assert_same(weights(model), weights(plain))
    assert_same(statistics(model), recorded)
    fit(model, x, y)
    assert model.optimizer.factor_updates == 2 * STEPS

    plain.save_weights(tmp_path / "with_sgd.weights.h5")
    fresh = mlp()
    keras_ngd.capture(fresh, kfac())
    fresh.load_weights(tmp_path / "with_sgd.weights.h5")
    assert_same(weights(fresh), weights(plain))


@pytest.mark.parametrize("kind", ["sequential", "nested"])
def test_saved_captured_model_comes_back_captured(kind, tmp_path):
    build, names = BUILDERS[kind]
    model, (x, y) = captured(build()), regression()
    fit(model, x, y)
    model.save(tmp_path / "captured.keras")
    loaded = keras.models.load_model(tmp_path / "captured.keras")
    assert all(type(named(loaded, name)) is keras_ngd.layers.Dense for name in names)
    assert_same(weights(loaded), weights(model))
    assert_same(statistics(loaded), statistics(model))
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert loaded.optimizer.factor_updates == STEPS
    for each in (loaded, model):
        fit(each, x, y)
    assert loaded.optimizer.factor_updates == 2 * STEPS
    assert_same(weights(loaded), weights(model))


@pytest.mark.parametrize("kind", ["subclassed", "sub-layers"])
def test_saved_model_that_makes_its_own_layers_is_captured_again(kind, tmp_path):
    model, (x, y) = captured(BUILDERS[kind][0]()), regression()
    fit(model, x, y)
    model.save(tmp_path / "captured.keras")
    loaded = keras.models.load_model(tmp_path / "captured.keras", compile=False)
    captured(loaded)
    loaded.load_weights(tmp_path / "captured.keras")
    for each in (loaded, model):
        fit(each, x, y)
    assert loaded.optimizer.factor_updates == 2 * STEPS
    assert_same(weights(loaded), weights(model))
    assert_same(statistics(loaded), statistics(model))


def test_saved_released_model_knows_nothing_of_this_package(tmp_path):
    model, (x, y) = captured(mlp()), regression()
    fit(model, x, y)
    keras_ngd.release(model)
    assert type(model.optimizer) is keras.optimizers.SGD
    assert "keras_ngd" not in model.to_json()
    model.save(tmp_path / "released.keras")
    loaded = keras.models.load_model(tmp_path / "released.keras")
    assert type(loaded.get_layer("hidden")) is layers.Dense
    assert_same(weights(loaded), weights(model))
