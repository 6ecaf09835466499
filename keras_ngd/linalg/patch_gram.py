"""The products of a convolution's patches with themselves, from displacements of its input, without storing the patches.

Were every output position at which a patch sees any data counted, the block of kernel positions `p` and `q` would depend on
the displacement `q - p` alone, and all displacements together are one convolution's kernel gradient, of the input with itself.
The outputs counted too much lie beyond the border. Those in a row above or below the convolution's own see a few of the
outermost rows of the input, through windows of columns that are the convolution's; those in a column to the left or right
see a few of the outermost columns, through windows of rows of which none is left out. The products of these windows with
themselves are taken off. All these sums stand in one table of `c x c` blocks, and one constant matrix makes the result of it.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_ngd import backend
from keras_ngd.linalg import patches
from keras_ngd.typing import Tensor


class Frame(NamedTuple):
    """An output beyond the border of one axis: its kernel positions `first .. last` see data, from entry `data` on."""

    first: int
    last: int
    data: int

    @property
    def size(self) -> int:
        return self.last - self.first + 1


def frames(size: int, kernel: int, border: tuple[int, int]) -> tuple[tuple[Frame, ...], ...]:
    """The outputs beyond the border of one axis, grouped by how many entries they see."""
    before, after = border
    found = [Frame(-y, kernel - 1, 0) for y in range(-(kernel - 1), -before)]
    found += [Frame(0, beyond, size - 1 - beyond) for beyond in range(kernel - 1 - after)]
    found.sort(key=lambda frame: frame.size)
    return tuple(tuple(group) for _, group in itertools.groupby(found, key=lambda frame: frame.size))


def patch_gram(x: Tensor, kernel: Sequence[int], padding: str) -> Tensor:
    """`sum over outputs of patch patch^T` of a stride-1 convolution.

    Args:
        x: `[n, w, c]` or `[n, h, w, c]`, each axis at least as long as the kernel's.
        kernel: the kernel's size, one or two ints.
        padding: `"valid"`, `"same"` or `"causal"`.

    Returns:
        `[prod(kernel) * c, prod(kernel) * c]`, symmetric.
    """
    x, (kh, kw), (above, beside) = patches.as_image(x, kernel, padding)
    _, height, width, c = x.shape
    rows, columns = frames(height, kh, above), frames(width, kw, beside)
    table = [ops.reshape(_displacements(x, kh, kw), (-1, c, c))]
    for group in rows:
        lines = [ops.transpose(x[:, f.data : f.data + f.size], (0, 2, 1, 3)) for f in group]
        table.append(_window_products(lines, kw, beside, c))
    for group in columns:
        lines = [x[:, :, f.data : f.data + f.size] for f in group]
        table.append(_window_products(lines, kh, (kh - 1, kh - 1), c))
    table = ops.reshape(ops.concatenate(table), (-1, c * c))
    combination = ops.convert_to_tensor(_combination(kh, kw, rows, columns), table.dtype)
    half = ops.reshape(backend.matmul(combination, table), (kh * kw, kh * kw, c, c))
    half = ops.reshape(ops.transpose(half, (0, 2, 1, 3)), (kh * kw * c, kh * kw * c))
    return half + ops.transpose(half)


# Columns of the products that displacements are read off under XLA: fewer run below a processor's rate, more waste it.
_PRODUCT_WIDTH = 128


def _displacements(x: Tensor, kh: int, kw: int) -> Tensor:
    """`sum over n, y, z of x[n, y + u, z + v] x[n, y, z]^T` for `u` from 0 to `kh - 1` and `v` from `1 - kw` to `kw - 1`.

    This is the kernel gradient of a convolution of `x` with itself, and TensorFlow's runtime has a fast one. XLA's CPU
    compiler has not, least of all inside conditionals, where it leaves all but plain forward convolutions as naive
    loops (a hundred times slower); there, runs of neighbouring pixels are multiplied with themselves and their
    surroundings, and the displacements summed from the products' blocks.

    Returns:
        `[kh, 2 kw - 1, c, c]`.
    """
    _, height, width, c = x.shape
    span = 2 * kw - 1
    if not backend.under_xla():
        padded = ops.pad(x, [(0, 0), (0, kh - 1), (kw - 1, kw - 1), (0, 0)])
        return backend.filter_gradient(padded, x, (kh, span))
    run = min(max(_PRODUCT_WIDTH // c, 1), width)
    seen, runs = run + span - 1, -(-width // run)
    # The surroundings of a run of pixels are the runs from there on: so many, and so many pixels of the last.
    pieces, spare = -(-seen // run), runs * run - width
    last = seen - (pieces - 1) * run
    padded = ops.pad(x, [(0, 0), (0, 0), (kw - 1, spare + (pieces - 1) * run - (kw - 1)), (0, 0)])
    padded = ops.reshape(padded, (-1, height, runs + pieces - 1, run * c))
    shifted = [padded[:, :, i : i + runs, : (run if i < pieces - 1 else last) * c] for i in range(pieces)]
    surroundings = ops.reshape(ops.concatenate(shifted, axis=3), (-1, seen * c))
    center = ops.pad(x, [(0, 0), (0, 0), (0, spare), (0, 0)]) if spare else x
    products = []
    for u in range(kh):
        above = ops.pad(center[:, : height - u], [(0, 0), (u, 0), (0, 0), (0, 0)]) if u else center
        products.append(backend.matmul(surroundings, ops.reshape(above, (-1, run * c)), transpose_a=True))
    products = ops.transpose(ops.reshape(ops.stack(products), (kh, seen, c, run, c)), (0, 1, 3, 2, 4))
    offsets = np.arange(seen)[:, None] - np.arange(run)[None, :]
    selection = (offsets[None] == np.arange(span)[:, None, None]).reshape(span, -1).astype("float32")
    sums = backend.matmul(ops.convert_to_tensor(selection, x.dtype), ops.reshape(products, (kh, -1, c * c)))
    return ops.reshape(sums, (kh, span, c, c))


def _window_products(lines: Sequence[Tensor], kernel: int, border: tuple[int, int], c: int) -> Tensor:
    """For each of several lines of equal size, the products of its windows with themselves, summed over the windows.

    A product with a constant matrix makes the windows: there is little of them, and a slice for each is more to compile.

    Args:
        lines: `[n, length, count, c]` each.
        kernel, border: of the windows, and what pads a line at its ends.
        c: the number of channels.

    Returns:
        The blocks `[lines * (kernel * count)^2, c, c]`, by line, and by the position in the kernel and the entry across the
        line, of both sides.
    """
    _, length, count, _ = lines[0].shape
    line = ops.stack(lines) if len(lines) > 1 else lines[0]
    windows = patches.visible_inputs(length, kernel, 1, 1, border[0], length + sum(border) - kernel + 1)
    windows = ops.convert_to_tensor(windows.reshape(-1, length), line.dtype)
    rows = backend.matmul(windows, ops.reshape(line, (-1, length, count * c)))
    side = kernel * count
    rows = ops.reshape(rows, (len(lines), -1, side * c))
    products = ops.reshape(backend.matmul(rows, rows, transpose_a=True), (len(lines), side, c, side, c))
    return ops.reshape(ops.transpose(products, (0, 1, 3, 2, 4)), (-1, c, c))


@functools.cache
def _combination(
    kh: int, kw: int, rows: tuple[tuple[Frame, ...], ...], columns: tuple[tuple[Frame, ...], ...]
) -> np.ndarray:
    """`[(kh kw)^2, blocks of the table]`: half of the result, that is what lies below its diagonal and half of what is on it."""
    span = 2 * kw - 1
    of_rows, of_columns = list(itertools.chain(*rows)), list(itertools.chain(*columns))
    sides = [kw * f.size for f in of_rows] + [kh * f.size for f in of_columns]
    starts = np.cumsum([kh * span, *(side**2 for side in sides)])
    result = np.zeros((kh, kw, kh, kw, starts[-1]), "float32")

    def take_off(i: int, f: Frame, row: np.ndarray, across: tuple[int, int], along: tuple[int, int]) -> None:
        """Takes the block of line `i` off, if both kernel positions `across` the line see it."""
        if f.first <= min(across) and max(across) <= f.last:
            p, q = (a * f.size + b - f.first for a, b in zip(along, across, strict=True))
            row[starts[i] + p * sides[i] + q] -= 1

    for py, px, qy, qx in np.ndindex(kh, kw, kh, kw):
        if (py, px) < (qy, qx):
            continue
        row = result[py, px, qy, qx]
        row[(py - qy) * span + kw - 1 + px - qx] += 1
        for i, f in enumerate(of_rows):
            take_off(i, f, row, (py, qy), (px, qx))
        for i, f in enumerate(of_columns, len(of_rows)):
            take_off(i, f, row, (px, qx), (py, qy))
        if (py, px) == (qy, qx):
            row /= 2
    return result.reshape(-1, starts[-1])
