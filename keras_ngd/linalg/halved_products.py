"""Products of large matrices of which half is known: with a triangular factor, or with a symmetric result.

Each is made of products of halves of its factors, but for those that are zero, or another one transposed. That saves a quarter of
the operations; halving once more would save an eighth for twice the products.
"""

from keras import ops

from keras_ngd import backend
from keras_ngd.typing import Tensor

# Up to so many rows a product takes no longer than its parts and bringing them together.
_SMALL = 1024


def _in_one(size: int) -> bool:
    """Whether a product is left in one: compilers take longer for parts, and accelerators make one large product best."""
    return size <= _SMALL or backend.on_accelerator() or backend.factorizes_by_column()


def split_in_four(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The corner, what is below it, and the last quarter of `[k, d, d]`."""
    half = matrices.shape[-1] // 2
    return matrices[:, :half, :half], matrices[:, half:, :half], matrices[:, half:, half:]


def join(corner: Tensor, lower_left: Tensor, lower_right: Tensor, upper_right: Tensor) -> Tensor:
    """The matrices of four parts."""
    left = ops.concatenate([corner, lower_left], axis=1)
    return ops.concatenate([left, ops.concatenate([upper_right, lower_right], axis=1)], axis=2)


def join_symmetric(corner: Tensor, lower_left: Tensor, lower_right: Tensor) -> Tensor:
    """The symmetric matrices with these parts."""
    return join(corner, lower_left, lower_right, ops.swapaxes(lower_left, 1, 2))


def times_lower(matrices: Tensor, lower: Tensor) -> Tensor:
    """`X L` of `[k, m, d]` and lower triangular `[k, d, d]`."""
    if _in_one(lower.shape[-1]):
        return backend.matmul(matrices, lower)
    corner, below, last = split_in_four(lower)
    half = corner.shape[-1]
    first, second = matrices[:, :, :half], matrices[:, :, half:]
    return ops.concatenate(
        [backend.matmul(first, corner) + backend.matmul(second, below), backend.matmul(second, last)], axis=2
    )


def times_transposed_lower(matrices: Tensor, lower: Tensor) -> Tensor:
    """`X L^T` of `[k, m, d]` and lower triangular `[k, d, d]`."""
    if _in_one(lower.shape[-1]):
        return backend.matmul(matrices, lower, transpose_b=True)
    corner, below, last = split_in_four(lower)
    half = corner.shape[-1]
    first, second = matrices[:, :, :half], matrices[:, :, half:]
    right = backend.matmul(first, below, transpose_b=True) + backend.matmul(second, last, transpose_b=True)
    return ops.concatenate([backend.matmul(first, corner, transpose_b=True), right], axis=2)


def lower_times(lower: Tensor, matrices: Tensor) -> Tensor:
    """`L X` of lower triangular `[k, d, d]` and `[k, d, m]`."""
    if _in_one(lower.shape[-1]):
        return backend.matmul(lower, matrices)
    corner, below, last = split_in_four(lower)
    half = corner.shape[-1]
    first, second = matrices[:, :half], matrices[:, half:]
    return ops.concatenate(
        [backend.matmul(corner, first), backend.matmul(below, first) + backend.matmul(last, second)], axis=1
    )


def outer(matrices: Tensor) -> Tensor:
    """`X X^T` of `[k, d, m]`."""
    if _in_one(matrices.shape[1]):
        return backend.matmul(matrices, matrices, transpose_b=True)
    half = matrices.shape[1] // 2
    first, second = matrices[:, :half], matrices[:, half:]
    return join_symmetric(
        backend.matmul(first, first, transpose_b=True),
        backend.matmul(second, first, transpose_b=True),
        backend.matmul(second, second, transpose_b=True),
    )


def inner(left: Tensor, right: Tensor) -> Tensor:
    """`X^T Y` of `[k, m, d]` each, which is symmetric."""
    if _in_one(left.shape[-1]):
        return backend.matmul(left, right, transpose_a=True)
    half = left.shape[-1] // 2
    (first, second), (of_first, of_second) = ((t[:, :, :half], t[:, :, half:]) for t in (left, right))
    return join_symmetric(
        backend.matmul(first, of_first, transpose_a=True),
        backend.matmul(second, of_first, transpose_a=True),
        backend.matmul(second, of_second, transpose_a=True),
    )
