"""The patches of a convolution's input, and their sums over the outputs.

Patches are ordered as Keras kernels are: `kernel.reshape(-1, filters)`, the kernel positions slowest (last spatial axis
fastest among them), the channel fastest of all.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_ngd import backend
from keras_ngd.typing import Shape, Tensor


def pad_and_crop_sizes(size: Any, kernel: int, stride: int, dilation: int, padding: str) -> tuple[int, Any, Any]:
    """`(before, after, outputs)` of one spatial axis; `size` may be a tensor where the axis is not static.

    `after` may be negative, when a strided `valid` window does not reach the last inputs.
    """
    reach = (kernel - 1) * dilation + 1
    if padding == "causal":
        before, outputs = reach - 1, (size - 1) // stride + 1
    elif padding == "same":
        outputs = (size + stride - 1) // stride
        if stride == 1:
            before = (reach - 1) // 2
        elif isinstance(size, int):
            before = max((outputs - 1) * stride + reach - size, 0) // 2
        else:
            before = ops.maximum((outputs - 1) * stride + reach - size, 0) // 2
    else:
        before, outputs = 0, (size - reach) // stride + 1
    return before, (outputs - 1) * stride + reach - size - before, outputs


def spatial_sizes(x: Tensor) -> list[Any]:
    """The sizes of the spatial axes of `[n, *sizes, c]`: ints, or tensors where they are not static."""
    dynamic = ops.shape(x)
    return [x.shape[i] if x.shape[i] is not None else dynamic[i] for i in range(1, len(x.shape) - 1)]


def channels_last(x: Tensor) -> Tensor:
    """`[n, c, *sizes]` as `[n, *sizes, c]`."""
    return ops.transpose(x, (0, *range(2, len(x.shape)), 1))


def at_least_zero(size: Any) -> Any:
    """`max(size, 0)` of an int or a tensor."""
    return max(size, 0) if isinstance(size, int) else ops.maximum(size, 0)


def _padded(x: Tensor, geometry: Sequence[tuple[Any, Any, Any]]) -> Tensor:
    """An input with the zeros around it that windows see, of what `pad_and_crop_sizes` gives for its axes."""
    return ops.pad(x, [(0, 0), *((before, at_least_zero(after)) for before, after, _ in geometry), (0, 0)])


def _windows(x: Tensor, axis: int, kernel: int, stride: int, dilation: int, outputs: Any) -> list[Tensor]:
    """For each position of one axis' kernel the input that it sees at every output, of an input that is padded."""
    before = (slice(None),) * axis
    return [x[(*before, slice(p * dilation, p * dilation + (outputs - 1) * stride + 1, stride))] for p in range(kernel)]


def unfold(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int], padding: str) -> Tensor:
    """The patches themselves, `[n, *outputs, prod(kernel), c]`: axis by axis, since a compiler takes time for each slice."""
    axes = list(zip(spatial_sizes(x), kernel, strides, dilation, strict=True))
    geometry = [pad_and_crop_sizes(*axis, padding) for axis in axes]
    x = _padded(x, geometry)
    for i, ((_, k, stride, d), (_, _, outputs)) in enumerate(zip(axes, geometry, strict=True)):
        x = ops.stack(_windows(x, i + 1, k, stride, d, outputs), axis=-2)
    shape = [-1, *(outputs for _, _, outputs in geometry), math.prod(kernel), x.shape[-1]]
    return ops.reshape(x, shape)


def patch_sums(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int], padding: str
) -> tuple[Tensor, Any]:
    """Sum of the patches over the outputs of each example, `[n, prod(kernel), c]`, and the number of outputs.

    Axis by axis, each by a product with a constant matrix that tells which inputs a kernel position sees: one pass over
    `x`, where slices for all positions would take as many passes as there are positions.
    """
    sizes, channels = spatial_sizes(x), x.shape[-1]
    axes = list(zip(sizes, kernel, strides, dilation, strict=True))
    geometry = [pad_and_crop_sizes(*axis, padding) for axis in axes]
    outputs = math.prod(outputs for _, _, outputs in geometry)
    if not all(isinstance(size, int) for size in sizes):
        sums = _padded(x, geometry)
        for (_, k, stride, d), (_, _, seen) in zip(axes, geometry, strict=True):
            windows = _windows(sums, 1, k, stride, d, seen)
            sums = ops.stack([ops.sum(window, axis=1) for window in windows], axis=-2)
        return ops.reshape(sums, (-1, math.prod(kernel), channels)), outputs
    sums = x
    for i, axis in enumerate(axes):
        sums = ops.reshape(sums, (-1, sizes[i], math.prod(sizes[i + 1 :]) * channels))
        sums = backend.matmul(ops.convert_to_tensor(_seen(*axis, padding), x.dtype), sums)
    return ops.reshape(sums, (-1, math.prod(kernel), channels)), outputs


