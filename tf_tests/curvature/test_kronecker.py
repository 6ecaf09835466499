"""Preconditioning with Kronecker factors, against dense solves in float64."""

import functools

import keras
import numpy as np
import pytest

from keras_ngd.curvature.kronecker import DAMPING_MODES, KroneckerCurvature, factor_dampings
from tf_tests.reference import kronecker as reference
from tf_tests.reference.running import close, error, run

# A power of two: exact in float32, which dampings pass through.
DAMPING = 2.0**-5

COMBINATIONS = [
    (inverse, mode)
    for inverse in ("cholesky", "newton-schulz", "eigen", "auto")
    for mode in DAMPING_MODES
    if mode != "exact" or inverse == "eigen"
]


@functools.cache
def curvature_and_step(curvature_arguments):
    """One curvature, and its refresh and application as one function; cached, so that it is compiled once."""
    curvature = KroneckerCurvature(*curvature_arguments)

    def step(a, g, v, damping, *state):
        state = curvature.refresh([a, g], damping, list(state))
        return curvature.precondition(v, damping, state, None), state

    return curvature, step


def first_state(curvature):
    """The state that a new curvature starts from."""
    curvature.build(lambda shape, initializer, dtype, name: keras.Variable(initializer, shape, dtype, name=name))
    return [np.asarray(v) for v in curvature.variables]


def precondition(a, g, v, damping=DAMPING, inverse="cholesky", mode="pi", state=None, xla=False):
    """`P` by the library after one refresh, and the state."""
    arguments = (len(a), a.shape[-1], g.shape[-1], str(v.dtype), inverse, mode)
    curvature, step = curvature_and_step(arguments)
    state = first_state(curvature) if state is None else state
    return run(step, a, g, v, np.float32(damping), *state, xla=xla)


def dense(a, g, v, damping=DAMPING, mode="pi"):
    """`P` of each block by a dense solve."""
    blocks = zip(*(t.astype("float64") for t in (a, g, v)), strict=True)
    return np.stack([reference.dense_preconditioned(*block, damping, mode) for block in blocks])


