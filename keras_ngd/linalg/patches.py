"""Sums over the patches of a convolution's input, without storing the patches where that can be avoided.

Patches are ordered as Keras kernels are: `kernel.reshape(-1, filters)`, the kernel positions slowest (last spatial axis
fastest among them), the channel fastest of all.
"""

import itertools
import math

import numpy as np
from keras import ops

from keras_ngd import backend


def pad_and_crop_sizes(size, kernel, stride, dilation, padding):
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


def _spatial_sizes(x):
    dynamic = ops.shape(x)
    return [x.shape[i] if x.shape[i] is not None else dynamic[i] for i in range(1, len(x.shape) - 1)]


def _windows(x, kernel, strides, dilation, padding):
    """Yields, for each kernel position in order, the input it sees at every output: `[n, *outputs, c]`."""
    geometry = [
        pad_and_crop_sizes(*axis, padding) for axis in zip(_spatial_sizes(x), kernel, strides, dilation, strict=True)
    ]
    widths = [(0, 0)]
    for before, after, _ in geometry:
        widths.append((before, max(after, 0) if isinstance(after, int) else ops.maximum(after, 0)))
    x = ops.pad(x, [*widths, (0, 0)])
    for position in itertools.product(*(range(k) for k in kernel)):
        starts = [p * d for p, d in zip(position, dilation, strict=True)]
        slices = [
            slice(start, start + (outputs - 1) * stride + 1, stride)
            for start, stride, (_, _, outputs) in zip(starts, strides, geometry, strict=True)
        ]
        yield x[(slice(None), *slices)]


def unfold(x, kernel, strides, dilation, padding):
    """The patches themselves, `[n, *outputs, prod(kernel), c]`."""
    return ops.stack(list(_windows(x, kernel, strides, dilation, padding)), axis=-2)


def patch_sums(x, kernel, strides, dilation, padding):
    """Sum of the patches over the outputs of each example, `[n, prod(kernel), c]`, and the number of outputs."""
    spatial = tuple(range(1, len(x.shape) - 1))
    windows = list(_windows(x, kernel, strides, dilation, padding))
    outputs = math.prod(_spatial_sizes(windows[0]))
    return ops.stack([ops.sum(w, axis=spatial) for w in windows], axis=1), outputs


def prefers_displacements(x, kernel, strides, dilation):
    """Whether `patch_gram` applies: stride 1, no dilation, one or two axes, and a map no smaller than the kernel."""
    if len(kernel) > 2 or max(strides) > 1 or max(dilation) > 1 or max(kernel) == 1:
        return False
    return all(size is not None and size >= k for size, k in zip(x.shape[1:-1], kernel, strict=True))


def patch_gram(x, kernel, padding):
    """`sum over outputs of patch patch^T` of a stride-1 convolution, from displacements, no patch stored.

    Were the input infinitely extended by zeros, entry `(p, q)` would depend on the displacement `q - p` alone, and all
    displacements together are one convolution's kernel gradient, of the input with itself. What that counts too much
    lies at output positions beyond the border, where patches see only the outermost rows and columns; it is the same
    sum in one dimension fewer, and is subtracted, so that the result is exact.

    Args:
        x: `[n, w, c]` or `[n, h, w, c]`, each axis at least as long as the kernel's.
        kernel: the kernel's size, one or two ints.
        padding: `"valid"`, `"same"` or `"causal"`.

    Returns:
        `[prod(kernel) * c, prod(kernel) * c]`, symmetric.
    """
    borders = [pad_and_crop_sizes(s, k, 1, 1, padding)[:2] for s, k in zip(x.shape[1:-1], kernel, strict=True)]
    if len(kernel) == 1:
        gram = _line_gram(x, kernel[0], *borders[0])
    else:
        gram = _plane_gram(x, kernel, borders)
    width = math.prod(kernel) * x.shape[-1]
    return ops.reshape(gram, (width, width))


