"""Sums over the patches of single channels, against patches extracted one by one."""

import keras
import numpy as np
import pytest
from hypothesis import given

from keras_ngd.linalg import channel_patches
from tf_tests.linalg.test_patches import draw, window_cases
from tf_tests.reference import rows as reference
from tf_tests.reference.running import close, run


def check(x, window, xla=False):
    rows = reference.convolution_rows(x, *window, x.shape[-1])
    found = run(lambda x: channel_patches.channel_grams(x, *window), x, xla=xla)
    close(found, np.einsum("cntp,cntq->cpq", rows, rows), 1e-5)


@given(window_cases())
def test_grams_are_those_of_the_patches(case):
    shape, window, seed = case
    check(draw(shape, seed), window)


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("strides", [1, 2])
def test_grams_of_larger_inputs(strides, xla):
    check(draw((8, 20, 17, 6)), ((5, 3), (strides, strides), (1, 1), "same"), xla)


def test_they_apply_where_sizes_are_known():
    assert channel_patches.applies(keras.KerasTensor((None, 4, 5, 2)))
    assert not channel_patches.applies(keras.KerasTensor((3, 4, None, 2)))