def _seen(size: int, kernel: int, stride: int, dilation: int, padding: str) -> np.ndarray:
    """`[kernel, size]`: at how many outputs each position of one axis' kernel sees each input, 0 or 1."""
    before, _, outputs = pad_and_crop_sizes(size, kernel, stride, dilation, padding)
    return visible_inputs(size, kernel, stride, dilation, before, outputs).sum(axis=0)


@functools.cache
def visible_inputs(size: int, kernel: int, stride: int, dilation: int, before: int, outputs: int) -> np.ndarray:
    """`[outputs, kernel, size]`: which input of one axis each output sees at each position of the kernel, 0 or 1."""
    inputs = np.arange(outputs)[:, None] * stride + np.arange(kernel) * dilation - before
    return (inputs[..., None] == np.arange(size)).astype("float32")


def patches_at(
    x: Tensor, positions: Tensor, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int], padding: str
) -> Tensor:
    """The patches of some outputs: `[n, p, prod(kernel), c]` for the flat output positions `[n, p]`."""
    sizes = spatial_sizes(x)
    geometry = [pad_and_crop_sizes(*axis, padding) for axis in zip(sizes, kernel, strides, dilation, strict=True)]
    widths = [(before, at_least_zero(after)) for before, after, _ in geometry]
    x = ops.pad(x, [(0, 0), *widths, (0, 0)])
    padded = [size + before + after for size, (before, after) in zip(sizes, widths, strict=True)]
    steps = [math.prod(padded[i + 1 :]) for i in range(len(padded))]
    start, left = ops.zeros_like(positions), positions
    for i, (_, _, outputs) in reversed(list(enumerate(geometry))):
        start = start + left % outputs * (strides[i] * steps[i])
        left = left // outputs
    offsets = [
        sum(p * d * step for p, d, step in zip(position, dilation, steps, strict=True))
        for position in itertools.product(*(range(k) for k in kernel))
    ]
    first = ops.cast(ops.arange(ops.shape(x)[0]) * math.prod(padded), positions.dtype)
    index = ops.expand_dims(start + ops.expand_dims(first, 1), 2) + ops.stack(
        [ops.cast(offset, positions.dtype) for offset in offsets]
    )
    return ops.take(ops.reshape(x, (-1, x.shape[-1])), index, axis=0)


# Patches no longer than this are stored where the corners of a map are more than so many, or a map is no larger than so many
# kernels: what displacements count too much takes longer there than the patches, and far longer to compile. All patches of an
# example have no more than so many entries then.
_NARROW, _CORNERS, _KERNELS, _ENTRIES = 256, 16, 4, 2**17


def prefers_displacements(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int], padding: str
) -> bool:
    """Whether `patch_gram.patch_gram` applies: stride 1, no dilation, one or two axes, and a map no smaller than the kernel.

    It does not for the short patches of small maps, or of maps with many corners; see above.
    """
    if len(kernel) > 2 or max(strides) > 1 or max(dilation) > 1 or max(kernel) == 1:
        return False
    sizes = x.shape[1:-1]
    if not all(size is not None and size >= k for size, k in zip(sizes, kernel, strict=True)):
        return False
    width, axes = math.prod(kernel) * x.shape[-1], list(zip(sizes, kernel, strict=True))
    borders = [pad_and_crop_sizes(size, k, 1, 1, padding) for size, k in axes]
    corners = math.prod(2 * (k - 1) - before - after for (_, k), (before, after, _) in zip(axes, borders, strict=True))
    intricate = (len(kernel) == 2 and corners > _CORNERS) or any(size < _KERNELS * k for size, k in axes)
    entries = width * math.prod(outputs for _, _, outputs in borders)
    return not (intricate and width <= _NARROW and entries <= _ENTRIES)


def as_image(x: Tensor, kernel: Sequence[int], padding: str) -> tuple[Tensor, Shape, tuple[tuple[int, int], ...]]:
    """A stride-1 convolution over one axis as one over two: its input, kernel and what pads each axis."""
    borders = [pad_and_crop_sizes(s, k, 1, 1, padding)[:2] for s, k in zip(x.shape[1:-1], kernel, strict=True)]
    if len(kernel) == 1:
        return ops.expand_dims(x, 1), (1, *kernel), ((0, 0), *borders)
    return x, tuple(kernel), tuple(borders)
