"""Symmetric matrices as the numbers of one triangle, for sending."""

import math
from collections.abc import Iterable, Sequence

from keras import ops

from keras_ngd.linalg.batching import batched_by_size
from keras_ngd.typing import Shape, Tensor


def packed_size(dimension: int) -> int:
    """How many numbers a packed symmetric matrix has: `d (d + 1) / 2`."""
    return dimension * (dimension + 1) // 2


def pack(matrices: Tensor) -> Tensor:
    """The upper triangles of symmetric matrices, once each.

    Row `i` of a triangle is as long as what row `d - 1 - i` lacks, so two rows fill one of `d + 1` numbers: slices and a
    selection, where gathering the entries one by one would take many times as long.

    Args:
        matrices: `[..., d, d]`; what is below the diagonals is not looked at.

    Returns:
        `[k, d (d + 1) / 2]`, with the leading axes made one. The order of the numbers is `unpack`'s business.
    """
    d, count = matrices.shape[-1], math.prod(matrices.shape[:-2])
    matrices = ops.reshape(matrices, (count, d, d))
    half = d // 2
    top = ops.pad(matrices[:, :half], [[0, 0], [0, 0], [1, 0]])
    bottom = ops.pad(ops.flip(matrices[:, d - half :], axis=(1, 2)), [[0, 0], [0, 0], [0, 1]])
    folded = ops.reshape(ops.where(_from_bottom(half, d), bottom, top), (count, half * (d + 1)))
    return folded if d == 2 * half else ops.concatenate([folded, matrices[:, half, half:]], axis=1)


def unpack(packed: Tensor, dimension: int) -> Tensor:
    """The symmetric matrices `[k, d, d]` that `pack` was given."""
    d, half = dimension, dimension // 2
    folded = ops.reshape(packed[:, : half * (d + 1)], (packed.shape[0], half, d + 1))
    from_bottom = _from_bottom(half, d)
    zero = ops.zeros((), packed.dtype)
    top = ops.where(from_bottom, zero, folded)[:, :, 1:]
    bottom = ops.flip(ops.where(from_bottom, folded, zero)[:, :, :d], axis=(1, 2))
    rows = [top, bottom]
    if d > 2 * half:
        rows.insert(1, ops.pad(packed[:, None, half * (d + 1) :], [[0, 0], [0, 0], [half, 0]]))
    upper = ops.concatenate(rows, axis=1)
    eye = ops.eye(d, dtype="bool")
    return ops.where(eye, upper, upper + ops.swapaxes(upper, 1, 2))


def _from_bottom(half: int, dimension: int) -> Tensor:
    """Which numbers of the folded rows are of the lower rows of the matrix."""
    return ops.arange(dimension + 1)[None, :] <= ops.arange(half)[:, None]


def _is_stack(tensor: Tensor) -> bool:
    return len(tensor.shape) > 2 and tensor.shape[-1] == tensor.shape[-2]


def packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A list of tensors, its stacks of symmetric matrices `[..., d, d]` packed."""
    stacks = [i for i, t in enumerate(tensors) if _is_stack(t)]
    matrices = [[ops.reshape(tensors[i], (-1, *tensors[i].shape[-2:]))] for i in stacks]
    return _replaced(tensors, stacks, batched_by_size(lambda t: [pack(t)], matrices))


def packed_shape(tensor: Tensor) -> Shape:
    """The shape of a tensor as `packed` returns it."""
    shape = tuple(tensor.shape)
    return (math.prod(shape[:-2]), packed_size(shape[-1])) if _is_stack(tensor) else shape


def unpacked(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """What `packed` was given, from what it returned; `like` has the tensors' shapes."""
    stacks = [i for i, t in enumerate(like) if _is_stack(t)]
    found = batched_by_size(lambda t: [unpack(t, _dimension(t.shape[-1]))], [[tensors[i]] for i in stacks])
    return _replaced(tensors, stacks, [[ops.reshape(t, like[i].shape)] for i, [t] in zip(stacks, found, strict=True)])


def _dimension(size: int) -> int:
    """Of the matrices that have so many numbers when packed."""
    return (math.isqrt(8 * size + 1) - 1) // 2


def _replaced(tensors: Sequence[Tensor], indices: Sequence[int], found: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    tensors = list(tensors)
    for i, [tensor] in zip(indices, found, strict=True):
        tensors[i] = tensor
    return tensors
