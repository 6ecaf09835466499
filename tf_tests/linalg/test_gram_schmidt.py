"""Gram-Schmidt and Cholesky factors by halves, against NumPy in float64."""

import numpy as np
import pytest

from keras_ngd.linalg import gram_schmidt
from tf_tests.linalg.test_orthogonal_iteration import identities
from tf_tests.reference.running import close, run

# One factorization; and several, of sizes that do not come out even.
SIZES = [1, 5, 301]


def drawn(size, count=2, seed=0):
    """Matrices with eigenvalues of 1 to a hundredth."""
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(count, size, size)))[0]
    return ((turn * np.logspace(0, -2, size)) @ np.swapaxes(turn, 1, 2)).astype("float32")


def orthonormalized(rows, xla=False):
    found, good = run(gram_schmidt.orthonormalized, rows, xla=xla)
    return found, good


@pytest.mark.parametrize("size", SIZES)
def test_factors_are_those_of_cholesky(size):
    matrices = drawn(size)
    close(run(gram_schmidt.lower_factor, matrices), np.linalg.cholesky(matrices.astype("float64")), 1e-4)


@pytest.mark.parametrize("size", [5, 301])
def test_what_is_not_positive_definite_has_no_factor_and_the_others_have(size):
    matrices = drawn(size)
    matrices[1] -= 0.5 * np.eye(size, dtype="float32")
    found = run(gram_schmidt.lower_factor, matrices)
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).any()


@pytest.mark.parametrize("size", [5, 301])
def test_a_product_with_a_triangular_matrix(size):
    lower, rows = np.tril(drawn(size)), drawn(size, seed=1)[:, :, :3]
    close(run(gram_schmidt.transposed_product, lower, rows), np.swapaxes(lower, 1, 2) @ rows, 1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("xla", [False, True])
def test_rows_are_those_of_gram_and_schmidt(size, xla):
    rows = drawn(size)
    found, good = orthonormalized(rows, xla)
    for matrix, actual in zip(rows.astype("float64"), found, strict=True):
        q, r = np.linalg.qr(matrix.T)
        close(actual, (q * np.sign(np.diag(r))).T, 1e-3)
    close(found @ np.swapaxes(found, 1, 2), identities(2, size), 1e-5)
    assert good.all()


def test_double_precision(float64):
    rows = drawn(301).astype("float64")
    found, good = orthonormalized(rows)
    close(found @ np.swapaxes(found, 1, 2), identities(2, 301, "float64"), 1e-13)
    assert good.all()


@pytest.mark.parametrize("size", [5, 301])
def test_rows_that_are_nearly_dependent_are_taken_again(size, monkeypatch):
    rng = np.random.default_rng(0)
    rows = (np.ones((1, size, size)) + 1e-3 * rng.normal(size=(1, size, size))).astype("float32")
    found, good = orthonormalized(rows)
    close(found @ np.swapaxes(found, 1, 2), identities(1, size), 1e-5)
    assert good.all()
    # The first stays, but for its length.
    close(found[0, 0], rows[0, 0] / np.linalg.norm(rows[0, 0]), 1e-5)
    monkeypatch.setattr(gram_schmidt, "_TIMES", 1)
    assert not run(lambda r: gram_schmidt.orthonormalized(r)[1], rows).any()


def test_where_there_are_no_such_rows_it_says_so():
    rows = np.stack([np.zeros((5, 5)), np.full((5, 5), np.nan), np.eye(5)]).astype("float32")
    assert orthonormalized(rows)[1].tolist() == [False, False, True]
