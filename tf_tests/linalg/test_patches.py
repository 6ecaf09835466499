"""Sums over patches, against patches extracted one by one."""

import keras
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keras_ngd.layers.convolution import ConvolutionGeometry
from keras_ngd.linalg import diagonal, patch_gram, patches
from tf_tests.reference import rows as reference
from tf_tests.reference.running import close, run

PADDINGS = {1: ("valid", "same", "causal"), 2: ("valid", "same"), 3: ("valid", "same")}


def draw(shape, seed=0):
    """Inputs whose mean is not zero, so that sums with a wrong border cannot cancel."""
    return (np.random.default_rng(seed).standard_normal(shape) + 1).astype("float32")


@st.composite
def gram_cases(draw):
    rank = draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 6 if rank == 1 else 4)) for _ in range(rank))
    sizes = tuple(draw(st.integers(k, k + 4)) for k in kernel)
    shape = (draw(st.integers(1, 3)), *sizes, draw(st.integers(1, 3)))
    return shape, kernel, draw(st.sampled_from(PADDINGS[rank])), draw(st.integers(0, 9))


@given(gram_cases())
@example(((2, 5, 5, 2), (5, 5), "same", 0))
@example(((2, 4, 5, 1), (4, 5), "valid", 0))
@example(((2, 6, 3, 2), (1, 3), "same", 0))
@example(((1, 5, 2), (5,), "causal", 0))
def test_patch_gram_is_the_gram_of_the_patches(case):
    shape, kernel, padding, seed = case
    x = draw(shape, seed)
    ones = (1,) * len(kernel)
    rows = reference.convolution_rows(x, kernel, ones, ones, padding).reshape(-1, np.prod(kernel) * shape[-1])
    gram = run(lambda x: patch_gram.patch_gram(x, kernel, padding), x)
    close(gram, rows.T @ rows, 1e-5)


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize(
    ("shape", "kernel", "padding"),
    [
        ((16, 16, 14, 4), (3, 3), "same"),
        ((3, 5, 43, 8), (3, 3), "valid"),
        ((2, 4, 37, 10), (2, 5), "same"),
        ((2, 4, 5, 130), (2, 2), "same"),
        ((4, 75, 6), (5,), "causal"),
    ],
    ids=["many_positions", "wide", "wide_asymmetric", "many_channels", "long"],
)
def test_patch_gram_of_larger_inputs(shape, kernel, padding, xla):
    """Neither how the positions are divided nor subtracting what lies beyond the border costs accuracy that matters."""
    x, ones = draw(shape), (1,) * len(kernel)
    rows = reference.convolution_rows(x, kernel, ones, ones, padding).reshape(-1, np.prod(kernel) * shape[-1])
    close(run(lambda x: patch_gram.patch_gram(x, kernel, padding), x, xla=xla), rows.T @ rows, 1e-5)


@st.composite
def window_cases(draw):
    rank = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 4 if rank < 3 else 2)) for _ in range(rank))
    strides = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    padding = draw(st.sampled_from(PADDINGS[rank]))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = [draw(st.integers(r if padding == "valid" else 1, r + 4)) for r in reach]
    shape = (draw(st.integers(1, 2)), *sizes, draw(st.integers(1, 3)))
    return shape, (kernel, strides, dilation, padding), draw(st.integers(0, 9))


@given(window_cases())
def test_unfold_and_patch_sums(case):
    shape, window, seed = case
    x = draw(shape, seed)
    rows = reference.convolution_rows(x, *window)[0]
    rows = rows.reshape(*rows.shape[:2], -1, shape[-1])
    unfolded, sums, outputs = run(lambda x: (patches.unfold(x, *window), *patches.patch_sums(x, *window)), x)
    assert unfolded.shape[0] == shape[0]
    np.testing.assert_array_equal(unfolded.reshape(rows.shape), rows.astype("float32"))
    close(sums, rows.sum(axis=1), 1e-5)
    assert int(outputs) == rows.shape[1]
    for axis in zip(shape[1:-1], *window[:3], strict=True):
        seen = reference.visible_inputs(*axis, window[3])
        before, _, count = patches.pad_and_crop_sizes(*axis, window[3])
        assert (before, count) == (-seen[0][0], len(seen))


