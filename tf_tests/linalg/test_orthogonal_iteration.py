"""Bases that are followed from matrix to matrix, against NumPy's eigenvectors in float64."""

import functools

import numpy as np
import pytest
from keras import ops

from keras_ngd.linalg import orthogonal_iteration
from tf_tests.reference.eigenbasis import residual
from tf_tests.reference.running import close, run

COUNT, SIZE = 3, 6


@functools.cache
def renewing(decomposition, tolerance):
    """One function for the same arguments, which is compiled once."""
    return functools.partial(orthogonal_iteration.renewed, decomposition=decomposition, tolerance=tolerance)


def renewed(matrices, bases, failures=None, decomposition="qr", tolerance=0.0, xla=False):
    failures = np.zeros(len(matrices), matrices.dtype) if failures is None else failures
    return run(renewing(decomposition, tolerance), matrices, bases, failures, xla=xla)


def identities(count=COUNT, size=SIZE, dtype="float32"):
    return np.tile(np.eye(size, dtype=dtype), (count, 1, 1))


def drawn(count=COUNT, size=SIZE, seed=0):
    """Matrices with eigenvalues of 1 to a hundredth."""
    rows = np.random.default_rng(seed).normal(size=(count, 3 * size, size)) * np.logspace(0, -1, size)
    return (np.swapaxes(rows, 1, 2) @ rows / rows.shape[1]).astype("float32")


def assert_orthonormal(bases):
    close(np.swapaxes(bases, 1, 2) @ bases, identities(*bases.shape[:2], bases.dtype), 1e-5)


@pytest.mark.parametrize("decomposition", orthogonal_iteration.DECOMPOSITIONS)
@pytest.mark.parametrize("xla", [False, True])
def test_the_first_basis_is_that_of_the_eigenvectors_largest_first(decomposition, xla):
    matrices = drawn()
    bases, failures = renewed(matrices, identities(), decomposition=decomposition, xla=xla)
    for matrix, basis in zip(matrices.astype("float64"), bases, strict=True):
        expected = np.linalg.eigh(matrix)[1][:, ::-1]
        close(np.abs(expected.T @ basis), np.eye(SIZE), 1e-3)
    assert not failures.any()


def test_an_iteration_is_that_of_the_sorted_columns_each_in_its_place():
    matrices, order = drawn(), [3, 0, 5, 1, 4, 2]
    bases, _ = renewed(matrices, identities())
    shuffled = bases[:, :, order]
    new = drawn(seed=1)
    found, _ = renewed(new, shuffled)
    for matrix, basis, actual in zip(new.astype("float64"), shuffled.astype("float64"), found, strict=True):
        columns = np.argsort(-np.diag(basis.T @ matrix @ basis))
        expected = np.empty_like(basis)
        expected[:, columns] = np.linalg.qr(matrix @ basis[:, columns])[0]
        close(np.abs(np.sum(expected * actual, axis=0)), np.ones(SIZE), 1e-4)


