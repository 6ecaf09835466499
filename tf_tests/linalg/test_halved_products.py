"""Products of which half is known, and inverses by halves, at sizes that real ones are too large for."""

import numpy as np
import pytest

from keras_ngd.linalg import halved_products, inverse
from tf_tests.linalg.test_inverse import factors, shifted
from tf_tests.reference.running import close, run

SIZES = [6, 7]


@pytest.fixture(autouse=True, params=["in one", "by halves"])
def split(request, monkeypatch):
    """Whether products are made of parts."""
    monkeypatch.setattr(halved_products, "_SMALL", {"in one": 100, "by halves": 3}[request.param])
    return request.param == "by halves"


def lower_and_matrices(size):
    generator = np.random.default_rng(size)
    lower = np.tril(generator.standard_normal((2, size, size))).astype("float32")
    return lower, generator.standard_normal((2, 5, size)).astype("float32")


@pytest.mark.parametrize("size", SIZES)
def test_products_with_triangular_factors(size):
    lower, matrices = lower_and_matrices(size)
    columns, upper = np.swapaxes(matrices, 1, 2), np.swapaxes(lower, 1, 2)
    close(run(lambda x, t: halved_products.times_lower(x, t), matrices, lower), matrices @ lower, 1e-6)
    close(run(lambda x, t: halved_products.times_transposed_lower(x, t), matrices, lower), matrices @ upper, 1e-6)
    close(run(lambda t, x: halved_products.lower_times(t, x), lower, columns), lower @ columns, 1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_symmetric_products(size):
    _, rows = lower_and_matrices(size)
    columns = np.swapaxes(rows, 1, 2)
    of_columns = run(lambda x: halved_products.outer(x), columns)
    close(of_columns, columns @ rows, 1e-6)
    weights = factors(2, 5)
    close(run(lambda x, y: halved_products.inner(x, y), rows, weights @ rows), columns @ weights @ rows, 1e-6)


def test_what_is_above_the_diagonal_is_not_looked_at(split):
    lower, matrices = lower_and_matrices(6)
    lower[:, :3, 3:] = float("nan")
    found = run(lambda x, t: halved_products.times_lower(x, t), matrices, lower)
    assert np.isfinite(found).all() == split


@pytest.mark.parametrize("size", [3, 8, 13, 29])
def test_inverse_by_halves(size, monkeypatch):
    monkeypatch.setattr(inverse, "_whole_size", lambda size: 2)
    matrices = shifted(factors(3, size, rank=2), [0.1, 0.2, 0.3]).astype("float32")
    found = run(lambda m: inverse.cholesky_inverse(m), matrices)
    close(found, np.linalg.inv(matrices.astype("float64")), 1e-5)
    close(found, np.swapaxes(found, 1, 2), 1e-6)


def test_inverse_by_halves_of_what_is_nearly_singular(monkeypatch):
    """Where an explicit inverse in the Schur complement would lose all digits: its condition is the matrix's, squared."""
    monkeypatch.setattr(inverse, "_whole_size", lambda size: 4)
    matrices = shifted(factors(1, 32, rank=8), [3e-5]).astype("float32")
    assert np.linalg.cond(matrices.astype("float64")).max() > 3e4
    found = run(lambda m: inverse.cholesky_inverse(m), matrices)
    assert np.abs(matrices.astype("float64") @ found - np.eye(32)).max() < 0.03


@pytest.mark.parametrize("row", [0, 3, 7])
def test_inverse_by_halves_of_an_indefinite_matrix_is_nan(row, monkeypatch):
    monkeypatch.setattr(inverse, "_whole_size", lambda size: 2)
    bad = np.eye(8, dtype="float32")
    bad[row, row] = -1.0
    found, other = run(lambda m: inverse.cholesky_inverse(m), np.stack([bad, np.eye(8, dtype="float32")]))
    assert np.isnan(found).any()
    close(other, np.eye(8), 1e-6)
