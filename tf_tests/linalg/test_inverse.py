"""Inverses of factors, and what happens to factors that cannot be inverted."""

import numpy as np
import pytest

from keras_ngd import backend
from keras_ngd.linalg import inverse, newton_schulz
from tf_tests.reference.running import close, run


def by_cholesky(matrices, damping, previous):
    return inverse.damped_inverse(matrices, damping, previous, "cholesky")


def by_newton_schulz(matrices, damping, previous):
    return inverse.damped_inverse(matrices, damping, previous, "newton-schulz")


def by_products_alone(matrices, damping, previous):
    with backend.compiling_for("TPU"):
        return inverse.damped_inverse(matrices, damping, previous, "newton-schulz")


METHODS = {"cholesky": by_cholesky, "newton-schulz": by_newton_schulz, "newton-schulz on TPUs": by_products_alone}


def factors(count, size, rank=None, seed=0, dtype="float32"):
    """Random positive semi-definite matrices with eigenvalues of order one."""
    rows = np.random.default_rng(seed).standard_normal((count, rank or 4 * size, size))
    return (np.swapaxes(rows, 1, 2) @ rows / rows.shape[1]).astype(dtype)


def shifted(matrices, values):
    return matrices.astype("float64") + np.reshape(values, (-1, 1, 1)) * np.eye(matrices.shape[-1])


def damped_inverse(matrices, damping, previous, method, xla=False):
    damping = np.asarray(damping, matrices.dtype)
    result = run(METHODS[method], matrices, damping, previous, xla=xla)
    np.testing.assert_allclose(result, np.swapaxes(result, 1, 2), atol=1e-6 * np.abs(result).max())
    return result


def identities(count, size):
    return np.broadcast_to(np.eye(size, dtype="float32"), (count, size, size)).copy()


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_cholesky_inverse(size):
    matrices = shifted(factors(3, size), [0.1, 0.2, 0.3]).astype("float32")
    close(run(inverse.cholesky_inverse, matrices), np.linalg.inv(matrices.astype("float64")), 1e-5)


