"""Block-diagonal matrices, against the whole matrices that they stand for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_ngd.linalg import diagonal, patch_blocks
from tf_tests.reference import rows as reference
from tf_tests.reference.running import close, run


def draw(shape, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) + 0.5).astype("float32")


def slices(parts):
    """The slice of every block, in order, with its part."""
    start = 0
    for part, (count, size) in enumerate(parts):
        for i in range(count):
            yield part, i, slice(start, start + size)
            start += size


def block_diagonal(blocks, parts):
    """The matrices `[k, d, d]` that `blocks` are the diagonal blocks of."""
    result = np.zeros((len(blocks[0]), diagonal.dimension(parts), diagonal.dimension(parts)))
    for part, i, at in slices(parts):
        result[:, at, at] = blocks[part][:, i]
    return result


partitions = st.tuples(st.integers(1, 12), st.booleans(), st.one_of(st.none(), st.integers(1, 14)))


@given(partitions)
def test_a_partition_covers_the_dimension_in_blocks_of_the_split(case):
    width, use_bias, split = case
    parts = diagonal.partition(width, use_bias, split)
    assert diagonal.dimension(parts) == width + use_bias
    if split is None or split >= width + use_bias:
        assert parts == ((1, width + use_bias),)
        return
    inner = parts[:-1] if use_bias else parts
    assert not use_bias or parts[-1] == (1, 1)
    sizes = [size for count, size in inner for _ in range(count)]
    assert sizes == [min(split, width - start) for start in range(0, width, split)]


@pytest.mark.parametrize("case", [(7, True, 3), (6, False, 3), (5, True, 1), (4, True, 9), (3, False, 3), (5, True, 5)])
def test_blocks_grams_products_and_traces(case):
    parts, k = diagonal.partition(*case), 2
    d = diagonal.dimension(parts)
    rows, x, y = draw((k, 11, d)), draw((k, d, 4)), draw((k, 3, d))
    gram = np.swapaxes(rows, 1, 2) @ rows
    blocks = run(lambda m: diagonal.blocks_of(m, parts), gram)
    for part, i, at in slices(parts):
        np.testing.assert_array_equal(blocks[part][:, i], gram[:, at, at])
    for found, expected in zip(run(lambda r: diagonal.gram_blocks(r, parts), rows), blocks, strict=True):
        close(found, expected, 1e-5)
    whole = block_diagonal(blocks, parts)
    close(run(lambda x, *b: diagonal.multiply(b, x, parts), x, *blocks), whole @ x, 1e-5)
    close(run(lambda y, *b: diagonal.multiply_right(y, b, parts), y, *blocks), y @ whole, 1e-5)
    transposed = np.swapaxes(whole, 1, 2)
    close(run(lambda y, *b: diagonal.multiply_right(y, b, parts, True), y, *blocks), y @ transposed, 1e-5)
    # The first part is the identity.
    some = whole.copy()
    size = np.prod(parts[0])
    some[:, :size, :size] = np.eye(size)
    close(run(lambda y, *b: diagonal.multiply_right(y, [None, *b], parts), y, *blocks[1:]), y @ some, 1e-5)
    close(run(lambda *b: diagonal.traces(b), *blocks), np.trace(whole, axis1=1, axis2=2), 1e-5)


@st.composite
def patch_cases(draw):
    rank = draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    sizes = tuple(draw(st.integers(k, k + 3)) for k in kernel)
    channels, padding = draw(st.sampled_from([1, 2, 4, 6])), draw(st.sampled_from(["valid", "same"]))
    split = draw(st.integers(1, max(int(np.prod(kernel)) * channels - 1, 1)))
    return (draw(st.integers(1, 3)), *sizes, channels), kernel, padding, split


@given(patch_cases())
def test_patch_gram_blocks_are_those_of_the_gram_of_the_patches(case):
    shape, kernel, padding, split = case
    x, ones = draw(shape), (1,) * len(kernel)
    rows = reference.convolution_rows(x, kernel, ones, ones, padding).reshape(-1, np.prod(kernel) * shape[-1])
    parts = diagonal.partition(rows.shape[1], False, split)
    gram = rows.T @ rows
    found = run(lambda x: patch_blocks.patch_gram_blocks(x, kernel, padding, parts), x)
    for part, i, at in slices(parts):
        close(found[part][0, i], gram[at, at], 1e-5)
