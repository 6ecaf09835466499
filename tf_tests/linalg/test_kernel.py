"""Blocks of rank-one terms without the blocks, against the dense algebra."""

import numpy as np
import pytest

from keras_ngd.linalg import kernel
from tf_tests.reference import low_rank as reference
from tf_tests.reference.running import close, run

TOLERANCES = {"float32": 1e-5, "float64": 1e-11}


@pytest.fixture(autouse=True)
def double_precision(float64):
    """Both precisions in this module."""


def rows(count=2, n=6, input_dim=5, output_dim=3, dtype="float64", seed=0):
    """Rows of scales that differ, and a gradient."""
    rng = np.random.default_rng([seed, count, n])
    a = rng.standard_normal((count, n, input_dim)) * np.logspace(0, -1, n)[:, None]
    g, v = rng.standard_normal((count, n, output_dim)), rng.standard_normal((count, input_dim, output_dim))
    return [t.astype(dtype) for t in (a, g, v)]


def each(function, *stacked):
    """The reference on every block, in float64."""
    return np.stack([function(*(np.asarray(t, "float64") for t in block)) for block in zip(*stacked, strict=True)])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernel_products_and_combinations(dtype):
    a, g, v = rows(dtype=dtype)
    c = np.random.default_rng(1).standard_normal(a.shape[:2]).astype(dtype)

    def everything(a, g, v, c):
        return kernel.kernel_matrix(a, g), kernel.products(a, g, v), kernel.combination(a, g, c)

    found = run(everything, a, g, v, c)
    assert {t.dtype.name for t in found} == {dtype}
    expected = (
        each(reference.kernel, a, g),
        each(lambda a, g, v: reference.terms(a, g) @ v.reshape(-1), a, g, v),
        each(lambda a, g, c: (reference.terms(a, g).T @ c).reshape(5, 3), a, g, c),
    )
    for tensor, dense in zip(found, expected, strict=True):
        close(tensor, dense, TOLERANCES[dtype])


def preconditioned(a, g, v, damping):
    return kernel.precondition(a, g, kernel.damped_core(kernel.kernel_matrix(a, g), damping), damping, v)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("n", [1, 6, 20])
def test_woodbury_is_the_dense_solve(n, dtype):
    """With fewer and with more terms than the block has rows."""
    a, g, v = rows(n=n, dtype=dtype)
    damping = np.array([0.25, 2.0], dtype)
    expected = each(reference.dense_preconditioned, a, g, v, damping)
    close(run(preconditioned, a, g, v, damping), expected, 10 * TOLERANCES[dtype])


@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-4])
def test_woodbury_in_float64_at_small_damping(damping):
    a, g, v = rows(count=1)
    expected = each(lambda *block: reference.dense_preconditioned(*block, damping), a, g, v)
    close(run(preconditioned, a, g, v, np.array([damping])), expected, 1e-10)


def weighted(seed=0, dtype="float64", repeated=False, n=5):
    """A kernel, of rank 2 if `repeated`, and weights no smaller than the identity."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((2, n, 8))
    if repeated:
        u = u[:, np.arange(n) % 2]
    p = rng.standard_normal((2, 7, n))
    weights = np.eye(n) + np.swapaxes(p, 1, 2) @ p
    return (u @ np.swapaxes(u, 1, 2)).astype(dtype), weights.astype(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("repeated", [False, True])
def test_interpolated_core_is_the_dense_formula(repeated, dtype):
    """Where rows repeat the kernel is singular, and the formula as HyLo prints it, with its inverse, has no value."""
    q, weights = weighted(dtype=dtype, repeated=repeated)
    damping = np.array([0.5, 2.0**-7], dtype)
    core = run(kernel.interpolated_core, q, weights, damping)
    assert core.dtype == dtype
    np.testing.assert_array_equal(core, np.swapaxes(core, 1, 2))
    expected = each(lambda q, y, d: np.linalg.inv(q + d * np.linalg.inv(y)), q, weights, damping)
    # Processors differ: up to 53 times were seen.
    close(core, expected, 100 * TOLERANCES[dtype])


def test_weights_of_one_make_it_the_damped_core():
    q, _ = weighted()
    damping = np.array([0.5, 0.125])
    identity = np.broadcast_to(np.eye(5), q.shape)
    close(run(kernel.interpolated_core, q, identity, damping), run(kernel.damped_core, q, damping), 1e-14)


def test_a_zero_kernel_leaves_the_damping():
    _, weights = weighted()
    core = run(kernel.interpolated_core, np.zeros((2, 5, 5)), weights, np.array([0.5, 0.125]))
    close(core, weights / np.array([0.5, 0.125])[:, None, None], 1e-14)


@pytest.mark.parametrize("broken", ["kernel", "weights"])
def test_a_core_that_fails_is_zero_and_alone(broken):
    q, weights = weighted(dtype="float32")
    good = run(kernel.interpolated_core, q, weights, np.ones(2, "float32"))
    (q if broken == "kernel" else weights)[0, 2, 2] = np.nan
    core = run(kernel.interpolated_core, q, weights, np.ones(2, "float32"))
    assert not core[0].any()
    close(core[1], good[1], 1e-6)
    if broken == "kernel":
        core = run(kernel.damped_core, q, np.ones(2, "float32"))
        assert not core[0].any()
        close(core[1], np.linalg.inv(q[1] + np.eye(5)), 1e-5)
