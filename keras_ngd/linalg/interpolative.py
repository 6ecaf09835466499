"""Interpolative decompositions of symmetric positive semi-definite matrices, with static shapes.

`Q ~ P Q[S, :]`: `rank` of the rows of `Q`, chosen and weighted so that all others are combinations of them.
"""

import functools
from collections.abc import Callable

from keras import ops

from keras_ngd import backend
from keras_ngd.typing import Tensor

# Pivots below this share of the largest diagonal entry count as zero: the rank is exhausted.
_TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def pivoted_cholesky(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Partial Cholesky factorization, `Q = L L^T + R`, with the longest column of the residual for each pivot.

    The largest diagonal entry, the usual choice, would see each row for itself; columns tell how much of the others a
    pivot explains. On kernel matrices the residual stays within twice that of an interpolative decomposition by QR,
    where diagonal pivots leave up to three times as much.

    Args:
        matrices: `[k, m, m]`, symmetric positive semi-definite.
        rank: int of at most `m`.

    Returns:
        `L`, `[k, m, rank]`, the pivots' indices, `[k, rank]`, distinct, and `R`, `[k, m, m]`, zero in the pivots' rows and
        columns. Where the numerical rank is exhausted, columns are zero and indices those of any rows left.
    """
    return _compiled_pivoted_cholesky(rank)(matrices)


_COMPILED: dict[int, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {}


def _compiled_pivoted_cholesky(rank: int) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    # Dozens of small steps, each waiting for the last: compiled, they cost microseconds each, whatever is around them.
    if rank not in _COMPILED:
        _COMPILED[rank] = backend.compiled(functools.partial(_pivoted_cholesky, rank=rank))
    return _COMPILED[rank]


def _pivoted_cholesky(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    count, size = matrices.shape[0], matrices.shape[-1]
    dtype = matrices.dtype
    largest = ops.max(ops.diagonal(matrices, axis1=1, axis2=2), axis=1)
    # Columns are compared by their squares, which small numbers would not survive.
    unit = ops.reshape(ops.where(largest > 0, largest, ops.ones_like(largest)), (-1, 1, 1))
    threshold = _TOLERANCE[backend.dtype_name(matrices)]

    def step(i: Tensor, columns: Tensor, residual: Tensor, free: Tensor, pivots: Tensor) -> tuple[Tensor, ...]:
        zero = ops.zeros_like(i)
        lengths = ops.where(free, ops.sum(ops.square(residual), axis=1), -ops.ones_like(residual[:, 0]))
        pivot = ops.cast(ops.argmax(lengths, axis=1), "int32")
        at = ops.one_hot(pivot, size, dtype=dtype)
        column = ops.squeeze(ops.take_along_axis(residual, ops.reshape(pivot, (-1, 1, 1)), axis=1), 1)
        value = ops.sum(column * at, axis=1, keepdims=True)
        known = value > threshold
        scale = ops.where(known, 1 / ops.sqrt(ops.where(known, value, ops.ones_like(value))), ops.zeros_like(value))
        column = ops.where(free, column * scale, ops.zeros_like(column))
        return (
            i + 1,
            ops.slice_update(columns, (zero, i, zero), ops.expand_dims(column, 1)),
            residual - ops.expand_dims(column, 1) * ops.expand_dims(column, 2),
            ops.logical_and(free, at == 0),
            ops.slice_update(pivots, (zero, i), ops.expand_dims(pivot, 1)),
        )

    # The columns of L as rows: they are written one by one.
    state = (
        ops.zeros((), "int32"),
        ops.zeros((count, rank, size), dtype),
        matrices / unit,
        ops.ones((count, size), "bool"),
        ops.zeros((count, rank), "int32"),
    )
    _, columns, residual, free, pivots = ops.while_loop(lambda i, *_: i < rank, step, state)
    # Exactly zero in the pivots' rows and columns, where rounding leaves a little.
    left = ops.cast(free, dtype)
    residual = unit * residual * ops.expand_dims(left, 1) * ops.expand_dims(left, 2)
    return ops.transpose(ops.sqrt(unit) * columns, (0, 2, 1)), pivots, residual


def interpolative_decomposition(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """`Q ~ P Q[S, :]` by pivoted Cholesky factorization.

    The rows `S` are the pivots, `P = L L_S^-1`, and then `Q = P Q_SS P^T + R` with a residual that is positive semi-definite, and
    zero in the rows and columns `S`: what HyLo's eq. 8 assumes and an interpolative decomposition by QR does not give.

    Args:
        matrices: `[k, m, m]`, symmetric positive semi-definite.
        rank: int of at most `m`.

    Returns:
        `(S, P, R)`: indices `[k, rank]`, `[k, m, rank]` with `P[S] = I`, and `[k, m, m]`.
    """
    lower, chosen, residual = pivoted_cholesky(matrices, rank)
    at = ops.one_hot(chosen, matrices.shape[-1], dtype=lower.dtype)
    corner = backend.matmul(at, lower)
    diagonal = ops.diagonal(corner, axis1=1, axis2=2)
    corner = backend.add_to_diagonal(corner, ops.cast(diagonal == 0, corner.dtype))
    combinations = backend.matmul(lower, backend.triangular_inverse(corner))
    is_chosen = ops.expand_dims(ops.max(at, axis=1), 2) > 0
    combinations = ops.where(is_chosen, ops.transpose(at, (0, 2, 1)), combinations)
    return chosen, combinations, residual