def _frames(kernel, before, after):
    """For each output beyond the border of one axis: the kernel positions that see data, and which data.

    Yields `(first, last, rows)`: positions `first .. last` see the rows `rows`, counted from the end if negative.
    """
    for y in range(-(kernel - 1), -before):
        yield -y, kernel - 1, [y + p for p in range(-y, kernel)]
    for beyond in range(kernel - 1 - after):
        yield 0, beyond, [-1 - beyond + p for p in range(beyond + 1)]


def _table_index(kernel):
    """Row of `(q - p) + (kernel - 1)` in a table of displacements, for all `p`, `q` of one axis."""
    return np.arange(kernel)[None, :] - np.arange(kernel)[:, None] + kernel - 1


def _plane_gram(x, kernel, borders):
    (kh, kw), c = kernel, x.shape[-1]
    extended = ops.pad(x, [(0, 0), (0, kh - 1), (kw - 1, kw - 1), (0, 0)])
    seen = backend.filter_gradient(extended, x, (kh, 2 * kw - 1))
    table = ops.concatenate([ops.flip(seen[1:], (0, 1)), ops.transpose(seen, (0, 1, 3, 2))], axis=0)
    rows, columns = _table_index(kh), _table_index(kw)
    index = rows[:, None, :, None] * (2 * kw - 1) + columns[None, :, None, :]
    blocks = ops.take(ops.reshape(table, (-1, c, c)), index.reshape(-1), axis=0)
    gram = ops.transpose(ops.reshape(blocks, (kh * kw, kh * kw, c, c)), (0, 2, 1, 3))
    gram = ops.reshape(gram, (kh, kw, c, kh, kw, c))
    for first, last, seen_rows in _frames(kh, *borders[0]):
        count = last - first + 1
        line = _stack_lines([x[:, r] for r in seen_rows])
        excess = ops.reshape(_line_gram(line, kw, kw - 1, kw - 1), (kw, count, c, kw, count, c))
        excess = ops.transpose(excess, (1, 0, 2, 4, 3, 5))
        edge = (first, kh - 1 - last)
        gram = gram - ops.pad(excess, [edge, (0, 0), (0, 0), edge, (0, 0), (0, 0)])
    for first, last, seen_columns in _frames(kw, *borders[1]):
        count = last - first + 1
        line = _stack_lines([x[:, :, r] for r in seen_columns])
        excess = ops.reshape(_line_gram(line, kh, *borders[0]), (kh, count, c, kh, count, c))
        edge = (first, kw - 1 - last)
        gram = gram - ops.pad(excess, [(0, 0), edge, (0, 0), (0, 0), edge, (0, 0)])
    return gram


def _stack_lines(lines):
    if len(lines) == 1:
        return lines[0]
    return ops.concatenate(lines, axis=-1)


def _line_gram(x, kernel, before, after):
    """`patch_gram` of a `[n, w, c]` line padded by `before` and `after`: `[kernel, c, kernel, c]`."""
    size, c = x.shape[1], x.shape[-1]

    def flat(t):
        return ops.reshape(t, (-1, c))

    ahead = [
        backend.matmul(flat(x[:, : size - d]), flat(x[:, d:]), transpose_a=True) for d in range(min(kernel, size))
    ]
    ahead += [ops.zeros_like(ahead[0])] * (kernel - len(ahead))
    table = ops.stack([ops.transpose(m) for m in ahead[:0:-1]] + ahead)
    blocks = ops.take(table, _table_index(kernel).reshape(-1), axis=0)
    gram = ops.transpose(ops.reshape(blocks, (kernel, kernel, c, c)), (0, 2, 1, 3))
    for first, last, rows in _frames(kernel, before, after):
        patch = _stack_lines([x[:, r] for r in rows])
        count = last - first + 1
        excess = ops.reshape(backend.matmul(patch, patch, transpose_a=True), (count, c, count, c))
        edge = (first, kernel - 1 - last)
        gram = gram - ops.pad(excess, [edge, (0, 0), edge, (0, 0)])
    return gram