def test_iterations_follow_the_eigenvectors_of_matrices_that_change():
    """Where columns are sorted the wrong way, nothing fails, but each iteration makes the basis worse."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(np.eye(SIZE) + 0.02 * rng.normal(size=(SIZE, SIZE)))[0]
    turn = turn * np.sign(np.diag(turn))
    matrices, bases, residuals = drawn(), identities(), []
    for _ in range(30):
        bases, failures = renewed(matrices, bases)
        residuals.append(max(residual(m, b) for m, b in zip(matrices.astype("float64"), bases, strict=True)))
        matrices = (turn.T @ matrices @ turn).astype("float32")
    assert max(residuals) < 0.1
    assert_orthonormal(bases)
    for _ in range(60):
        bases, failures = renewed(matrices, bases)
    assert max(residual(m, b) for m, b in zip(matrices.astype("float64"), bases, strict=True)) < 1e-3
    assert not failures.any()


def test_a_basis_stays_while_it_serves():
    matrices = drawn()
    bases, _ = renewed(matrices, identities())
    near = matrices + 1e-3 * drawn(seed=1)
    far = near.copy()
    far[1] = drawn(seed=2)[1]
    found, _ = renewed(far, bases, tolerance=0.05)
    np.testing.assert_array_equal(found[[0, 2]], bases[[0, 2]])
    assert not np.array_equal(found[1], bases[1])
    assert not np.array_equal(renewed(near, bases, tolerance=0.0)[0][0], bases[0])


def test_matrices_without_much_in_them():
    zero, one = np.zeros((SIZE, SIZE), "float32"), np.outer(np.arange(SIZE), np.arange(SIZE)).astype("float32")
    tiny, huge = 1e-30 * drawn()[0], 1e30 * drawn()[0]
    matrices, bases = np.stack([zero, one, tiny, huge]), identities(4)
    for _ in range(4):
        bases, failures = renewed(matrices, bases)
        assert_orthonormal(bases)
    np.testing.assert_array_equal(bases[0], np.eye(SIZE))
    scaled = [one, tiny * 1e30, huge * 1e-30]
    assert max(residual(m.astype("float64"), b) for m, b in zip(scaled, bases[1:], strict=True)) < 1e-5
    assert not failures.any()
    np.testing.assert_array_equal(renewed(np.full((2, 1, 1), 3.0, "float32"), identities(2, 1))[0], identities(2, 1))


@pytest.mark.parametrize("decomposition", orthogonal_iteration.DECOMPOSITIONS)
def test_what_is_not_finite_keeps_its_basis_and_is_counted(decomposition):
    bases, failures = renewed(drawn(), identities(), decomposition=decomposition)
    bad = drawn(seed=1)
    bad[1, 2, 3] = np.nan
    for times in (1, 2):
        found, failures = renewed(bad, bases, failures, decomposition=decomposition)
        np.testing.assert_array_equal(found[1], bases[1])
        assert failures.tolist() == [0, times, 0]
        assert_orthonormal(found)


def test_directions_whose_eigenvalues_are_lost_in_rounding_stay():
    values = np.array([1.0, 0.5, 0.25, 1e-12, 1e-13, 0.0])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, SIZE)))[0]
    matrices = ((turn * values) @ turn.T).astype("float32")[None]
    bases, _ = renewed(matrices, identities(1))
    found, _ = renewed(matrices * 1.5, bases)
    close(np.abs(np.sum(found * bases, axis=1)), np.ones((1, SIZE)), 0.1)


def turned(values, seed=0):
    """A matrix with these eigenvalues, and its eigenvectors."""
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return ((turn * values) @ turn.T).astype("float32"), turn


@pytest.mark.parametrize("size", [SIZE, 150])
@pytest.mark.parametrize("rank", ["one", "a third", "full"])
def test_any_basis_follows_a_badly_conditioned_matrix(size, rank):
    """From a basis that has nothing to do with it, no step fails, and each is worth one in float64."""
    count = {"one": 1, "a third": size // 3, "full": size}[rank]
    values = np.where(np.arange(size) < count, np.logspace(0, -12, size), 0)
    matrix, _ = turned(values)
    exact = turned(np.ones(size), seed=1)[1]
    bases, matrix64 = exact.astype("float32")[None], matrix.astype("float64")
    for _ in range(8):
        bases, failures = renewed(matrix[None], bases)
        exact = exact[:, np.argsort(-np.diag(exact.T @ matrix64 @ exact))]
        exact = np.linalg.qr(matrix64 @ exact)[0]
        assert_orthonormal(bases)
        assert residual(matrix64, bases[0]) < 1.01 * residual(matrix64, exact) + 3e-5
    assert not failures.any()


def test_a_step_from_a_near_basis_is_that_of_float64(float64):
    """With directions of small eigenvalues, all of which an iteration keeps apart."""
    size = 40
    matrix, turn = turned(np.logspace(0, -6, size))
    near = np.linalg.qr(turn + 1e-3 * np.random.default_rng(1).normal(size=(size, size)))[0]
    found, failures = renewed(matrix.astype("float64")[None], near[None])
    order = np.argsort(-np.diag(near.T @ matrix @ near))
    expected = np.linalg.qr(matrix.astype("float64") @ near[:, order])[0]
    close(np.abs(np.sum(found[0][:, order] * expected, axis=0)), np.ones(size), 1e-6)
    assert not failures.any()


def test_where_no_step_is_found_there_are_eigenvectors(monkeypatch):
    bases, _ = renewed(drawn(), identities())
    failing = lambda seen, bases: ops.full_like(bases, float("nan"))  # noqa: E731
    monkeypatch.setattr(orthogonal_iteration, "iterated", failing)
    matrices = drawn(seed=1)
    found, failures = run(
        lambda *tensors: orthogonal_iteration.renewed(*tensors, "qr", 0.0), matrices, bases, np.zeros(COUNT, "float32")
    )
    assert max(residual(m.astype("float64"), b) for m, b in zip(matrices, found, strict=True)) < 1e-5
    assert not failures.any()


def test_only_what_is_chosen_is_decomposed(monkeypatch):
    """The work is done in a loop over those that are due."""
    matrices = drawn(5)
    bases, _ = renewed(matrices, identities(5))
    matrices[[0, 3]] = drawn(5, seed=1)[[0, 3]]
    monkeypatch.setattr("keras_ngd.linalg.batching._CHUNK_ENTRIES", SIZE**2)
    found, _ = run(
        lambda *tensors: orthogonal_iteration.renewed(*tensors, "qr", 1e-3), matrices, bases, np.zeros(5, "float32")
    )
    expected, _ = renewed(matrices, bases, tolerance=1e-3)
    close(found, expected, 1e-5)
    np.testing.assert_array_equal(found[[1, 2, 4]], bases[[1, 2, 4]])
    assert not np.array_equal(found[0], bases[0])


def test_off_diagonal():
    matrices = np.arange(8, dtype="float32").reshape(2, 2, 2)
    found = run(lambda m: ops.convert_to_tensor(orthogonal_iteration.off_diagonal(m)), matrices)
    np.testing.assert_array_equal(found, [[[0, 1], [2, 0]], [[0, 5], [6, 0]]])
