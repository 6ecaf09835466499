"""Damping in units of the mean eigenvalue of all layers' Fisher blocks."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests import small
from tf_tests.reference import kronecker, rows
from tf_tests.reference.running import close

pytestmark = pytest.mark.neutral

BATCH = 8
EACH = {"factor_interval": 1, "inverse_interval": 1, "momentum": 0.0, "fisher_scale": None, "loss_clip": None}
METHODS = {
    "KFAC": lambda **a: keras_ngd.KFAC(1.0, **EACH, **a),
    "eigenvectors": lambda **a: keras_ngd.KFAC(1.0, inverse="eigen", **EACH, **a),
    "THOR": lambda **a: keras_ngd.THOR(1.0, split=None, **EACH, **a),
    "SKFAC": lambda **a: keras_ngd.SKFAC(
        1.0, batch_size=BATCH, interval=1, **{k: v for k, v in EACH.items() if "interval" not in k}, **a
    ),
}


def network(scale):
    """Two linear layers, of which the first sees inputs that are so many times as large."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    hidden = layers.Dense(3, name="hidden")(scale * inputs)
    return keras.Model(inputs, layers.Dense(2, name="outputs")(hidden))


def blocks(model, x, y, scale):
    """For each layer `A`, `G` and `V` of a squared error, in float64."""
    w0, b0, w1, b1 = (small.array(v).astype("float64") for v in model.trainable_variables)
    inputs = scale * x.astype("float64")
    hidden = inputs @ w0 + b0
    upstream = 2 * (hidden @ w1 + b1 - y) / y.size
    found = []
    for a, g in ((inputs, upstream @ w1.T), (hidden, upstream)):
        a, g = rows.append_ones(rows.dense_rows(a)), rows.dense_rows(g)
        found.append(
            (kronecker.input_factor(a)[0], kronecker.output_factor(g, BATCH)[0], np.einsum("knti,knto->io", a, g))
        )
    return found


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(BATCH, 4)).astype("float32"), rng.normal(size=(BATCH, 2)).astype("float32")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_step(method, scale):
    model, (x, y), damping = network(scale), data(), 0.3
    found = blocks(model, x, y, scale)
    mean = sum(np.trace(a) * np.trace(g) for a, g, _ in found) / sum(v.size for *_, v in found)
    variables = list(model.trainable_variables)
    before = [small.array(v) for v in variables]
    small.captured(model, METHODS[method](damping=damping, damping_mode="global"))
    small.fit(model, x, y)
    steps = [old - small.array(v) for old, v in zip(before, variables, strict=True)]
    for (a, g, v), step in zip(found, (steps[:2], steps[2:]), strict=True):
        expected = kronecker.dense_preconditioned(a, g, v, damping * mean)
        close(np.concatenate([step[0], step[1][None]]), expected, 1e-3)
    np.testing.assert_allclose(small.array(model.optimizer.damping_unit.variables[0]), mean, rtol=1e-4)


def test_layers_without_curvature_do_not_count():
    """A layer that no gradient reaches has none, and the mean is that of the others."""
    x, y = data()
    means = []
    for dead in (False, True):
        keras.utils.set_random_seed(3)
        inputs = keras.Input((4,))
        outputs = layers.Dense(2, name="outputs")(inputs)
        if dead:
            outputs = outputs + 0.0 * layers.Dense(2, name="dead")(inputs)
        model = small.captured(keras.Model(inputs, outputs), METHODS["KFAC"]())
        small.fit(model, x, y)
        means.append(float(small.array(model.optimizer.damping_unit.variables[0])))
    np.testing.assert_allclose(*means, rtol=1e-5)


def test_a_model_without_any_curvature_is_left_as_it_is():
    x, _ = data()
    inputs = keras.Input((4,))
    model = small.captured(keras.Model(inputs, 0.0 * layers.Dense(2)(inputs)), METHODS["KFAC"]())
    before = small.weights(model)
    small.fit(model, x, np.zeros((BATCH, 2), "float32"))
    small.assert_close(small.weights(model), before, 0.0)
    assert float(small.array(model.optimizer.damping_unit.variables[0])) == 1.0


def test_other_dampings_have_no_unit():
    for arguments in ({"damping": 0.1}, {"damping_mode": "relative"}):
        model = small.captured(network(1.0), METHODS["KFAC"](**arguments))
        small.fit(model, *data())
        assert model.optimizer.damping_unit.variables == []
