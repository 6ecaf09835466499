"""What every captured kind of layer owes: a row for each kind, in `kinds.py`, a test for each obligation."""

import keras
import numpy as np
import pytest

import keras_ngd
from tf_tests import small
from tf_tests.layers.kinds import GROUPS, KINDS, group
from tf_tests.small import array, assert_close, compiled, fit, policy, weights

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_group = pytest.mark.parametrize("kinds", [group(name) for name in GROUPS], ids=GROUPS)


def make(kinds, method="kfac", seed=0):
    """A captured and compiled model of a group of kinds."""
    keras.utils.set_random_seed(seed)
    model, optimizer = kinds.model(), small.METHODS[method]()
    keras_ngd.capture(model, optimizer, include=kinds.include)
    return compiled(model, optimizer)


def of_the_layers(model):
    """By path, the weights of the layers `layer` of a group's kinds that they train."""
    found = [v for v in model.trainable_variables if "layer/" in v.path and not hasattr(v, "keras_ngd_statistics")]
    return {v.path: array(v) for v in found}


def own_weights(model):
    """All weights but those of statistics, in their order."""
    return [array(v) for v in model.weights if not hasattr(v, "keras_ngd_statistics")]


def test_every_kind_is_in_a_group():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(KINDS)


@every_kind
def test_it_is_captured_and_computes_what_the_plain_one_does(kind):
    keras.utils.set_random_seed(0)
    model, (x, _) = kind.model(), kind.data()
    plain = model(x, training=True)
    report = keras_ngd.capture(model, small.METHODS["kfac"](), include=kind.include)
    layer = [f"layer/{part}" for part in kind.parts] if kind.parts else ["layer"]
    assert report.captured == [*layer, "outputs"], report
    np.testing.assert_allclose(model(x, training=True), plain, rtol=1e-5, atol=1e-6)
    names, results = [v.path for v in model.weights], model.predict(x, verbose=0)
    keras_ngd.release(model)
    assert [v.path for v in model.weights] == [name for name in names if "statistics" not in name]
    np.testing.assert_allclose(model.predict(x, verbose=0), results, rtol=1e-5, atol=1e-6)


# What methods on factors, on rows, on each example's gradient, and on steps ask of a geometry; one group has all methods.
METHODS = ["kfac", "hylo", "ekfac_examples", "eigen_adam"]


@pytest.mark.parametrize(
    ("kinds", "method"),
    [
        pytest.param(
            group(name),
            method,
            id=f"{name}-{method}",
            marks=[]
            if method in ("kfac", "eigen_adam") or (name, method) == ("matrices", "hylo")
            else pytest.mark.neutral,
        )
        for name in GROUPS
        for method in (small.METHODS if name == "matrices" else METHODS)
    ],
)
def test_every_method_trains_them_and_resumes_bit_for_bit(kinds, method, tmp_path):
    model, (x, y) = make(kinds, method), kinds.data()
    if not kinds.rows and method in ("skfac", "hylo"):
        with pytest.raises(ValueError, match="called several times"):
            fit(model, x, y)
        return
    before = of_the_layers(model)
    fit(model, x, y)
    assert model.optimizer.skipped_statistics == model.optimizer.skipped_steps == 0
    after = of_the_layers(model)
    assert {path.split("/")[0] for path in after} == set(kinds.kinds)
    for path, old in before.items():
        assert 0 < np.abs(after[path] - old).max() < np.inf, path
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, resumed):
        fit(each, x, y)
    # By their order: Keras builds layers of loaded models outside of the scopes that paths are of.
    for found, expected in zip(own_weights(resumed), own_weights(model), strict=True):
        np.testing.assert_array_equal(found, expected)


@every_group
def test_they_are_cloned(kinds):
    model = kinds.model()
    # By their names: what is inside of a wrapper Keras builds before it is there, so that paths begin anew.
    names = [
        [
            path.split("/")[-1]
            for path in keras_ngd.capture(each, small.METHODS["kfac"](), include=kinds.include).captured
        ]
        for each in (model, keras.models.clone_model(model))
    ]
    assert names[0] == names[1]
    assert len(names[0]) == sum(max(len(kind.parts), 1) + 1 for kind in kinds.kinds.values())


@every_group
def test_they_train_in_mixed_precision(kinds):
    with policy("mixed_bfloat16"):
        model, (x, y) = make(kinds), kinds.data()
        fit(model, x, y, epochs=2)
    assert model.optimizer.skipped_statistics == model.optimizer.skipped_steps == 0
    assert all(np.isfinite(value).all() for value in weights(model).values())


@pytest.mark.parametrize("kinds", [group("tables"), group("loops")], ids=["tables", "loops"])
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="JAX compiles every step")
def test_they_are_compiled_by_xla(kinds):
    results = {}
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        model, optimizer, (x, y) = kinds.model(), small.METHODS["kfac"](), kinds.data()
        keras_ngd.capture(model, optimizer, include=kinds.include)
        fit(compiled(model, optimizer, jit_compile=jit_compile), x, y)
        results[jit_compile] = weights(model)
    assert_close(results[True], results[False], 1e-3)