@given(window_cases())
def test_patches_at_some_positions(case):
    """Those of each example, in any order, and the same more than once."""
    shape, window, seed = case
    x = draw(shape, seed)
    rows = reference.convolution_rows(x, *window)[0]
    positions = np.random.default_rng(seed).integers(rows.shape[1], size=(len(x), 5)).astype("int32")
    found = run(lambda x, positions: patches.patches_at(x, positions, *window), x, positions)
    expected = np.take_along_axis(rows, positions[:, :, None], axis=1).astype("float32")
    assert found.shape == (len(x), 5, np.prod(window[0]), shape[-1])
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("kernel", "strides", "dilation", "padding"),
    [((3, 2), 1, 1, "same"), ((2, 3), 2, 1, "same"), ((2, 2), 1, 2, "valid"), ((3, 3), (2, 1), 1, "valid")],
)
def test_unfold_orders_patches_as_keras_does(kernel, strides, dilation, padding):
    x = draw((2, 6, 7, 3))
    expected = run(lambda x: keras.ops.image.extract_patches(x, kernel, strides, dilation, padding), x)
    steps = strides if isinstance(strides, tuple) else (strides, strides)
    unfolded = run(lambda x: patches.unfold(x, kernel, steps, (dilation, dilation), padding), x)
    np.testing.assert_array_equal(unfolded.reshape(expected.shape), expected)


def test_displacements_only_where_they_apply():
    def prefers(shape, kernel, strides=1, dilation=1, padding="same"):
        rank = len(kernel)
        return patches.prefers_displacements(np.zeros(shape), kernel, (strides,) * rank, (dilation,) * rank, padding)

    assert prefers((2, 12, 12, 3), (3, 3))
    assert prefers((2, 20, 3), (5,), padding="causal")
    assert not prefers((2, 12, 2, 3), (3, 3))
    assert not prefers((2, 12, 12, 3), (3, 3), strides=2)
    assert not prefers((2, 12, 12, 3), (3, 3), dilation=2)
    assert not prefers((2, 12, 12, 12, 3), (3, 3, 3))
    assert not prefers((2, 12, 12, 3), (1, 1))


def test_short_patches_of_small_maps_are_stored():
    def prefers(size, kernel, channels, padding="same"):
        x = np.zeros((1, size, size, channels))
        return patches.prefers_displacements(x, (kernel, kernel), (1, 1), (1, 1), padding)

    assert not prefers(11, 3, 3)
    assert prefers(11, 3, 64)
    # 64 corners, and 16.
    assert not prefers(28, 5, 1, "valid")
    assert prefers(28, 5, 1)
    assert prefers(224, 5, 3, "valid")


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("rank", [1, 2])
def test_both_ways_to_moments_of_patches_agree(rank, padding, monkeypatch):
    x, ones = draw((5, *(6, 7)[:rank], 2)), (1,) * rank
    kernel_shape = (*(3,) * rank, 2, 4)
    geometry = ConvolutionGeometry(kernel_shape, 1, True, ones, ones, padding, "channels_last")
    parts = diagonal.partition(3**rank * 2, True, 4)

    def moments():
        found = run(lambda x: geometry.input_second_moment(x), x)
        blocks = run(lambda x: geometry.input_blocks(x, parts), x)
        return [found, *blocks]

    stored = moments()
    monkeypatch.setattr(patches, "_NARROW", 0)
    assert patches.prefers_displacements(x, geometry.kernel, geometry.strides, geometry.dilation, padding)
    for ours, others in zip(moments(), stored, strict=True):
        close(ours, others, 1e-5)
