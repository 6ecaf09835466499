"""Sums over the patches of a convolution's input, without storing the patches where that can be avoided.

Patches are ordered as Keras kernels are: `kernel.reshape(-1, filters)`, the kernel positions slowest (last spatial axis
fastest among them), the channel fastest of all.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
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


def _windows(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int], padding: str
) -> Iterator[Tensor]:
    """Yields, for each kernel position in order, the input it sees at every output: `[n, *outputs, c]`."""
    geometry = [
        pad_and_crop_sizes(*axis, padding) for axis in zip(spatial_sizes(x), kernel, strides, dilation, strict=True)
    ]
    x = ops.pad(x, [(0, 0), *((before, at_least_zero(after)) for before, after, _ in geometry), (0, 0)])
    for position in itertools.product(*(range(k) for k in kernel)):
        starts = [p * d for p, d in zip(position, dilation, strict=True)]
        slices = [
            slice(start, start + (outputs - 1) * stride + 1, stride)
            for start, stride, (_, _, outputs) in zip(starts, strides, geometry, strict=True)
        ]
        yield x[(slice(None), *slices)]


def unfold(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int], padding: str) -> Tensor:
    """The patches themselves, `[n, *outputs, prod(kernel), c]`."""
    return ops.stack(list(_windows(x, kernel, strides, dilation, padding)), axis=-2)


def patch_sums(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int], padding: str
) -> tuple[Tensor, Any]:
    """Sum of the patches over the outputs of each example, `[n, prod(kernel), c]`, and the number of outputs.

    Axis by axis, each by a product with a constant matrix that tells which inputs a kernel position sees: one pass over
    `x`, where slices for all positions would take as many passes as there are positions.
    """
    sizes = spatial_sizes(x)
    axes = list(zip(sizes, kernel, strides, dilation, strict=True))
    if not all(isinstance(size, int) for size in sizes):
        windows = list(_windows(x, kernel, strides, dilation, padding))
        spatial = tuple(range(1, len(x.shape) - 1))
        return ops.stack([ops.sum(w, axis=spatial) for w in windows], axis=1), math.prod(spatial_sizes(windows[0]))
    channels, sums = x.shape[-1], x
    for i, axis in enumerate(axes):
        sums = ops.reshape(sums, (-1, sizes[i], math.prod(sizes[i + 1 :]) * channels))
        sums = backend.matmul(ops.convert_to_tensor(_seen(*axis, padding), x.dtype), sums)
    outputs = math.prod(pad_and_crop_sizes(*axis, padding)[2] for axis in axes)
    return ops.reshape(sums, (-1, math.prod(kernel), channels)), outputs


@functools.cache
def _seen(size: int, kernel: int, stride: int, dilation: int, padding: str) -> np.ndarray:
    """`[kernel, size]`: at how many outputs each position of one axis' kernel sees each input, 0 or 1."""
    before, _, outputs = pad_and_crop_sizes(size, kernel, stride, dilation, padding)
    inputs = np.arange(kernel)[:, None] * dilation + np.arange(outputs) * stride - before
    return (inputs[..., None] == np.arange(size)).sum(axis=1).astype("float32")


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
    """Whether `patch_gram` applies: stride 1, no dilation, one or two axes, and a map no smaller than the kernel.

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


def patch_gram(x: Tensor, kernel: Sequence[int], padding: str) -> Tensor:
    """`sum over outputs of patch patch^T` of a stride-1 convolution, from displacements, no patch stored.

    Were every output position at which a patch sees any data counted, the block of kernel positions `p` and `q` would
    depend on the displacement `q - p` alone, and all displacements together are one convolution's kernel gradient, of
    the input with itself. The positions counted too much lie beyond the border, in rows and columns where patches see
    only the outermost data: they are displacements along one axis, less what a row and a column have in common.
    All these sums stand in one table of `c x c` blocks, and one constant matrix of 1, 0 and -1 makes the result of it.

    Args:
        x: `[n, w, c]` or `[n, h, w, c]`, each axis at least as long as the kernel's.
        kernel: the kernel's size, one or two ints.
        padding: `"valid"`, `"same"` or `"causal"`.

    Returns:
        `[prod(kernel) * c, prod(kernel) * c]`, symmetric.
    """
    x, kernel, borders = as_image(x, kernel, padding)
    (kh, kw), c = kernel, x.shape[-1]
    rows, columns = (list(_frames(*axis)) for axis in zip(x.shape[1:-1], kernel, borders, strict=True))

    # A displacement upwards, or in the same row to the left, is the transpose of its opposite.
    table = [ops.reshape(_displacements(x, (0, 0), (0, kw - 1)), (-1, c, c))]
    if kh > 1:
        table.append(ops.reshape(_displacements(x, (1, kh - 1), (1 - kw, kw - 1)), (-1, c, c)))
    lines = [(_stack([x[:, i] for i in data]), kw) for *_, data in rows]
    lines += [(_stack([x[:, :, i] for i in data]), kh) for *_, data in columns]
    table += [_blocks(_displacements(ops.expand_dims(line, 1), (0, 0), (0, size - 1)), c) for line, size in lines]
    for *_, row_data in rows:
        for *_, column_data in columns:
            corner = _stack([x[:, i, j] for i in row_data for j in column_data])
            table.append(_blocks(backend.matmul(corner, corner, transpose_a=True), c))
    table = ops.concatenate(table)
    table = ops.reshape(ops.concatenate([table, ops.transpose(table, (0, 2, 1))]), (-1, c * c))
    combination = ops.convert_to_tensor(_combination(kernel, rows, columns), table.dtype)
    gram = ops.reshape(backend.matmul(combination, table), (kh * kw, kh * kw, c, c))
    return ops.reshape(ops.transpose(gram, (0, 2, 1, 3)), (kh * kw * c, kh * kw * c))


def _stack(lines: Sequence[Tensor]) -> Tensor:
    return lines[0] if len(lines) == 1 else ops.concatenate(lines, axis=-1)


# Columns of the products that displacements are read off under XLA: fewer run below a processor's rate, more waste it.
_PRODUCT_WIDTH = 128


def _displacements(x: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """`sum over n, y, z of x[n, y + u, z + v] x[n, y, z]^T` for `u` and `v` in two ranges, the last included.

    This is the kernel gradient of a convolution of `x` with itself, and TensorFlow's runtime has a fast one. XLA's CPU
    compiler has not, least of all inside conditionals, where it leaves all but plain forward convolutions as naive
    loops (a hundred times slower); there, runs of neighbouring pixels are multiplied with themselves and their
    surroundings, and the displacements summed from the products' blocks.

    Returns:
        `[number of u, number of v, c, c]`.
    """
    (up, down), (left, right) = rows, columns
    count, span = down - up + 1, right - left + 1
    _, height, width, c = x.shape
    if not backend.under_xla():
        padded = ops.pad(x[:, up:], [(0, 0), (0, down), (-left, right), (0, 0)])
        return backend.filter_gradient(padded, x, (count, span))
    run = min(max(_PRODUCT_WIDTH // c, 1), width)
    seen, runs = run + span - 1, -(-width // run)
    spare = runs * run - width
    center = ops.reshape(ops.pad(x, [(0, 0), (0, 0), (0, spare), (0, 0)]), (-1, run * c))
    padded = ops.pad(x[:, up:], [(0, 0), (0, down), (-left, right + spare), (0, 0)])
    surroundings = ops.stack([padded[:, :, i * run : i * run + seen] for i in range(runs)], axis=2)
    products = ops.stack(
        [
            backend.matmul(ops.reshape(surroundings[:, u : u + height], (-1, seen * c)), center, transpose_a=True)
            for u in range(count)
        ]
    )
    products = ops.transpose(ops.reshape(products, (count, seen, c, run, c)), (0, 1, 3, 2, 4))
    offsets = np.arange(seen)[:, None] - np.arange(run)[None, :]
    selection = (offsets[None] == np.arange(span)[:, None, None]).reshape(span, -1).astype("float32")
    sums = backend.matmul(ops.convert_to_tensor(selection, x.dtype), ops.reshape(products, (count, -1, c * c)))
    return ops.reshape(sums, (count, span, c, c))


def _blocks(products: Tensor, c: int) -> Tensor:
    """`[..., p * c, q * c]` as a list of blocks `[-1, c, c]`, in the order `(..., p, q)`."""
    count = products.shape[-1] // c
    products = ops.reshape(products, (-1, count, c, count, c))
    return ops.reshape(ops.transpose(products, (0, 1, 3, 2, 4)), (-1, c, c))


def _frames(size: int, kernel: int, border: tuple[int, int]) -> Iterator[tuple[int, int, list[int]]]:
    """For each output beyond the border of one axis: the kernel positions that see data, and which data.

    Yields `(first, last, data)`: positions `first .. last` see the entries `data`.
    """
    before, after = border
    for y in range(-(kernel - 1), -before):
        yield -y, kernel - 1, [y + p for p in range(-y, kernel)]
    for beyond in range(kernel - 1 - after):
        yield 0, beyond, [size - 1 - beyond + p for p in range(beyond + 1)]


@functools.cache
def _combination_of(
    kernel: Shape, rows: tuple[tuple[int, int], ...], columns: tuple[tuple[int, int], ...]
) -> np.ndarray:
    (kh, kw), span = kernel, 2 * kernel[1] - 1
    parts: list[tuple[Any, int]] = [("same row", kw), ("below", (kh - 1) * span)]
    parts += [(("row", r), kw * (r[1] - r[0] + 1) ** 2) for r in rows]
    parts += [(("column", r), kh * (r[1] - r[0] + 1) ** 2) for r in columns]
    parts += [((r, s), ((r[1] - r[0] + 1) * (s[1] - s[0] + 1)) ** 2) for r in rows for s in columns]
    ends = np.cumsum([size for _, size in parts])
    start = {part: end - size for (part, size), end in zip(parts, ends, strict=True)}
    transposed = ends[-1]
    result = np.zeros((kh, kw, kh, kw, 2 * transposed), "float32")

    def line(part: Any, positions: tuple[int, int], p: Any, q: Any) -> int:
        """Where the table has the displacement from `p` to `q` of a line's channels."""
        first, last = positions
        count, flip = last - first + 1, q[0] > p[0]
        (p, i), (q, j) = (q, p) if flip else (p, q)
        return start[part] + ((p - q) * count + i - first) * count + j - first + flip * transposed

    for py, px, qy, qx in np.ndindex(kh, kw, kh, kw):
        row = result[py, px, qy, qx]
        flip = (py, px) < (qy, qx)
        dy, dx = (qy - py, qx - px) if flip else (py - qy, px - qx)
        main = start["same row"] + dx if dy == 0 else start["below"] + (dy - 1) * span + dx + kw - 1
        row[main + flip * transposed] += 1
        inside_rows = [r for r in rows if r[0] <= min(py, qy) and max(py, qy) <= r[1]]
        inside_columns = [r for r in columns if r[0] <= min(px, qx) and max(px, qx) <= r[1]]
        for r in inside_rows:
            row[line(("row", r), r, (px, py), (qx, qy))] -= 1
        for r in inside_columns:
            row[line(("column", r), r, (py, px), (qy, qx))] -= 1
        for r in inside_rows:
            for s in inside_columns:
                width = s[1] - s[0] + 1
                i, j = (py - r[0]) * width + px - s[0], (qy - r[0]) * width + qx - s[0]
                row[start[r, s] + i * (r[1] - r[0] + 1) * width + j] += 1
    return result.reshape(-1, 2 * transposed)


def _combination(
    kernel: Sequence[int], rows: Iterable[tuple[int, int, list[int]]], columns: Iterable[tuple[int, int, list[int]]]
) -> np.ndarray:
    return _combination_of(tuple(kernel), tuple(r[:2] for r in rows), tuple(c[:2] for c in columns))
