"""Matrices of many sizes are inverted in few batches, each as if it were alone."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ngd.linalg import inverse, many_sizes
from tf_tests.small import array


def draw(count, size, seed):
    rows = np.random.default_rng(seed).normal(size=(count, 2 * size, size)).astype("float32")
    return np.swapaxes(rows, 1, 2) @ rows / (2 * size)


def work_of(sizes, seed=0):
    """For each size two factors, their dampings and inverses in use that are near."""
    found = []
    for i, size in enumerate(sizes):
        factors, dampings = draw(2, size, seed + i), np.array([0.1, 0.5], "float32")
        near = np.linalg.inv(factors + 1.02 * dampings[:, None, None] * np.eye(size)).astype("float32")
        found.append([factors, dampings, near])
    return found


def test_small_matrices_are_filled_up_and_large_ones_to_what_is_near():
    assert many_sizes.common_sizes([10, 65, 1, 65]) == {65: 65, 10: 65, 1: 65}
    sizes = [4609, 2305, 2048, 2049, 577, 512, 513, 129, 64, 10]
    found = many_sizes.common_sizes(sizes)
    assert found == {
        4609: 4609,
        2305: 2305,
        2049: 2049,
        2048: 2049,
        577: 577,
        513: 513,
        512: 513,
        129: 129,
        64: 64,
        10: 64,
    }
    assert many_sizes.common_sizes([]) == {}


@pytest.mark.parametrize("whole", [640, 4], ids=["whole", "by halves"])
@pytest.mark.parametrize("method", ["cholesky", "newton-schulz"])
def test_each_inverse_is_that_of_the_matrix_alone(method, whole, monkeypatch):
    monkeypatch.setattr(inverse, "_whole_size", lambda size: whole)
    work = work_of([5, 1, 17, 16])
    found = many_sizes.damped_inverses([[ops.convert_to_tensor(t) for t in one] for one in work], method)
    for (factors, dampings, near), inverses in zip(work, found, strict=True):
        size = factors.shape[-1]
        dense = np.linalg.inv(factors.astype("float64") + dampings[:, None, None] * np.eye(size))
        alone = inverse.damped_inverse(*map(ops.convert_to_tensor, (factors, dampings, near)), method)
        assert inverses.shape == factors.shape
        np.testing.assert_allclose(array(inverses), dense, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(array(inverses), array(alone), rtol=1e-5, atol=1e-5)


def test_only_what_is_chosen_is_inverted():
    work, chosen = work_of([4, 9]), [np.array([True, False]), np.array([False, True])]
    found = many_sizes.damped_inverses(
        [[ops.convert_to_tensor(t) for t in (*one, of_one)] for one, of_one in zip(work, chosen, strict=True)],
        "cholesky",
    )
    for (factors, dampings, near), of_one, inverses in zip(work, chosen, found, strict=True):
        dense = np.linalg.inv(factors + dampings[:, None, None] * np.eye(factors.shape[-1]))
        np.testing.assert_array_equal(array(inverses)[~of_one], near[~of_one])
        np.testing.assert_allclose(array(inverses)[of_one], dense[of_one], rtol=1e-4, atol=1e-4)


def test_where_one_fails_it_alone_stays_and_the_others_have_their_damping():
    (small, of_small, near), (large, of_large, near_large) = work_of([3, 8])
    small[1] = np.nan
    # Not positive definite but with ten times the damping.
    small[0] = np.diag([1.0, 1.0, -0.5]).astype("float32")
    found = many_sizes.damped_inverses(
        [[ops.convert_to_tensor(t) for t in one] for one in ([small, of_small, near], [large, of_large, near_large])],
        "cholesky",
    )
    np.testing.assert_array_equal(array(found[0])[1], near[1])
    np.testing.assert_allclose(array(found[0])[0], np.linalg.inv(small[0] + np.eye(3)), rtol=1e-5)
    dense = np.linalg.inv(large + of_large[:, None, None] * np.eye(8))
    np.testing.assert_allclose(array(found[1]), dense, rtol=1e-4, atol=1e-4)


def test_a_damping_for_each_row():
    [[factors, _, near]] = work_of([6])
    dampings = np.linspace(0.1, 2.0, 12).reshape(2, 6).astype("float32")
    found = inverse.damped_inverse(*map(keras.ops.convert_to_tensor, (factors, dampings, near)))
    dense = np.linalg.inv(factors + dampings[:, :, None] * np.eye(6))
    np.testing.assert_allclose(array(found), dense, rtol=1e-4, atol=1e-4)