@pytest.mark.parametrize("matrix", [[[0.0]], [[-1.0]], [[1.0, 2.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
def test_cholesky_inverse_of_an_indefinite_matrix_is_nan(matrix):
    good = np.eye(len(matrix)) * 2
    bad, other = run(inverse.cholesky_inverse, np.array([matrix, good], "float32"))
    assert np.isnan(bad).any()
    close(other, good / 4, 1e-6)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_newton_schulz_inverse(size):
    old = shifted(factors(3, size), 0.3 * np.ones(3))
    new = 0.9 * old + 0.1 * shifted(factors(3, size, seed=1), 0.3 * np.ones(3))
    result, accepted = run(
        newton_schulz.newton_schulz_inverse, new.astype("float32"), np.linalg.inv(old).astype("float32")
    )
    assert accepted.all()
    close(result, np.linalg.inv(new), 1e-5)


def test_newton_schulz_needs_few_products_where_the_start_is_good():
    """From the inverse itself, one step finds nothing left to do."""
    matrices = shifted(factors(2, 8), [0.5, 0.5])
    start = np.linalg.inv(matrices)
    result, accepted = run(newton_schulz.newton_schulz_inverse, matrices.astype("float32"), start.astype("float32"))
    assert accepted.all()
    close(result, start, 1e-5)


@pytest.mark.parametrize("radius", [0.5, 0.85, 1.5, 3.0, 30.0])
def test_newton_schulz_accepts_by_its_residual(radius):
    """`I - M X` has the given spectral radius: the iteration converges below one and is refused above."""
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    matrix = rotation @ np.diag([1.0, 1.0, 1.1, 0.9, 1.0, 1 + radius]) @ rotation.T
    result, accepted = run(
        newton_schulz.newton_schulz_inverse, matrix[None].astype("float32"), np.eye(6, dtype="float32")[None]
    )
    assert bool(accepted[0]) == (radius < 0.9)
    if accepted[0]:
        close(result[0], np.linalg.inv(matrix), 1e-3)


def nan_start(size):
    start = identities(1, size)
    start[0, 0, 0] = np.nan
    return start


HARD = {
    "rank_deficient": (factors(1, 8, rank=3), identities(1, 8)),
    "rank_one": (factors(1, 8, rank=1), identities(1, 8)),
    "zero": (np.zeros((1, 8, 8), "float32"), identities(1, 8)),
    "one_by_one": (np.array([[[3.0]]], "float32"), identities(1, 1)),
    "one_by_one_zero": (np.array([[[0.0]]], "float32"), identities(1, 1)),
    "grew_a_thousandfold": (1000 * factors(1, 8), np.linalg.inv(shifted(factors(1, 8), [0.1])).astype("float32")),
    "shrank_a_thousandfold": (factors(1, 8) / 1000, np.linalg.inv(shifted(factors(1, 8), [0.1])).astype("float32")),
    "zero_start": (factors(1, 8), np.zeros((1, 8, 8), "float32")),
    "negative_start": (factors(1, 8), -identities(1, 8)),
    "nan_start": (factors(1, 8), nan_start(8)),
    "infinite_start": (factors(1, 8), np.full((1, 8, 8), np.inf, "float32")),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HARD)
def test_hard_factors_and_starts(name, method):
    """Either method must find the inverse, whatever it starts from."""
    matrices, start = HARD[name]
    result = damped_inverse(matrices, [0.1], start, method)
    close(result, np.linalg.inv(shifted(matrices, [0.1])), 2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_indefinite_by_rounding(method):
    """A rank-one factor so large that its rounding errors outweigh the damping: damped more, never NaN."""
    matrices = 1e6 * factors(1, 8, rank=1)
    matrices[0] -= 0.5 * np.eye(8, dtype="float32")
    assert np.linalg.eigvalsh(shifted(matrices, [0.1])[0]).min() < 0
    result = damped_inverse(matrices, [0.1], identities(1, 8), method)
    assert np.isfinite(result).all()
    assert np.linalg.eigvalsh(result[0].astype("float64")).min() > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("least", "factor"), [(-0.05, 1), (-0.5, 10), (-5.0, 100), (-50.0, 1000)])
def test_retries_with_larger_damping(least, factor, method):
    """The least eigenvalue decides which multiple of the damping makes the matrix positive definite."""
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    matrix = (rotation @ np.diag([least, *range(100, 800, 100)]) @ rotation.T)[None].astype("float32")
    result = damped_inverse(matrix, [0.1], np.zeros((1, 8, 8), "float32"), method)
    close(result, np.linalg.inv(shifted(matrix, [0.1 * factor])), 1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("entry", [-1000.0, np.nan])
def test_keeps_the_previous_inverse_on_failure(entry, method):
    matrices = factors(1, 8)
    matrices[0, 2, 2] = entry
    previous = factors(1, 8, seed=3)
    result = damped_inverse(matrices, [0.1], previous, method)
    np.testing.assert_array_equal(result, previous)


@pytest.mark.parametrize("method", METHODS)
def test_infinite_factors_have_finite_inverses(method):
    matrices = factors(1, 8)
    matrices[0, 2, 2] = np.inf
    assert np.isfinite(damped_inverse(matrices, [0.1], factors(1, 8, seed=3), method)).all()


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_members_of_a_batch_fail_alone(method, xla):
    """Good warm start, cold start, damping to be raised, hopeless, and not finite, in one batch."""
    matrices = factors(5, 6)
    matrices[2] -= 0.5 * np.eye(6, dtype="float32")
    matrices[3] -= 1e4 * np.eye(6, dtype="float32")
    matrices[4, 0, 0] = np.nan
    assert -1 < np.linalg.eigvalsh(matrices[2]).min() < -0.1
    damping = np.full(5, 0.1, "float32")
    previous = factors(5, 6, seed=1)
    previous[0] = np.linalg.inv(shifted(matrices[:1] * 0.98, damping[:1]))[0]
    previous[1] = np.eye(6) * 100
    result = damped_inverse(matrices, damping, previous, method, xla)
    close(result[:2], np.linalg.inv(shifted(matrices[:2], damping[:2])), 1e-3)
    close(result[2:3], np.linalg.inv(shifted(matrices[2:3], 10 * damping[2:3])), 1e-3)
    np.testing.assert_array_equal(result[3:], previous[3:])


def test_damping_may_differ_within_a_batch():
    matrices, damping = factors(3, 6), np.array([1e-3, 0.1, 10.0], "float32")
    result = damped_inverse(matrices, damping, identities(3, 6), "cholesky")
    for one, matrix, value in zip(result, matrices, damping, strict=True):
        close(one, np.linalg.inv(shifted(matrix[None], [value])[0]), 1e-5)


def test_slightly_asymmetric_factors_are_symmetrized():
    matrices = factors(1, 8)
    skew = np.triu(np.full((8, 8), 0.01, "float32"), 1)
    result = damped_inverse(matrices + skew - skew.T, [0.1], identities(1, 8), "cholesky")
    close(result, np.linalg.inv(shifted(matrices, [0.1])), 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_float64(float64, method):
    old, new = factors(2, 12, dtype="float64"), factors(2, 12, seed=1, dtype="float64")
    new = 0.99 * old + 0.01 * new
    previous = np.linalg.inv(shifted(old, [0.1, 0.1]))
    result = damped_inverse(new, [0.1, 0.1], previous, method)
    # The iteration stops at a thousandth before its last squaring, Cholesky at rounding.
    close(result, np.linalg.inv(shifted(new, [0.1, 0.1])), 1e-12 if method == "cholesky" else 1e-5)


def from_the_identity(matrices):
    # An inverse of something else, which is not begun with.
    return newton_schulz.newton_schulz_from_anywhere(matrices, -matrices, True)


@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e5])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_newton_schulz_from_the_identity(condition, scale):
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))[0]
    matrix = scale * (rotation * np.geomspace(1, condition, 40)) @ rotation.T
    result, accepted = run(from_the_identity, matrix[None].astype("float32"))
    assert accepted.all()
    close(result[0], np.linalg.inv(matrix.astype("float32").astype("float64")), 1e-6 * max(condition, 10))


@pytest.mark.parametrize("matrix", [[[0.0]], [[-1.0]], [[1.0, 2.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
def test_newton_schulz_from_the_identity_refuses_what_is_not_positive_definite(matrix):
    good = np.eye(len(matrix)) * 2
    result, accepted = run(from_the_identity, np.array([matrix, good], "float32"))
    assert accepted.tolist() == [False, True]
    close(result[1], good / 4, 1e-6)


def test_no_factorization_is_compiled_for_tpus(monkeypatch):
    """The program of KFAC's inverses for a TPU consists of products."""

    def fail(matrices):
        raise AssertionError("a factorization")

    monkeypatch.setattr(backend, "cholesky", fail)
    matrices = factors(2, 8)
    found = run(lambda m, p: by_products_alone(m, np.float32([0.1, 0.1]), p), matrices, identities(2, 8))
    close(found, np.linalg.inv(shifted(matrices, [0.1, 0.1])), 1e-5)
    with pytest.raises(AssertionError, match="a factorization"):
        run(lambda m, p: by_newton_schulz(m, np.float32([0.1, 0.1]), p), matrices, identities(2, 8))


def test_newton_schulz_from_anywhere_begins_where_it_is_near_enough_and_allowed(monkeypatch):
    """One of two matrices is near enough to its start: with two steps it is inverted, unless it is not allowed."""
    monkeypatch.setattr(newton_schulz, "_FURTHER_STEPS", 2 - 23)
    matrices = np.array([1.0, 1e4])[:, None, None] * shifted(factors(1, 8), [0.3])
    start = np.linalg.inv(1.1 * matrices[:1]).repeat(2, axis=0).astype("float32")
    for allowed in (True, False):
        result, accepted = run(
            lambda m, s, allowed=allowed: newton_schulz.newton_schulz_from_anywhere(m, s, allowed),
            matrices.astype("float32"),
            start,
        )
        assert accepted.tolist() == [allowed, False]
        if allowed:
            close(result[0], np.linalg.inv(matrices[0]), 2e-4)


@pytest.mark.parametrize("size", [1, 640, 641, 1154, 4609])
def test_matrices_are_filled_up_to_be_halved_evenly(size, monkeypatch):
    monkeypatch.setattr(inverse, "_whole_size", lambda size: 640)
    filled = whole = inverse.halved_evenly(size)
    halvings = 0
    while whole > 640:
        assert whole % 2 == 0
        whole, halvings = whole // 2, halvings + 1
    assert size <= filled < size + 2**halvings


@pytest.mark.parametrize("method", ["cholesky", "newton-schulz"])
def test_large_matrices_are_inverted_one_after_the_other(method, monkeypatch):
    """As if each were alone; one of them cannot be, and keeps what it has."""
    monkeypatch.setattr(inverse, "at_once", lambda size: 1)
    matrices, damping, previous = factors(3, 6), [0.1, 0.2, 0.3], identities(3, 6)
    matrices[1] = np.nan
    found = damped_inverse(matrices, damping, previous, method, xla=True)
    close(found[[0, 2]], np.linalg.inv(shifted(matrices, damping)[[0, 2]]), 1e-4)
    np.testing.assert_array_equal(found[1], previous[1])
