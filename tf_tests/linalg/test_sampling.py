"""Drawing rows: what a weighted sample is on average, and where it is exact."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_ngd.linalg import sampling
from tf_tests.reference.running import close, run

ROWS, RANK, DRAWS = 8, 3, 20_000


@functools.cache
def drawer(rank, kind):
    return lambda probabilities, uniform: sampling.draw(probabilities, rank, uniform, kind)


def draw(probabilities, rank, kind, seed=0):
    """Indices and weights, of numbers drawn by NumPy."""
    count, rows = probabilities.shape
    uniform = np.random.default_rng(seed).uniform(1e-7, 1, (count, rank if kind == "replacement" else rows))
    return run(drawer(rank, kind), probabilities.astype("float32"), uniform.astype("float32"))


def scattered(chosen, weights, rows):
    """The weight that each row has in each draw."""
    total = np.zeros((len(chosen), rows))
    for column in range(chosen.shape[1]):
        total[np.arange(len(chosen)), chosen[:, column]] += weights[:, column]
    return total


def probabilities(zeros=()):
    p = np.arange(1.0, ROWS + 1) ** 2
    p[list(zeros)] = 0
    return p / p.sum()


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_importance_is_the_size_of_the_outer_product(power):
    rng = np.random.default_rng(0)
    a, g = rng.standard_normal((2, 6, 4)), rng.standard_normal((2, 6, 3))
    a[0, 2] = 0
    g[1] = 0
    found = run(lambda a, g: sampling.importance(a, g, power), a.astype("float32"), g.astype("float32"))
    sizes = np.linalg.norm(np.einsum("kni,kno->knio", a, g).reshape(2, 6, -1), axis=2) ** power
    close(found[0], sizes[0] / sizes[0].sum(), 1e-6)
    assert found[0, 2] == 0
    assert not found[1].any()


def test_importance_neither_overflows_nor_vanishes():
    a, g = np.ones((2, 2, 3), "float32"), np.ones((2, 2, 3), "float32")
    for k, scale in enumerate((1e-8, 1e8)):
        a[k], g[k] = a[k] * scale, g[k] * scale
    found = run(lambda a, g: sampling.importance(a, g, 2.0), a, g)
    close(found, np.full((2, 2), 0.5), 1e-6)


@pytest.mark.parametrize("kind", ["priority", "replacement"])
def test_weighted_sums_are_unbiased(kind):
    """On average every row has the weight one, to four standard errors; rows that cannot be drawn have none."""
    p = probabilities(zeros=[2])
    chosen, weights = draw(np.tile(p, (DRAWS, 1)), RANK, kind)
    found = scattered(chosen, weights, ROWS)
    errors = found.std(axis=0) / np.sqrt(DRAWS)
    assert np.all(np.abs(found.mean(axis=0) - (p > 0)) <= 4 * errors)
    assert np.all(errors[p > 0] > 0)
    assert np.all(errors < 0.1)


def test_the_paper_draws_in_proportion_and_weights_nothing():
    p = probabilities(zeros=[2])
    chosen, weights = draw(np.tile(p, (DRAWS, 1)), RANK, "paper")
    first = np.bincount(chosen[:, 0], minlength=ROWS) / DRAWS
    assert np.all(np.abs(first - p) <= 4 * np.sqrt(p / DRAWS))
    # The second of what the first left.
    after_last = chosen[chosen[:, 0] == ROWS - 1, 1]
    rest = np.where(np.arange(ROWS) == ROWS - 1, 0, p) / (1 - p[-1])
    second = np.bincount(after_last, minlength=ROWS) / len(after_last)
    assert np.all(np.abs(second - rest) <= 4 * np.sqrt(rest / len(after_last)))
    assert set(np.unique(weights)) == {1.0}


def test_priority_varies_less_than_replacement():
    p = probabilities()
    spread = {}
    for kind in ("priority", "replacement"):
        chosen, weights = draw(np.tile(p, (2000, 1)), RANK, kind)
        spread[kind] = (scattered(chosen, weights, ROWS) * p).std(axis=0).sum()
    assert spread["priority"] < spread["replacement"]


@given(st.sampled_from(["priority", "paper"]), st.sets(st.integers(0, ROWS - 1)), st.integers(0, 999))
def test_samples_without_replacement(kind, zeros, seed):
    """Distinct rows, and exact where all rows are drawn, or all that are not zero."""
    p = probabilities(zeros) if len(zeros) < ROWS else np.zeros(ROWS)
    for rank in (RANK, ROWS):
        chosen, weights = (t[0] for t in draw(p[None], rank, kind, seed))
        assert len(set(chosen.tolist())) == rank
        assert all(0 <= i < ROWS for i in chosen)
        assert np.isfinite(weights).all()
        np.testing.assert_array_equal(weights > 0, p[chosen] > 0)
        if np.sum(p > 0) <= rank:
            assert set(chosen[weights > 0]) == set(np.flatnonzero(p))
            np.testing.assert_allclose(weights[weights > 0], 1, rtol=1e-6)


@given(st.sets(st.integers(0, ROWS - 1)), st.integers(0, 999))
def test_replacement_never_weights_a_row_of_zeros(zeros, seed):
    p = probabilities(zeros) if len(zeros) < ROWS else np.zeros(ROWS)
    chosen, weights = (t[0] for t in draw(p[None], 5, "replacement", seed))
    assert all(0 <= i < ROWS for i in chosen)
    if len(zeros) < ROWS:
        np.testing.assert_allclose(weights, 1 / (5 * p[chosen]), rtol=1e-5)
    else:
        assert not weights.any()


@pytest.mark.parametrize("kind", sampling.SAMPLINGS)
def test_the_smallest_and_the_largest_numbers(kind):
    """The ends of what `backend.uniform` draws."""
    for value in (1e-7, 1 - 2.0**-24):
        p, uniform = probabilities().astype("float32")[None], np.full((1, ROWS), value, "float32")
        chosen, weights = run(drawer(RANK, kind), p, uniform[:, : RANK if kind == "replacement" else ROWS])
        assert np.isfinite(weights).all()
        assert np.all(weights > 0)
        assert all(0 <= i < ROWS for i in chosen[0])
