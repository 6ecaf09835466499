"""Errors of HyLo's preconditioned gradient against SNGD's."""

import numpy as np
import pytest

from keras_ngd.analysis import gradient_error
from keras_ngd.analysis.gradient_errors import ErrorMeasurement
from keras_ngd.analysis.layer_rows import LayerRows, layer_rows
from tf_tests.small import assert_same, compiled, mlp, regression, weights

BATCH = 12
RANKS = (2, 0.5, BATCH)


def measurement(damping=None, relative_damping=0.1, ranks=RANKS, samplings=("priority", "paper"), draws=3, seed=0):
    return ErrorMeasurement(damping, relative_damping, ranks, samplings, None, draws, seed)


@pytest.fixture(scope="module")
def rows():
    """A dense layer's rows, and another's, whose gradient is not all in their span."""
    rng = np.random.default_rng(0)
    a, g = rng.normal(size=(BATCH, 5)), rng.normal(size=(BATCH, 4)) * np.logspace(0, -1, 4)
    v = a.T @ g
    arrays = [[a, g, v], [a[:, :3] ** 2, 5 * g, v[:3] + rng.normal(size=(3, 4))]]
    return [LayerRows(f"layer{i}", *(t.astype("float32") for t in ts)) for i, ts in enumerate(arrays)]


@pytest.fixture(scope="module")
def found(rows):
    return measurement()(rows)


def outer_products(layer):
    a, g = layer.a.astype("float64"), layer.g.astype("float64")
    return np.einsum("ni,no->nio", a, g).reshape(len(a), -1)


def sngd(layer, damping):
    u = outer_products(layer)
    return np.linalg.solve(u.T @ u + damping * np.eye(u.shape[1]), layer.v.astype("float64").ravel())


def kid(layer, damping, rank):
    """HyLo, eq. 8, with the longest columns for pivots, for which its core is `P^T (Q + damping I)^-1 P`."""
    u = outer_products(layer)
    q = u @ u.T
    left, chosen = q.copy(), []
    for _ in range(rank):
        pivot = int(np.argmax(np.linalg.norm(left, axis=0)))
        chosen.append(pivot)
        left = left - np.outer(left[pivot], left[pivot]) / left[pivot, pivot]
    p = q[:, chosen] @ np.linalg.inv(q[np.ix_(chosen, chosen)])
    core = p.T @ np.linalg.inv(q + damping * np.eye(len(q))) @ p
    v, us = layer.v.astype("float64").ravel(), u[chosen]
    return (v - us.T @ core @ us @ v) / damping


def test_errors_are_those_of_dense_matrices(rows, found):
    damping = [0.1 * np.linalg.eigvalsh(layer.kernel())[-1] for layer in rows]
    np.testing.assert_allclose(found.dampings, damping)
    exact = [sngd(layer, d) for layer, d in zip(rows, damping, strict=True)]
    for j, rank in enumerate((2, 6)):
        for i, (layer, d, p) in enumerate(zip(rows, damping, exact, strict=True)):
            error = np.linalg.norm(kid(layer, d, rank) - p) / np.linalg.norm(p)
            np.testing.assert_allclose(found.errors[0, j, i], error, rtol=1e-3)
    without = [layer.v.ravel() / d - p for layer, d, p in zip(rows, damping, exact, strict=True)]
    lengths = [np.linalg.norm(p) for p in exact]
    np.testing.assert_allclose(
        found.without, [np.linalg.norm(w) / length for w, length in zip(without, lengths, strict=True)]
    )
    np.testing.assert_allclose(found.total_without, np.linalg.norm(np.concatenate(without)) / np.hypot(*lengths))
    totals = np.linalg.norm(found.errors[0] * lengths, axis=1) / np.hypot(*lengths)
    np.testing.assert_allclose(found.totals[0], totals, rtol=1e-6)


def test_all_rows_leave_no_error_and_more_rows_less(found):
    assert found.methods == ("KID", "KIS priority", "KIS paper")
    assert found.ranks == (2, 6, 12)
    assert found.errors.shape == (3, 3, 2)
    assert found.errors[:, 2].max() < 1e-5
    assert found.totals[:, 2].max() < 1e-5
    assert np.all(np.diff(found.errors[0], axis=0) < 0)
    assert np.all(found.errors[:, 0] > 1e-3)


def test_rows_that_repeat_need_not_be_kept(rows):
    [layer] = rows[:1]
    few = LayerRows(layer.layer, *(np.tile(t[:3], (4, 1)) for t in (layer.a, layer.g)), layer.v)
    assert measurement(ranks=(3,), samplings=())([few]).totals.max() < 1e-4


def test_draws_follow_the_seed(rows, found):
    first, again, other = (measurement(ranks=(2,), samplings=("priority",), seed=seed)(rows) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.errors, again.errors)
    np.testing.assert_allclose(first.errors[1, 0], found.errors[1, 0], rtol=1e-5)
    assert np.all(first.errors[0] == other.errors[0])
    assert np.all(first.errors[1] != other.errors[1])


def test_layers_without_gradients_have_no_errors(rows):
    [layer] = rows[:1]
    nothing = LayerRows("nothing", layer.a, 0 * layer.g, 0 * layer.v)
    result = measurement(ranks=(2,), samplings=("priority",))([nothing, layer])
    np.testing.assert_array_equal(result.errors[:, 0, 0], 0)
    assert result.without[0] == 0
    np.testing.assert_allclose(result.totals, result.errors[:, :, 1], rtol=1e-5)


def test_on_a_model(tmp_path):
    x, y = regression(examples=BATCH)
    model = compiled(mlp(), "sgd")
    before = weights(model)
    result = gradient_error(model, x, y, damping=0.02, ranks=(2,), draws=2)
    assert_same(weights(model), before)
    assert result.layers == ("hidden", "outputs")
    np.testing.assert_array_equal(result.dampings, 0.02)
    for layer, error in zip(layer_rows(model, x, y), result.without, strict=True):
        p = sngd(layer, 0.02)
        np.testing.assert_allclose(error, np.linalg.norm(layer.v.ravel() / 0.02 - p) / np.linalg.norm(p), rtol=1e-4)
    assert str(result).count("all layers") == 3
    result.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": None}, "not compiled with a loss"),
        ({"y": None}, "`y` must be one batch"),
        ({"damping": 0}, "`damping`"),
        ({"relative_damping": -1.0}, "`relative_damping`"),
        ({"ranks": ()}, "`ranks` must be a list of at least one"),
        ({"ranks": 0.1}, "`ranks` must be a list"),
        ({"ranks": (0.1, 1.5)}, "`rank` must be an int from 1 to the batch size"),
        ({"ranks": (40,)}, "`rank` must not exceed the batch size"),
        ({"samplings": "priority"}, "`samplings` must be a list"),
        ({"samplings": ("uniform",)}, "`samplings` must be among"),
        ({"power": 0}, "`power`"),
        ({"draws": 0}, "`draws`"),
        ({"seed": -1}, "`seed`"),
        ({"losses_per_example": 0}, "`losses_per_example`"),
    ],
)
def test_bad_arguments(arguments, message):
    x, y = regression(examples=8)
    with pytest.raises(ValueError, match=message):
        gradient_error(**{"model": mlp(), "x": x, "y": y, "loss": "mse", **arguments})
