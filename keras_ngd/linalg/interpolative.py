"""Interpolative decompositions of symmetric positive semi-definite matrices, with static shapes.

`Q ~ P Q[S, :]`: `rank` of the rows of `Q`, chosen and weighted so that all others are combinations of them.
"""

from keras import ops

from keras_ngd import backend
from keras_ngd.linalg import inverse

# Pivots below this share of the largest diagonal entry count as zero: the rank is exhausted.
_TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def pivoted_cholesky(matrices, rank):
    """Partial Cholesky factorization with diagonal pivoting, `Q ~ L L^T`.

    Args:
        matrices: `[k, m, m]`, symmetric positive semi-definite.
        rank: int of at most `m`.

    Returns:
        `L`, `[k, m, rank]`, and the pivots' indices, `[k, rank]`, distinct. Where the numerical rank is exhausted, columns are
        zero and indices those of any rows left.
    """
    return _compiled_pivoted_cholesky(rank)(matrices)


_COMPILED = {}


def _compiled_pivoted_cholesky(rank):
    # Dozens of small steps, each waiting for the last: compiled, they cost microseconds each, whatever is around them.
    if rank not in _COMPILED:
        _COMPILED[rank] = backend.compiled(lambda matrices: _pivoted_cholesky(matrices, rank))
    return _COMPILED[rank]


def _pivoted_cholesky(matrices, rank):
    count, size = matrices.shape[0], matrices.shape[-1]
    dtype = matrices.dtype
    diagonal = ops.diagonal(matrices, axis1=1, axis2=2)
    threshold = _TOLERANCE[backend.dtype_name(matrices)] * ops.max(diagonal, axis=1, keepdims=True)

    def step(i, columns, left, free, pivots):
        pivot = ops.cast(ops.argmax(ops.where(free, left, -ops.ones_like(left)), axis=1), "int32")
        at = ops.one_hot(pivot, size, dtype=dtype)
        value = ops.sum(left * at, axis=1, keepdims=True)
        known = value > threshold
        scale = ops.where(known, 1 / ops.sqrt(ops.where(known, value, ops.ones_like(value))), ops.zeros_like(value))
        row = ops.squeeze(ops.take_along_axis(matrices, ops.reshape(pivot, (-1, 1, 1)), axis=1), 1)
        earlier = ops.take_along_axis(columns, ops.reshape(pivot, (-1, 1, 1)), axis=2)
        column = row - ops.sum(columns * earlier, axis=1)
        column = ops.where(free, column * scale, ops.zeros_like(column))
        columns = ops.slice_update(columns, (0, i, 0), ops.expand_dims(column, 1))
        left = ops.maximum(left - column * column, ops.zeros_like(left))
        pivots = ops.slice_update(pivots, (0, i), ops.expand_dims(pivot, 1))
        return i + 1, columns, left, ops.logical_and(free, at == 0), pivots

    # The columns of L as rows, for the products of every step run along them.
    state = (
        ops.zeros((), "int32"),
        ops.zeros((count, rank, size), dtype),
        diagonal,
        ops.ones((count, size), "bool"),
        ops.zeros((count, rank), "int32"),
    )
    _, columns, _, _, pivots = ops.while_loop(lambda i, *_: i < rank, step, state)
    return ops.transpose(columns, (0, 2, 1)), pivots


def interpolative_decomposition(matrices, rank):
    """`Q ~ P Q[S, :]` by pivoted Cholesky factorization.

    The rows `S` are the pivots, `P = L L_S^-1`, and then `Q = P Q_SS P^T + R` with a residual that is positive semi-definite, and
    zero in the rows and columns `S`: what HyLo's eq. 8 assumes and an interpolative decomposition by QR does not give.

    Args:
        matrices: `[k, m, m]`, symmetric positive semi-definite.
        rank: int of at most `m`.

    Returns:
        `(S, P, R)`: indices `[k, rank]`, `[k, m, rank]` with `P[S] = I`, and `[k, m, m]`.
    """
    lower, chosen = pivoted_cholesky(matrices, rank)
    at = ops.one_hot(chosen, matrices.shape[-1], dtype=lower.dtype)
    corner = backend.matmul(at, lower)
    diagonal = ops.diagonal(corner, axis1=1, axis2=2)
    corner = inverse.add_diagonal_entries(corner, ops.cast(diagonal == 0, corner.dtype))
    combinations = backend.matmul(lower, backend.triangular_inverse(corner))
    is_chosen = ops.expand_dims(ops.max(at, axis=1), 2) > 0
    combinations = ops.where(is_chosen, ops.transpose(at, (0, 2, 1)), combinations)
    return chosen, combinations, matrices - backend.matmul(lower, lower, transpose_b=True)