def draw(count=2, input_dim=7, output_dim=5, dtype="float32", seed=0):
    """Factors as they arise, from more rows than dimensions with scales that differ, and a gradient."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((count, 3 * input_dim, input_dim)) * np.logspace(0, -1, input_dim)
    a[..., -1] = 1
    g = rng.standard_normal((count, 3 * output_dim, output_dim)) * 0.3
    factors = [np.swapaxes(rows, 1, 2) @ rows / rows.shape[1] for rows in (a, g)]
    return [t.astype(dtype) for t in (*factors, rng.standard_normal((count, input_dim, output_dim)))]


@pytest.mark.parametrize(("inverse", "mode"), COMBINATIONS)
def test_equals_the_dense_solve(inverse, mode):
    a, g, v = draw()
    close(precondition(a, g, v, inverse=inverse, mode=mode)[0], dense(a, g, v, mode=mode), 1e-4)


@pytest.mark.parametrize(("inverse", "mode"), COMBINATIONS)
def test_equals_the_dense_solve_in_float64(float64, inverse, mode):
    a, g, v = draw(dtype="float64")
    # Newton-Schulz stops where a further step would change little, at about the square of a thousandth.
    iterated = inverse == "newton-schulz"
    close(precondition(a, g, v, inverse=inverse, mode=mode)[0], dense(a, g, v, mode=mode), 1e-5 if iterated else 1e-10)


@pytest.mark.parametrize("inverse", ["cholesky", "newton-schulz", "eigen"])
@pytest.mark.parametrize("damping", [1.0, 1e-3])
def test_dampings_of_different_size(inverse, damping):
    a, g, v = draw()
    close(precondition(a, g, v, damping, inverse)[0], dense(a, g, v, np.float32(damping)), 1e-4)


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("inverse", ["cholesky", "newton-schulz", "eigen"])
def test_follows_changing_factors(inverse, xla):
    """Refresh after refresh, the Newton-Schulz iterations starting from what the last one left."""
    a, g, v = draw()
    state = None
    for step in range(4):
        other_a, other_g, v = draw(seed=step)
        a, g = 0.9 * a + 0.1 * other_a, 0.9 * g + 0.1 * other_g
        p, state = precondition(a, g, v, inverse=inverse, state=state, xla=xla)
        close(p, dense(a, g, v), 1e-4)


def test_newton_schulz_iterates_from_its_last_state():
    """What it adds to Cholesky is a state that matters: with a wrong one it would differ."""
    a, g, v = draw()
    _, state = precondition(a, g, v, inverse="newton-schulz")
    cholesky, _ = precondition(1.01 * a, g, v, inverse="cholesky")
    warm, _ = precondition(1.01 * a, g, v, inverse="newton-schulz", state=state)
    cold, _ = precondition(1.01 * a, g, v, inverse="newton-schulz")
    assert not np.array_equal(warm, cold)
    close(warm, cholesky, 1e-4)
    close(cold, cholesky, 1e-4)


def test_before_the_first_refresh_gradients_pass_through():
    a, g, v = draw()
    for inverse, mode in [("cholesky", "pi"), *(("eigen", mode) for mode in DAMPING_MODES)]:
        curvature = KroneckerCurvature(2, 7, 5, "float32", inverse, mode)
        state = first_state(curvature)
        p = run(lambda v, d, *state: curvature.precondition(v, d, state, None), v, np.float32(DAMPING), *state)  # noqa: B023
        # With eigenvalues that are all one, division by what the damping makes of them.
        scale = 1.0 if inverse != "eigen" else {"exact": 1 + DAMPING}.get(mode)
        scale = (1 + reference.dampings(np.eye(7), np.eye(5), DAMPING, mode)[0]) ** 2 if scale is None else scale
        close(p * scale, v, 1e-6)


def test_eigen_follows_the_damping_between_refreshes():
    a, g, v = draw()
    for mode in DAMPING_MODES:
        _, state = precondition(a, g, v, inverse="eigen", mode=mode)
        curvature, _ = curvature_and_step((2, 7, 5, "float32", "eigen", mode))
        p = run(lambda v, d, *state: curvature.precondition(v, d, state, None), v, np.float32(8 * DAMPING), *state)  # noqa: B023
        close(p, dense(a, g, v, 8 * DAMPING, mode), 1e-4)


def test_pi_does_not_depend_on_how_a_constant_is_shared():
    a, g, v = draw()
    for inverse in ("cholesky", "eigen"):
        p = precondition(a, g, v, inverse=inverse)[0]
        close(precondition(256 * a, g / 256, v, inverse=inverse)[0], p, 1e-5)
        without = [precondition(x, y, v, inverse=inverse, mode="sqrt")[0] for x, y in ((a, g), (256 * a, g / 256))]
        assert error(*without) > 0.1
    exact = [precondition(x, y, v, inverse="eigen", mode="exact")[0] for x, y in ((a, g), (256 * a, g / 256))]
    close(*exact, 1e-5)


def test_factor_dampings():
    mean_a, mean_g = np.array([4.0, 0.0, 4.0, np.inf], "float32"), np.array([1.0, 1.0, 0.0, 1.0], "float32")

    def dampings(mode):
        return run(lambda a, g: factor_dampings(a, g, DAMPING, mode), mean_a, mean_g)

    # Of a factor that is zero nothing is known, and it counts as the identity.
    (of_a, of_g), tiny = dampings("relative"), 1e-6
    np.testing.assert_allclose(of_a[:3], [4 * DAMPING, 1, 4 * DAMPING], rtol=tiny)
    np.testing.assert_allclose(of_g, [DAMPING, DAMPING, 1, DAMPING], rtol=tiny)
    root = DAMPING**0.5
    for pair, expected in {
        "pi": ([2 * root, root, root, root], [root / 2, root, root, root]),
        "sqrt": ([root] * 4, [root] * 4),
        "factor": ([DAMPING] * 4, [DAMPING] * 4),
    }.items():
        for found, wanted in zip(dampings(pair), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_rotated_rows_give_rotated_directions():
    a, g, v = draw(dtype="float64")
    rng = np.random.default_rng(5)
    left, right = (np.linalg.qr(rng.standard_normal((size, size)))[0] for size in (7, 5))
    turned = [t.astype("float32") for t in (left.T @ a @ left, right.T @ g @ right, left.T @ v @ right)]
    for inverse in ("cholesky", "eigen"):
        p = precondition(*(t.astype("float32") for t in (a, g, v)), inverse=inverse)[0]
        close(precondition(*turned, inverse=inverse)[0], left.T @ p @ right, 1e-4)


@pytest.mark.parametrize(("inverse", "mode"), [c for c in COMBINATIONS if c[0] in ("cholesky", "eigen")])
def test_large_damping_leaves_the_gradient(inverse, mode):
    a, g, v = draw()
    large = 2.0**24
    p = precondition(a, g, v, large, inverse, mode)[0]
    added = {"factor": large**2}.get(mode, large)
    if mode == "relative":
        added = np.reshape(
            [np.prod(reference.dampings(*pair, large, mode)) for pair in zip(a, g, strict=True)], (-1, 1, 1)
        )
    close(p * added, v, 1e-2 if mode in ("global", "pi", "sqrt") else 1e-5)


@pytest.mark.parametrize("inverse", ["cholesky", "newton-schulz", "eigen"])
def test_linear_and_positive(inverse):
    a, g, v = draw()
    _, _, w = draw(seed=1)
    p, q = (precondition(a, g, t, inverse=inverse)[0] for t in (v, w))
    close(precondition(a, g, 2 * v - 3 * w, inverse=inverse)[0], 2 * p - 3 * q, 1e-5)
    assert np.all(np.sum(p * v, axis=(1, 2)) > 0)
    assert not precondition(a, g, 0 * v, inverse=inverse)[0].any()
    # Symmetric as an operator.
    np.testing.assert_allclose(np.sum(p * w), np.sum(v * q), rtol=1e-4)


@pytest.mark.parametrize(("inverse", "mode"), COMBINATIONS)
def test_factors_that_are_zero(inverse, mode):
    """A layer that saw nothing: only the damping is left."""
    for zero_a, zero_g in ([0], [1]), ([0, 1], [1]):
        a, g, v = draw()
        a[zero_a], g[zero_g] = 0, 0
        close(precondition(a, g, v, inverse=inverse, mode=mode)[0], dense(a, g, v, mode=mode), 1e-4)


@pytest.mark.parametrize("inverse", ["cholesky", "newton-schulz", "eigen"])
@pytest.mark.parametrize(("input_dim", "output_dim"), [(1, 1), (6, 1)])
def test_narrow_layers(inverse, input_dim, output_dim):
    a, g, v = draw(2, input_dim, output_dim)
    close(precondition(a, g, v, inverse=inverse)[0], dense(a, g, v), 1e-4)


@pytest.mark.parametrize("inverse", ["cholesky", "newton-schulz", "eigen"])
def test_rank_deficient_factors(inverse):
    """Fewer rows than dimensions, as with small batches."""
    rng = np.random.default_rng(0)
    a, g = rng.standard_normal((2, 3, 7)), rng.standard_normal((2, 2, 5))
    a, g = (np.swapaxes(rows, 1, 2) @ rows / rows.shape[1] for rows in (a, g))
    a, g, v = (t.astype("float32") for t in (a, g, rng.standard_normal((2, 7, 5))))
    close(precondition(a, g, v, inverse=inverse)[0], dense(a, g, v), 1e-4)


@pytest.mark.parametrize("inverse", ["cholesky", "newton-schulz", "eigen"])
def test_one_example(inverse):
    """With one example the direction is a multiple of the gradient, whatever the damping."""
    rng = np.random.default_rng(0)
    a, g = rng.standard_normal((2, 7, 1)), rng.standard_normal((2, 5, 1))
    v = (a @ np.swapaxes(g, 1, 2)).astype("float32")
    a, g = ((rows @ np.swapaxes(rows, 1, 2)).astype("float32") for rows in (a, g))
    p = precondition(a, g, v, inverse=inverse)[0]
    for direction, gradient in zip(p, v, strict=True):
        close(direction / np.linalg.norm(direction), gradient / np.linalg.norm(gradient), 1e-4)


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("inverse", ["cholesky", "newton-schulz", "eigen"])
def test_a_failing_block_keeps_its_state(inverse, xla):
    a, g, v = draw()
    _, before = precondition(a, g, v, inverse=inverse)
    broken = 1.01 * a
    broken[0, 0, 0] = np.nan
    p, after = precondition(broken, 1.01 * g, v, inverse=inverse, state=before, xla=xla)
    half = len(before) // 2
    for old, new in zip(before[:half], after[:half], strict=True):
        np.testing.assert_array_equal(new[0], old[0])
        assert not np.array_equal(new[1], old[1])
    assert np.isfinite(p).all()
    close(p[1:], dense(1.01 * a[1:], 1.01 * g[1:], v[1:]), 1e-4)
