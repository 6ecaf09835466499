"""Gram-Schmidt and what it takes, by halves: products run several times faster than factorizations, and compile to less."""

import numpy as np
from keras import ops

from keras_ngd import backend
from keras_ngd.linalg.halved_products import split_in_four
from keras_ngd.linalg.symmetric import add_diagonal
from keras_ngd.typing import Tensor

# A product with a triangular matrix of up to so many rows is left whole.
_WHOLE_PRODUCT = 256

# How far from orthonormal rows may be, in roundings of a sum of as many products as there are columns.
_ROUNDINGS = 64

# Vectors that rows are tried on. Errors could cancel in one.
_PROBES = 4

# What is added to the squares of rows, in roundings of the largest sum of their products: rows that are nearly dependent would
# have none that are positive; and how often rows are taken at most.
_ADDED, _TIMES = 8, 4


def _whole_size() -> int:
    """Up to which size factorizations are left whole.

    LAPACK starts threads for larger ones, and XLA goes column by column on CPUs. On accelerators there is nothing to gain, and a
    program of more parts is larger.
    """
    if backend.on_accelerator():
        return 640
    return 64 if backend.factorizes_by_column() else 128


def lower_factor(matrices: Tensor) -> Tensor:
    """`L` with `L L^T = M` of symmetric `[k, d, d]`; NaN where one is not positive definite."""
    return _lower_factor(matrices, _whole_size())


def _lower_factor(panels: Tensor, whole: int) -> Tensor:
    """`[k, d, m]`, the first columns of factors, of the first columns of matrices."""
    rows, columns = panels.shape[1:]
    if columns <= whole:
        corner = backend.cholesky(panels[:, :columns])
        if rows == columns:
            return corner
        below = backend.matmul(panels[:, columns:], backend.triangular_inverse(corner), transpose_b=True)
        return ops.concatenate([corner, below], axis=1)
    half = columns // 2
    first = _lower_factor(panels[:, :, :half], whole)
    known = backend.matmul(first[:, half:], first[:, half:columns], transpose_b=True)
    second = _lower_factor(panels[:, half:, half:] - known, whole)
    above = ops.zeros((panels.shape[0], half, columns - half), second.dtype)
    return ops.concatenate([first, ops.concatenate([above, second], axis=1)], axis=2)


def transposed_product(lower: Tensor, rows: Tensor) -> Tensor:
    """`L^T X` of lower triangular `[k, m, m]` and `[k, m, d]`, without most of the products with zeros."""
    if lower.shape[-1] <= _WHOLE_PRODUCT:
        return backend.matmul(lower, rows, transpose_a=True)
    corner, below, last = split_in_four(lower)
    half = corner.shape[-1]
    first = transposed_product(corner, rows[:, :half]) + backend.matmul(below, rows[:, half:], transpose_a=True)
    return ops.concatenate([first, transposed_product(last, rows[:, half:])], axis=1)


def orthonormalized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows `[k, m, d]`, of length one and each without what it has in common with those before it; and `[k]`, if they are.

    In floating point the results are orthonormal up to roundings times how nearly dependent the rows were, and so they are taken
    again where that is not enough.
    """

    def unfinished(times: Tensor, rows: Tensor, good: Tensor) -> Tensor:
        return (times < _TIMES) & ops.logical_not(ops.all(good))

    def once_more(times: Tensor, rows: Tensor, good: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        new = _orthonormalized(rows, _whole_size())
        return times + 1, new, _are_orthonormal(new)

    return ops.while_loop(unfinished, once_more, (ops.convert_to_tensor(0), rows, ops.zeros((rows.shape[0],), "bool")))[
        1:
    ]


def _orthonormalized(rows: Tensor, whole: int) -> Tensor:
    count = rows.shape[1]
    if count <= whole:
        unit = rows / ops.sqrt(ops.sum(ops.square(rows), axis=2, keepdims=True))
        products = backend.matmul(unit, unit, transpose_b=True)
        added = _ADDED * _rounding(rows) * ops.max(ops.sum(ops.abs(products), axis=2), axis=1)
        return backend.matmul(backend.triangular_inverse(backend.cholesky(add_diagonal(products, added))), unit)
    first, rest = _orthonormalized(rows[:, : count // 2], whole), rows[:, count // 2 :]
    rest = rest - backend.matmul(backend.matmul(rest, first, transpose_b=True), first)
    return ops.concatenate([first, _orthonormalized(rest, whole)], axis=1)


def _are_orthonormal(rows: Tensor) -> Tensor:
    """`[k]`, whether rows `[k, m, d]` are orthonormal, as far as products with a few vectors show, which take no time."""
    count, size = rows.shape[1:]
    probes = ops.cast(np.random.default_rng(count).standard_normal((1, count, _PROBES)), rows.dtype)
    probes = ops.broadcast_to(probes, (rows.shape[0], count, _PROBES))
    seen = backend.matmul(rows, backend.matmul(rows, probes, transpose_a=True))
    return ops.max(ops.abs(seen - probes), axis=(1, 2)) <= _ROUNDINGS * _rounding(rows) * size**0.5


def _rounding(tensor: Tensor) -> float:
    return float(np.finfo(backend.dtype_name(tensor)).eps)
