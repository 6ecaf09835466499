"""Batches of matrices of one size, from whatever they belong to, at once."""

from collections.abc import Callable, Sequence

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
