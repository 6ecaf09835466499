"""What the methods in eigenbases owe where there is little in a factor, or nothing finite in a batch."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests.small import array, assert_same, captured, compiled, fit, mlp, regression, weights

EACH = {"factor_interval": 1, "inverse_interval": 1, "basis_tolerance": 0.0}
METHODS = {
    "ekfac": lambda: keras_ngd.EKFAC(0.01, momentum=0.0, **EACH),
    "ekfac-examples": lambda: keras_ngd.EKFAC(0.01, momentum=0.0, scale="examples", **EACH),
    "eigen-adam": lambda: keras_ngd.EigenAdam(0.01, **EACH),
    "soap": lambda: keras_ngd.EigenAdam(0.01, basis="gradient", **EACH),
}
every_method = pytest.mark.parametrize("method", METHODS)


def prepared(method, model):
    return (compiled if method == "soap" else captured)(model, METHODS[method]())


def everything(model):
    """Weights, statistics and moments; not what counts steps and what was skipped."""
    optimizer = model.optimizer
    curvatures = [variable for curvature in optimizer.basis_curvatures() for variable in curvature.variables]
    return {f"{i} {v.path}": array(v) for i, v in enumerate([*model.weights, *curvatures])}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "soap"])
def test_a_batch_that_is_not_finite_leaves_all_as_it_was(method):
    # Without momentum, with which steps go on.
    x, y = regression(24)
    model = prepared(method, mlp())
    fit(model, x[:16], y[:16])
    before = everything(model)
    bad = x[16:].copy()
    bad[3, 1] = np.nan
    fit(model, bad, y[16:])
    assert_same(everything(model), before)
    assert model.optimizer.skipped_steps == 1
    assert model.optimizer.failed_bases == 0
    fit(model, x[:16], y[:16])
    after = everything(model)
    assert all(np.isfinite(v).all() for v in after.values())
    assert any(not np.array_equal(after[name], before[name]) for name in before)


@every_method
def test_factors_of_one_number_of_rank_one_and_of_zeros(method):
    """One example a step; a layer of one weight; and units that no input reaches."""
    inputs = keras.Input((1,))
    keras.utils.set_random_seed(0)
    one = layers.Dense(1, use_bias=False, name="one")(inputs)
    unreached = layers.Dense(3, activation="relu", bias_initializer=lambda *a, **k: -100 * np.ones(3), name="unreached")
    wide = layers.Dense(5, activation="tanh", name="wide")(one)
    both = layers.Concatenate()([wide, unreached(one)])
    model = prepared(method, keras.Model(inputs, layers.Dense(1, name="outputs")(both)))
    before = weights(model)
    x = np.random.default_rng(0).normal(size=(6, 1)).astype("float32")
    model.fit(x, np.sin(x), batch_size=1, shuffle=False, verbose=0)
    after = weights(model)
    assert all(np.isfinite(v).all() for v in everything(model).values())
    assert model.optimizer.skipped_steps == model.optimizer.failed_bases == 0
    for name in before:
        changed = not np.array_equal(after[name], before[name])
        assert changed == (not name.startswith("unreached")), name
    for curvature in model.optimizer.basis_curvatures():
        for basis in curvature.variables[: len(curvature.with_bases)]:
            q = array(basis)
            np.testing.assert_allclose(
                np.swapaxes(q, -1, -2) @ q, np.broadcast_to(np.eye(q.shape[-1]), q.shape), atol=1e-5
            )
