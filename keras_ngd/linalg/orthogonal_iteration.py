"""Orthonormal bases in which symmetric matrices are diagonal, or nearly, followed from one batch of matrices to the next."""

from collections.abc import Sequence

import numpy as np
from keras import ops

from keras_ngd import backend, sharding
from keras_ngd.linalg import gram_schmidt
from keras_ngd.linalg.batching import of_chosen
from keras_ngd.linalg.symmetric import add_diagonal, all_finite, symmetrize
from keras_ngd.typing import Tensor

DECOMPOSITIONS = ("qr", "eigh")

# What is added to the eigenvalues of a matrix before an iteration, in roundings of its norm: where eigenvalues are lost in the
# rounding of others, directions stay as they are in place of being drawn anew from that.
_SHIFT = 16


def norms(matrices: Tensor) -> Tensor:
    """The Frobenius norms of `[k, d, d]`, `[k]`."""
    return ops.sqrt(ops.sum(ops.square(matrices), axis=(1, 2)))


def rotated(matrices: Tensor, bases: Tensor) -> Tensor:
    """`Q^T F Q` of matrices and bases `[k, d, d]`."""
    return backend.matmul(bases, backend.matmul(matrices, bases), transpose_a=True)


def off_diagonal(matrices: Tensor) -> Tensor:
    """`[k, d, d]` with zeros on their diagonals."""
    return matrices * (1 - ops.eye(matrices.shape[-1], dtype=matrices.dtype))


def iterated(seen: Tensor, bases: Tensor) -> Tensor:
    """Bases after one step of orthogonal iteration, `Q <- qr(F Q)`, each column in its place; NaN where that fails.

    A factorization keeps the direction of the first column, and the iteration pulls towards the largest eigenvalue; so columns
    go into it with the largest of `diag(Q^T F Q)` first. In the order of rising ones each step would ruin the basis.

    With `Q^T F Q = L L^T` the columns of `F Q` are those of `Q L L^T`, and `L^T` is upper triangular, so that Gram-Schmidt makes
    the same of them as of those of `Q L`, of which fewer are nearly dependent.

    Args:
        seen: `[k, d, d]`, `Q^T F Q` of positive semi-definite matrices.
        bases: `[k, d, d]`, orthonormal columns.
    """
    order = ops.argsort(-ops.diagonal(seen, axis1=1, axis2=2), axis=1)
    # Vectors are rows here: whole rows are quickly put elsewhere.
    in_order = backend.rows_at(ops.transpose(backend.rows_at(seen, order), (0, 2, 1)), order)
    vectors = backend.rows_at(ops.transpose(bases, (0, 2, 1)), order)
    length = norms(seen)
    shift = _SHIFT * float(np.finfo(backend.dtype_name(seen)).eps) * ops.where(length > 0, length, 1.0)
    lower = gram_schmidt.lower_factor(add_diagonal(in_order, shift))
    found, good = gram_schmidt.orthonormalized(gram_schmidt.transposed_product(lower, vectors))
    found = backend.rows_at(_where(good, found, ops.full_like(found, float("nan"))), ops.argsort(order, axis=1))
    return ops.transpose(found, (0, 2, 1))


def _where(chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Matrices by matrix."""
    return ops.where(ops.reshape(chosen, (-1, 1, 1)), new, old)


def eigenvectors(matrices: Tensor) -> Tensor:
    """The eigenvectors of `[k, d, d]` as columns, that of the largest eigenvalue first."""
    return ops.flip(backend.eigh(matrices)[1], axis=2)


def renewed(
    matrices: Tensor, bases: Tensor, failures: Tensor, decomposition: str, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Bases of the new matrices: the eigenvectors of those whose basis is the identity, of others by one iteration.

    A basis stays as it is where it still diagonalizes its matrix, `|offdiag(Q^T F Q)| <= tolerance |F|`, and where a new one is
    not finite, or its matrix is not. The work is that of the bases that are renewed.

    Args:
        matrices: `[k, d, d]`, symmetric and positive semi-definite.
        bases: `[k, d, d]`, those in use, at first identities.
        failures: `[k]`, how often a basis could not be renewed.
        decomposition: `"qr"`, or `"eigh"` for eigenvectors at every time.
        tolerance: see above; 0 for no matrix that is not diagonal.

    Returns:
        The bases and the failures, as they go on.
    """

    def work(known: Tensor, state: Sequence[Tensor], matrices: Tensor) -> list[Tensor]:
        return _renewed(known, state, matrices, decomposition, tolerance)

    bases, failures = sharding.divided(work, [bases, failures], matrices)
    return bases, failures


def _renewed(
    known: Tensor, state: Sequence[Tensor], matrices: Tensor, decomposition: str, tolerance: float
) -> list[Tensor]:
    bases, failures = state
    # TensorFlow's decompositions stop the program where a matrix is not finite.
    finite = all_finite(matrices)
    matrices = _where(finite, symmetrize(matrices), ops.zeros_like(matrices))
    # Not the squares of its entries: those of a small matrix would be zero.
    largest = ops.max(ops.abs(matrices), axis=(1, 2))
    matrices = matrices / ops.reshape(ops.where(largest > 0, largest, 1.0), (-1, 1, 1))
    seen = rotated(matrices, bases)
    due = known & (norms(off_diagonal(seen)) > tolerance * norms(matrices))
    identity = ops.eye(matrices.shape[-1], dtype=matrices.dtype)
    first = ops.all(ops.equal(bases, identity), axis=(1, 2)) if decomposition == "qr" else ops.ones_like(due)
    new = bases
    if decomposition == "qr":
        new = of_chosen(iterated, due & ~first, [seen], new)
        first = first | ~all_finite(new)
    new = of_chosen(lambda factors, old: eigenvectors(factors), due & first, [matrices], new)
    good = all_finite(new)
    failed = known & ~(finite & good)
    new = _where(good, new, bases)
    return [new, failures + ops.cast(failed, failures.dtype)]
