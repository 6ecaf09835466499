"""Batches of matrices of one size, from whatever they belong to, at once."""

from collections.abc import Callable, Sequence

from keras import ops

from keras_ngd import backend
from keras_ngd.typing import Tensor


def batched_by_size(function: Callable[..., Sequence[Tensor]], work: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """`function` of many batches, calling it once for all whose matrices have one size and dtype.

    Programs are smaller and products larger than with one call for each.

    Args:
        function: takes tensors with a common leading axis, returns a list of such.
        work: list of the arguments of each: lists of tensors `[k, ...]`, of which the last axis of the first is the size.

    Returns:
        For each what `function` would return of it alone.
    """
    members: dict[tuple[int, str], list[int]] = {}
    results: list[list[Tensor]] = [[] for _ in work]
    for i, (first, *_) in enumerate(work):
        members.setdefault((first.shape[-1], backend.dtype_name(first)), []).append(i)
    for indices in members.values():
        joined = [backend.concatenated(tensors) for tensors in zip(*(work[i] for i in indices), strict=True)]
        counts = [work[i][0].shape[0] for i in indices]
        parts = [backend.parts(tensor, counts) for tensor in function(*joined)]
        for i, found in zip(indices, zip(*parts, strict=True), strict=True):
            results[i] = list(found)
    return results


# Matrices are worked on so many at a time that this many entries are at work.
_CHUNK_ENTRIES = 2**20


def at_once(size: int) -> int:
    """How many matrices of this size are worked on at a time."""
    return max(_CHUNK_ENTRIES // size**2, 1)


def of_chosen(function: Callable[..., Tensor], chosen: Tensor, given: Sequence[Tensor], old: Tensor) -> Tensor:
    """`function` of the chosen of `k` matrices, and the old values of all others.

    The chosen are brought together, so that the work is theirs alone, whatever their number.

    Args:
        function: takes what is `given` and `old`, of some of the matrices; returns what takes the place of `old`.
        chosen: `[k]` booleans.
        given: tensors `[k, ...]`.
        old: `[k, d, d]`.
    """
    count, size = old.shape[0], old.shape[-1]
    chunk = min(count, at_once(size))
    if chunk == count:
        # All at once, or none. No loop: XLA would find that nothing in it depends on the turn, and compute it before, always.
        def new() -> Tensor:
            return ops.where(ops.reshape(chosen, (-1, 1, 1)), function(*given, old), old)

        return ops.cond(ops.any(chosen), new, lambda: old)
    order = ops.argsort(ops.cast(ops.logical_not(chosen), "int32"))
    order = ops.concatenate([order, ops.broadcast_to(order[-1:], (-count % chunk,))])
    total = ops.sum(ops.cast(chosen, "int32"))

    def unfinished(start: Tensor, values: Tensor) -> Tensor:
        return start < total

    def work(start: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        which = ops.slice(order, (start,), (chunk,))
        *some, before = (ops.take(tensor, which, axis=0) for tensor in (*given, values))
        new = function(*some, before)
        # What fills up the last chunk is not chosen, or chosen and worked on twice.
        new = ops.where(ops.reshape(ops.take(chosen, which), (-1, 1, 1)), new, before)
        return start + chunk, ops.scatter_update(values, ops.expand_dims(which, 1), new)

    return ops.while_loop(unfinished, work, (ops.zeros((), "int32"), old))[1]
