"""What every captured kind of layer owes: a row for each kind, in `kinds.py`, a test for each obligation."""

import keras
import numpy as np
import pytest

import keras_ngd
from tf_tests import small
from tf_tests.layers.kinds import KINDS
from tf_tests.small import assert_close, assert_same, compiled, fit, policy, weights

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def make(kind, method="kfac", seed=0):
    """A captured and compiled model of a kind, and the report."""
    keras.utils.set_random_seed(seed)
    model, optimizer = kind.model(), small.METHODS[method]()
    report = keras_ngd.capture(model, optimizer, include=kind.include)
    return compiled(model, optimizer), report


def of_the_layer(model):
    """The weights of the layer `layer` that it trains."""
    return [v for v in model.get_layer("layer").trainable_variables if not hasattr(v, "keras_ngd_statistics")]


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


@every_kind
@pytest.mark.parametrize("method", small.METHODS)
def test_every_method_trains_it_and_resumes_bit_for_bit(kind, method, tmp_path):
    (model, _), (x, y) = make(kind, method), kind.data()
    if not kind.rows and method in ("skfac", "hylo"):
        with pytest.raises(ValueError, match="called several times"):
            fit(model, x, y)
        return
    before = [np.asarray(v) for v in of_the_layer(model)]
    fit(model, x, y)
    assert model.optimizer.skipped_statistics == model.optimizer.skipped_steps == 0
    for old, variable in zip(before, of_the_layer(model), strict=True):
        change = np.abs(np.asarray(variable) - old).max()
        assert 0 < change < np.inf, variable.path
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, resumed):
        fit(each, x, y)
    assert_same(weights(resumed), weights(model))


@every_kind
def test_it_is_cloned(kind):
    model, report = make(kind)
    clone = keras.models.clone_model(model)
    found = keras_ngd.capture(clone, small.METHODS["kfac"](), include=kind.include).captured
    # By their names: what is inside of a wrapper Keras builds before it is there, so that paths begin anew.
    assert [path.split("/")[-1] for path in found] == [path.split("/")[-1] for path in report.captured]


@every_kind
def test_it_trains_in_mixed_precision(kind):
    with policy("mixed_bfloat16"):
        (model, _), (x, y) = make(kind), kind.data()
        fit(model, x, y, epochs=2)
    assert model.optimizer.skipped_statistics == model.optimizer.skipped_steps == 0
    assert all(np.isfinite(value).all() for value in weights(model).values())


@every_kind
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="JAX compiles every step")
def test_it_is_compiled_by_xla(kind):
    results = {}
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        model, optimizer, (x, y) = kind.model(), small.METHODS["kfac"](), kind.data()
        keras_ngd.capture(model, optimizer, include=kind.include)
        fit(compiled(model, optimizer, jit_compile=jit_compile), x, y)
        results[jit_compile] = weights(model)
    assert_close(results[True], results[False], 1e-3)
