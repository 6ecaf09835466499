"""Symmetric matrices packed into one triangle each, and back."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_ngd.linalg.packing import pack, packed, packed_shape, packed_size, unpack, unpacked


def symmetric(count, size):
    matrices = np.random.default_rng(size).normal(size=(count, size, size)).astype("float32")
    return matrices + np.swapaxes(matrices, 1, 2)


@given(st.integers(1, 3), st.integers(1, 13))
def test_round_trip_keeps_every_bit_of_one_triangle(count, size):
    matrices = symmetric(count, size)
    sent = pack(ops.convert_to_tensor(matrices))
    assert tuple(sent.shape) == (count, packed_size(size)) == (count, size * (size + 1) // 2)
    np.testing.assert_array_equal(ops.convert_to_numpy(unpack(sent, size)), matrices)
    # Nothing is sent twice: what is packed is the upper triangle, in some order.
    for one, matrix in zip(ops.convert_to_numpy(sent), matrices, strict=True):
        np.testing.assert_array_equal(np.sort(one), np.sort(matrix[np.triu_indices(size)]))


def test_only_the_upper_triangle_is_looked_at():
    matrices = symmetric(2, 6)
    broken = matrices + np.tril(np.full((6, 6), np.nan, "float32"), -1)
    np.testing.assert_array_equal(ops.convert_to_numpy(unpack(pack(ops.convert_to_tensor(broken)), 6)), matrices)


def test_leading_axes_become_one():
    matrices = np.stack([symmetric(2, 4), symmetric(2, 4) + 1])
    sent = pack(ops.convert_to_tensor(matrices))
    np.testing.assert_array_equal(ops.convert_to_numpy(unpack(sent, 4)), matrices.reshape(4, 4, 4))


def test_tensors_of_several_shapes_come_back_as_they_were():
    rng = np.random.default_rng(0)

    def stack(*shape):
        found = rng.normal(size=shape).astype("float32")
        return found + np.swapaxes(found, -1, -2)

    rest = [rng.normal(size=shape).astype("float32") for shape in [(3, 4), (5,), ()]]
    arrays = [
        stack(1, 3, 3),
        rest[0],
        stack(2, 4, 4),
        stack(2, 3, 3),
        rest[1],
        stack(2, 2, 3, 3),
        rest[2],
    ]
    tensors = [ops.convert_to_tensor(a) for a in arrays]
    sent = packed(tensors)
    assert [tuple(t.shape) for t in sent] == [packed_shape(t) for t in tensors]
    assert [tuple(t.shape) for t in sent] == [(1, 6), (3, 4), (2, 10), (2, 6), (5,), (4, 6), ()]
    for found, array in zip(unpacked(sent, tensors), arrays, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(found), array)
