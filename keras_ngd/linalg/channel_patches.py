"""Sums over the patches of single channels, which a depthwise convolution sees."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from keras import ops

from keras_ngd import sharding
from keras_ngd.linalg import patches
from keras_ngd.typing import Shape, Tensor


def applies(x: Tensor) -> bool:
    """Whether `channel_grams` takes `x`: its sizes are static, and it is not one batch on several devices."""
    return None not in x.shape[1:] and sharding.distribution() is None


def channel_grams(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int], padding: str
) -> Tensor:
    """For each channel, `sum over outputs of patch patch^T`, from displacements, no patch stored.

    With `Z_d` the sum over the examples of the input times itself displaced by `d`, a map of the input's size, the entry of
    the kernel positions `p` and `q` is the sum of `Z_{q - p}` over what `p` sees. Over one or two axes, `P` positions have fewer
    than `2 P` displacements, up to sign, in place of about `P^2 / 2` pairs.

    Args:
        x: `[n, *sizes, c]`, of static sizes.
        kernel, strides, dilation, padding: of the convolution.

    Returns:
        `[c, prod(kernel), prod(kernel)]`, symmetric.
    """
    displacements, index = _displacements(tuple(kernel))

    # One example after the other: in products over all of them, XLA's CPU compiler stores every displaced input; and sums over
    # patches were 3 to 15 times as slow on maps 7 to 112 pixels wide, and took 2 to 20 times the memory.
    def add_example(i: Tensor, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        example = ops.slice(x, (i, *(0 for _ in x.shape[1:])), (1, *x.shape[1:]))
        products = _products(example, displacements, kernel, dilation)
        return tuple(z + product for z, product in zip(maps, products, strict=True))

    start = tuple(ops.zeros((1, *x.shape[1:]), x.dtype) for _ in displacements)
    maps = ops.concatenate(list(ops.fori_loop(0, ops.shape(x)[0], add_example, start)))
    sums, _ = patches.patch_sums(maps, kernel, strides, dilation, padding)
    channels, positions = x.shape[-1], index.shape[0]
    entries = ops.take(ops.reshape(sums, (-1, channels)), index.reshape(-1), axis=0)
    return ops.transpose(ops.reshape(entries, (positions, positions, channels)), (2, 0, 1))


def _products(
    x: Tensor, displacements: Sequence[Shape], kernel: Sequence[int], dilation: Sequence[int]
) -> Iterator[Tensor]:
    """Yields `x` times itself displaced by each of the displacements, zeros beyond the border."""
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    padded = ops.pad(x, [(0, 0), *((r, r) for r in reach), (0, 0)])
    for displacement in displacements:
        starts = [r + v * d for r, v, d in zip(reach, displacement, dilation, strict=True)]
        window = [slice(start, start + size) for start, size in zip(starts, x.shape[1:-1], strict=True)]
        yield x * padded[(slice(None), *window)]


@functools.cache
def _displacements(kernel: Shape) -> tuple[list[Shape], np.ndarray]:
    """The displacements between kernel positions, from the earlier to the later one; and for each pair of positions, `[P, P]`,
    which of the sums it is, these being sorted by displacement and by the earlier position.
    """
    positions = list(itertools.product(*(range(k) for k in kernel)))

    def between(p: Shape, q: Shape) -> Shape:
        return tuple(b - a for a, b in zip(p, q, strict=True))

    pairs = {(p, q): (min(p, q), max(p, q)) for p in positions for q in positions}
    displacements = sorted({between(*pair) for pair in pairs.values()})
    index = [
        [
            displacements.index(between(*pairs[p, q])) * len(positions) + positions.index(pairs[p, q][0])
            for q in positions
        ]
        for p in positions
    ]
    return displacements, np.array(index, "int32")
