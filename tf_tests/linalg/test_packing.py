"""Symmetric matrices packed into one triangle each, and back."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_ngd.linalg.packing import pack, packed_size, unpack


def symmetric(count, size):
    matrices = np.random.default_rng(size).normal(size=(count, size, size)).astype("float32")
    return matrices + np.swapaxes(matrices, 1, 2)


@given(st.integers(1, 3), st.integers(1, 13))
def test_round_trip_keeps_every_bit_of_one_triangle(count, size):
    matrices = symmetric(count, size)
    packed = pack(ops.convert_to_tensor(matrices))
    assert tuple(packed.shape) == (count, packed_size(size)) == (count, size * (size + 1) // 2)
    np.testing.assert_array_equal(ops.convert_to_numpy(unpack(packed, size)), matrices)
    # Nothing is sent twice: what is packed is the upper triangle, in some order.
    for one, matrix in zip(ops.convert_to_numpy(packed), matrices, strict=True):
        np.testing.assert_array_equal(np.sort(one), np.sort(matrix[np.triu_indices(size)]))


def test_only_the_upper_triangle_is_looked_at():
    matrices = symmetric(2, 6)
    broken = matrices + np.tril(np.full((6, 6), np.nan, "float32"), -1)
    np.testing.assert_array_equal(ops.convert_to_numpy(unpack(pack(ops.convert_to_tensor(broken)), 6)), matrices)


def test_leading_axes_become_one():
    matrices = np.stack([symmetric(2, 4), symmetric(2, 4) + 1])
    packed = pack(ops.convert_to_tensor(matrices))
    np.testing.assert_array_equal(ops.convert_to_numpy(unpack(packed, 4)), matrices.reshape(4, 4, 4))
