"""Diagonal blocks of the sums over patches, at the cost of what the blocks alone need."""

import functools
from collections.abc import Sequence

import numpy as np
from keras import ops

from keras_ngd import backend
from keras_ngd.linalg import diagonal, patch_gram, patches
from keras_ngd.typing import Parts, Shape, Tensor


def patch_gram_blocks(x: Tensor, kernel: Sequence[int], padding: str, parts: Parts) -> list[Tensor]:
    """Diagonal blocks of `patch_gram.patch_gram`, by part of `linalg.diagonal`, each `[1, count, size, size]`.

    Blocks that lie inside one kernel position need no displacement: every position sees the whole input but for its
    border, so that one product of the input with itself serves all positions. Blocks over several positions need the
    displacements between these.
    """
    channels, size = x.shape[-1], parts[0][1]
    if len(parts) == 1 and channels % size == 0:
        return [ops.expand_dims(position_grams(x, kernel, padding, size), 0)]
    return diagonal.blocks_of(ops.expand_dims(patch_gram.patch_gram(x, kernel, padding), 0), parts)


def position_grams(x: Tensor, kernel: Sequence[int], padding: str, size: int) -> Tensor:
    """What each kernel position sees, times itself, in blocks of `size` channels.

    Args:
        x, kernel, padding: as for `patch_gram.patch_gram`.
        size: a divisor of the number of channels.

    Returns:
        `[prod(kernel) * channels / size, size, size]`.
    """
    x, kernel, borders = patches.as_image(x, kernel, padding)
    _, height, width, channels = x.shape
    chunks = channels // size
    x = ops.transpose(ops.reshape(x, (-1, height, width, chunks, size)), (3, 0, 1, 2, 4)) if chunks > 1 else x[None]
    rows, columns, combination = _seen((height, width), kernel, borders)
    parts = [[x], [x[:, :, i] for i in rows], [x[:, :, :, j] for j in columns]]
    parts.append([x[:, :, i, j] for i in rows for j in columns])
    table = ops.concatenate([_grams(part, chunks, size) for part in parts if part])
    grams = backend.matmul(ops.convert_to_tensor(combination, x.dtype), table)
    return ops.reshape(grams, (-1, size, size))


def _grams(pieces: Sequence[Tensor], chunks: int, size: int) -> Tensor:
    """One row for each of several equally large pieces of the input: the products of its chunks with themselves."""
    pixels = ops.stack(pieces) if len(pieces) > 1 else pieces[0]
    pixels = ops.reshape(pixels, (len(pieces) * chunks, -1, size))
    if size == 1:
        grams = ops.sum(ops.square(pixels), axis=1)
    else:
        grams = backend.matmul(pixels, pixels, transpose_a=True)
    return ops.reshape(grams, (len(pieces), chunks * size * size))


@functools.cache
def _seen(sizes: Shape, kernel: Shape, borders: tuple[tuple[int, int], ...]) -> tuple[list[int], list[int], np.ndarray]:
    """Rows and columns that some kernel position does not see; and what each position sees, as a combination of the
    whole input (1), these rows and columns (-1), and their crossings (1).
    """
    hidden = []
    for size, k, (before, after) in zip(sizes, kernel, borders, strict=True):
        outputs = before + size + after - k + 1
        hidden.append([[y for y in range(size) if not 0 <= y - p + before < outputs] for p in range(k)])
    rows, columns = (sorted(set().union(*axis)) for axis in hidden)
    row_table = np.array([[-float(i in unseen) for i in rows] for unseen in hidden[0]]).reshape(kernel[0], len(rows))
    column_table = np.array([[-float(j in unseen) for j in columns] for unseen in hidden[1]])
    column_table = column_table.reshape(kernel[1], len(columns))
    combination = [
        np.concatenate([[1.0], of_row, of_column, np.outer(of_row, of_column).ravel()])
        for of_row in row_table
        for of_column in column_table
    ]
    return rows, columns, np.array(combination, "float32")
