"""Block-diagonal matrices, of which only the diagonal blocks exist.

A dimension is cut into blocks of one size; what is left over is a smaller last block, and a bias is a block of its own. Blocks
of one size are stored together, as `[k, count, size, size]` for `k` matrices: one such array is a *part*, and its
`(count, size)` describes it. Nothing is padded.
"""

from collections.abc import Iterator, Sequence

from keras import ops

from keras_ngd import backend
from keras_ngd.typing import Parts, Shape, Tensor


def partition(width: int, use_bias: bool, split: int | None) -> Parts:
    """The parts of a dimension of `width`, and one more where there is a bias: a tuple of `(count, size)`.

    A `split` of at least the whole dimension (or None) leaves it in one piece, the bias included. Otherwise the bias, if
    any, is the last part.
    """
    whole = width + int(use_bias)
    if split is None or split >= whole:
        return ((1, whole),)
    parts = [(width // split, split)] if width >= split else []
    if width % split:
        parts.append((1, width % split))
    return (*parts, (1, 1)) if use_bias else tuple(parts)


def dimension(parts: Parts) -> int:
    """The dimension that `parts` partition."""
    return sum(count * size for count, size in parts)


def _spans(parts: Parts) -> Iterator[tuple[int, int, int, int]]:
    start = 0
    for count, size in parts:
        yield start, start + count * size, count, size
        start += count * size


def blocks_of(matrices: Tensor, parts: Parts) -> list[Tensor]:
    """The diagonal blocks of `[k, d, d]`, by part."""
    result = []
    for start, stop, count, size in _spans(parts):
        inner = ops.reshape(matrices[:, start:stop, start:stop], (-1, count, size, count, size))
        same = ops.reshape(ops.eye(count, dtype=matrices.dtype), (1, count, 1, count, 1))
        result.append(ops.sum(inner * same, axis=3))
    return result


def gram_blocks(rows: Tensor, parts: Parts) -> list[Tensor]:
    """The diagonal blocks of `rows^T rows`, `[k, n, d]`, by part; the other blocks are never computed."""
    result = []
    for start, stop, count, size in _spans(parts):
        piece = rows[:, :, start:stop]
        if size == 1:
            result.append(ops.reshape(ops.sum(ops.square(piece), axis=1), (-1, count, 1, 1)))
            continue
        if count > 1:
            piece = ops.transpose(ops.reshape(piece, (piece.shape[0], -1, count, size)), (0, 2, 1, 3))
        else:
            piece = ops.expand_dims(piece, 1)
        result.append(backend.matmul(piece, piece, transpose_a=True))
    return result


def multiply(blocks: Sequence[Tensor | None], x: Tensor, parts: Parts, transpose: bool = False) -> Tensor:
    """The block-diagonal matrices, or their transposes, times `x`, `[k, d, m]`. A part that is None is the identity."""
    products = []
    for block, (start, stop, count, size) in zip(blocks, _spans(parts), strict=True):
        if block is None:
            products.append(x[:, start:stop])
            continue
        # `m` may be unknown, `k` never is.
        piece = ops.reshape(x[:, start:stop], (x.shape[0], count, size, -1))
        product = block * piece if size == 1 else backend.matmul(block, piece, transpose_a=transpose)
        products.append(ops.reshape(product, (x.shape[0], count * size, -1)))
    return products[0] if len(products) == 1 else ops.concatenate(products, axis=1)


def multiply_right(x: Tensor, blocks: Sequence[Tensor | None], parts: Parts, transpose: bool = False) -> Tensor:
    """`x`, `[k, m, d]`, times the block-diagonal matrices, or their transposes. A part that is None is the identity."""
    products = []
    for block, (start, stop, count, size) in zip(blocks, _spans(parts), strict=True):
        piece = x if len(parts) == 1 else x[:, :, start:stop]
        if block is None:
            products.append(piece)
            continue
        if count == 1:
            # Not `block[:, 0]`, which TensorFlow would copy.
            block = ops.reshape(block, (x.shape[0], size, size))
            products.append(backend.matmul(piece, block, transpose_b=transpose))
            continue
        # Rows of a block stay in one piece where they are moved: transposing `x` to multiply from the left would take longer.
        piece = ops.transpose(ops.reshape(piece, (x.shape[0], -1, count, size)), (0, 2, 1, 3))
        product = ops.transpose(backend.matmul(piece, block, transpose_b=transpose), (0, 2, 1, 3))
        products.append(ops.reshape(product, (x.shape[0], -1, count * size)))
    return products[0] if len(products) == 1 else ops.concatenate(products, axis=2)


def identities(shape: Shape, dtype: str | None = None) -> Tensor:
    """Identity matrices `[..., d, d]`: an initializer of stacked inverses and bases."""
    return ops.broadcast_to(ops.eye(shape[-1], dtype=dtype), shape)


def traces(blocks: Sequence[Tensor]) -> Tensor:
    """The traces `[k]` of the matrices."""
    return sum(ops.sum(backend.trace(part), axis=1) for part in blocks)
