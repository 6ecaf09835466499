"""Interpolative decompositions, against the plain algorithm, their defining properties, and SciPy's."""

import functools

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import interpolative as scipy_interpolative

import keras_ngd
from keras_ngd.linalg import interpolative
from tf_tests import paper
from tf_tests.reference import low_rank as reference
from tf_tests.reference.running import close, run

EXACT = {"float32": 1e-6, "float64": 1e-14}
ROUNDING = {"float32": 1e-4, "float64": 1e-11}

# Few, since every size is compiled anew; the first and the last rank are among them.
SIZES = [(4, 1), (9, 5), (9, 9)]


@pytest.fixture(autouse=True)
def double_precision(float64):
    """Both precisions in this module."""


@functools.cache
def decomposition(rank):
    def decompose(matrices):
        lower, pivots, left = interpolative.pivoted_cholesky(matrices, rank)
        return lower, pivots, left, *interpolative.interpolative_decomposition(matrices, rank)

    return decompose


def decompose(matrices, rank):
    """`L`, its pivots and what is left; `S`, `P` and `R`."""
    return run(decomposition(rank), matrices)


def gram(kind, size, rng):
    """A positive semi-definite matrix, `(A A^T) o (G G^T)`."""
    a, g = rng.standard_normal((size, 6)), rng.standard_normal((size, 3))
    if kind == "scaled":
        a *= np.logspace(0, -4, size)[:, None]
    if kind == "repeated":
        which = rng.integers(max(size // 2, 1), size=size)
        a, g = a[which], g[which]
    if kind == "some zero":
        a[rng.random(size) < 0.5] = 0
    if kind == "all zero":
        g[:] = 0
    if kind == "rank one":
        a, g = a[:1] * rng.standard_normal((size, 1)), np.ones_like(g)
    if kind == "tiny":
        a *= 1e-12
    return reference.kernel(a, g)


KINDS = ("random", "scaled", "repeated", "some zero", "all zero", "rank one", "tiny")


@given(
    st.sampled_from(SIZES), st.tuples(*[st.sampled_from(KINDS)] * 2), st.sampled_from(list(EXACT)), st.integers(0, 999)
)
def test_what_defines_an_interpolative_decomposition(sizes, kinds, dtype, seed):
    """Of whatever matrices: `P[S] = I`, `S` distinct, and `Q = P Q_SS P^T + R` with `R >= 0`, zero at `S`."""
    size, rank = sizes
    rng = np.random.default_rng(seed)
    matrices = np.stack([gram(kind, size, rng) for kind in kinds]).astype(dtype)
    lower, pivots, left, chosen, p, residual = decompose(matrices, rank)
    assert {t.dtype.name for t in (lower, p, residual)} == {dtype}
    assert (lower.shape, p.shape, residual.shape) == ((2, size, rank), (2, size, rank), (2, size, size))
    np.testing.assert_array_equal(pivots, chosen)
    np.testing.assert_array_equal(left, residual)
    # What rank is exhausted at is left out of `L` and not in `R`.
    rounding, exhausted = 10 * EXACT[dtype], {"float32": 1e-6, "float64": 1e-12}[dtype]
    for q, s, lower_of, p_of, r in zip(matrices.astype("float64"), chosen, lower, p, residual, strict=True):
        largest = np.abs(q).max()
        assert len(set(s.tolist())) == rank
        assert all(0 <= i < size for i in s)
        assert np.isfinite(lower_of).all()
        assert np.isfinite(p_of).all()
        np.testing.assert_array_equal(p_of[s], np.eye(rank))
        assert not r[s].any()
        assert not r[:, s].any()
        assert np.linalg.eigvalsh(r.astype("float64")).min() >= -(rounding + exhausted) * largest
        assert np.abs(lower_of @ lower_of.T + r - q).max() <= (rounding + size * exhausted) * largest
        kept = p_of.astype("float64") @ q[np.ix_(s, s)] @ p_of.T.astype("float64")
        growth = max(1, np.abs(p_of).max()) ** 2 * size**2
        assert np.abs(kept + r - q).max() <= (rounding + exhausted) * growth * largest


@given(st.sampled_from(["random", "scaled"]), st.integers(0, 999))
def test_the_pivots_and_combinations_of_the_plain_algorithm(kind, seed):
    size, rank = 9, 5
    matrix = gram(kind, size, np.random.default_rng(seed))
    found_lower, found_pivots, _, chosen, p, residual = (t[0] for t in decompose(np.stack([matrix, matrix]), rank))
    lower, pivots = reference.pivoted_cholesky(matrix, rank)
    np.testing.assert_array_equal(found_pivots, pivots)
    close(found_lower, lower, 1e-10)
    expected = reference.combinations(matrix, chosen)
    np.testing.assert_allclose(p, expected, atol=1e-7 * np.abs(expected).max())
    np.testing.assert_allclose(residual, matrix - expected @ matrix[chosen], atol=1e-10 * np.abs(matrix).max())


@pytest.mark.parametrize("dtype", EXACT)
def test_repeated_rows_are_chosen_once(dtype):
    """No rank is spent on a row that is there already; nothing is left, and every row is one of the chosen."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3, 8))
    which = np.array([0, 1, 1, 2, 0, 2, 2, 1, 0])
    matrix = (rows @ rows.T)[np.ix_(which, which)].astype(dtype)
    *_, chosen, p, residual = (t[0] for t in decompose(np.stack([matrix, matrix]), 5))
    assert set(which[chosen[:3]]) == {0, 1, 2}
    expected = np.where(np.arange(5) < 3, which[:, None] == which[chosen][None], 0)
    expected[chosen] = np.eye(5)
    np.testing.assert_allclose(p, expected, atol=100 * EXACT[dtype])
    np.testing.assert_allclose(residual, 0, atol=100 * EXACT[dtype])


def test_nan_stays_where_it_is():
    """One block of a batch spoils no other, and its indices are still indices."""
    matrices = np.stack([gram("random", 9, np.random.default_rng(i)) for i in range(2)])
    good = decompose(matrices, 5)
    matrices[0, 4, 4] = np.nan
    broken = decompose(matrices, 5)
    for expected, found in zip(good, broken, strict=True):
        np.testing.assert_array_equal(found[1], expected[1])
    assert all(0 <= i < 9 for i in broken[3][0])


# On a network


def kernel_matrices_in_training(examples=100):
    """`Q` of every layer of a small network on digits, before, during and at the end of a few epochs."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    layers = [keras.layers.Dense(units, activation="tanh", dtype="float32") for units in (32, 24)]
    model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Dense(10, dtype="float32")])
    keras_ngd.capture(model, paper.SNGD(batch_size=examples))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(0.3, momentum=0.9), loss=loss)
    found = {}
    for stage, epochs in ("init", 0), ("early", 1), ("late", 8):
        if epochs:
            model.fit(x[examples:1300], y[examples:1300], batch_size=examples, epochs=epochs, verbose=0)
        # Any plain optimizer has the statistics of its last batch recorded.
        model.train_on_batch(x[:examples], y[:examples])
        for layer in model.layers:
            a, g = (np.asarray(t, "float64")[0] for t in layer.statistics.averages)
            found[stage, layer.name] = reference.kernel(a, g)
    return found


@pytest.mark.slow
def test_no_more_than_twice_the_error_of_scipys_on_a_network():
    """Which is of a pivoted QR decomposition of `Q`, free of a residual that is positive semi-definite."""
    matrices = kernel_matrices_in_training()
    assert len(matrices) == 9
    stacked, ratios = np.stack(list(matrices.values())), {}
    for rank in (5, 10, 25, 50):
        *_, chosen, p, residual = decompose(stacked, rank)
        for key, q, s, p_of, r in zip(matrices, stacked, chosen, p, residual, strict=True):
            found = np.linalg.norm(q - p_of @ q[s])
            close(np.linalg.norm(r) / np.linalg.norm(q), found / np.linalg.norm(q), 1e-6)
            order, projection = scipy_interpolative.interp_decomp(q, rank, rand=False)
            skeleton = scipy_interpolative.reconstruct_skel_matrix(q, rank, order)
            other = np.linalg.norm(q - scipy_interpolative.reconstruct_matrix_from_id(skeleton, order, projection))
            ratios[(*key, rank)] = found / other
    worst = max(ratios, key=ratios.get)
    assert ratios[worst] <= 2, f"{ratios[worst]:.2f} times SciPy's error at {worst}"
