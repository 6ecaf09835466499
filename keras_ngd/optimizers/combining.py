"""What all workers' rows make together."""

import functools

from keras import ops

from keras_ngd import backend
from keras_ngd.distributed.communicator import Communicator
from keras_ngd.linalg.packing import pack, unpack
from keras_ngd.typing import Shape, Tensor

# How one tensor that a curvature takes, `[groups, ...]`, is made of those of all workers:
#   rows             [groups, n, d]: one worker's after the other's
#   weighted rows    the same, each worker's weighed by its share of the examples: Fisher blocks are sums of squared rows
#   weights          [groups, n, n], symmetric: along the diagonal, one worker's rows having nothing to do with another's
#   factor           [groups, d, d]: the mean
#   rows of factor   [groups, n, d]: as `factor` of their products, `rows^T rows`
#   same             [groups]: the same on all
#   mean             [groups]: the mean over all examples
ROWS, WEIGHTED_ROWS, WEIGHTS, FACTOR, ROWS_OF_FACTOR, SAME, MEAN = range(7)


def combined_shape(shape: Shape, kind: int, size: int) -> Shape:
    """The shape of what `size` workers' tensors of this shape make together."""
    shape = tuple(shape)
    if kind in (ROWS, WEIGHTED_ROWS):
        return (shape[0], size * shape[1], shape[2])
    if kind == WEIGHTS:
        return (shape[0], size * shape[1], size * shape[2])
    return (shape[0], shape[2], shape[2]) if kind == ROWS_OF_FACTOR else shape


def combine(communicator: Communicator, tensor: Tensor, kind: int, share: Tensor, travels: Tensor, name: str) -> Tensor:
    """What all workers' tensors make together, of the shape `combined_shape`, on all workers.

    Args:
        communicator: a `Communicator`.
        tensor: this worker's, `[groups, ...]`.
        kind: one of the above.
        share: scalar, this worker's share of all examples.
        travels: whether `weights` are sent: True, or a scalar tensor. Those that are not are identities.
        name: of the exchange.
    """
    share = ops.cast(share, tensor.dtype)
    if kind == SAME:
        return tensor
    if kind == MEAN:
        [total] = communicator.all_reduce([tensor * share], "statistics", name)
        return total
    if kind == ROWS_OF_FACTOR:
        tensor, kind = backend.matmul(tensor, tensor, transpose_a=True), FACTOR
    if kind == FACTOR:
        [total] = communicator.all_reduce([pack(tensor * share)], "statistics", name)
        return unpack(total, tensor.shape[-1])
    if kind == WEIGHTED_ROWS:
        tensor = tensor * ops.sqrt(share)

    def gathered(tensor: Tensor) -> Tensor:
        [all_of_them] = communicator.all_gather([tensor[None]], "statistics", name)
        # All are of one shape, whatever their batches were.
        return ops.reshape(all_of_them, (communicator.size, *tensor.shape))

    def weights() -> Tensor:
        triangles = ops.reshape(gathered(pack(tensor)), (communicator.size * tensor.shape[0], -1))
        return diagonal(ops.reshape(unpack(triangles, tensor.shape[-1]), (communicator.size, *tensor.shape)))

    if kind == WEIGHTS:
        identities = functools.partial(_identities, tensor, communicator.size)
        if isinstance(travels, bool):
            return weights() if travels else identities()
        return ops.cond(travels, weights, identities)
    return ops.reshape(
        ops.transpose(gathered(tensor), (1, 0, 2, 3)), combined_shape(tensor.shape, kind, communicator.size)
    )


def _identities(tensor: Tensor, size: int) -> Tensor:
    groups, n, _ = tensor.shape
    return ops.broadcast_to(ops.eye(size * n, dtype=tensor.dtype), (groups, size * n, size * n))


def diagonal(blocks: Tensor) -> Tensor:
    """`[groups, P n, P n]` with the blocks `[P, groups, n, n]` along the diagonal."""
    size, _, n, _ = blocks.shape
    padded = [
        ops.pad(block, [[0, 0], [0, 0], [i * n, (size - 1 - i) * n]]) for i, block in enumerate(ops.unstack(blocks))
    ]
    return ops.concatenate(padded, axis=1)
