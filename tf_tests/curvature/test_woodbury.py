"""Preconditioning with Kronecker factors given by rows, against dense solves with the factors."""

import functools

import keras
import numpy as np
import pytest

from keras_ngd.curvature import WoodburyCurvature
from tf_tests.reference import kronecker as reference
from tf_tests.reference.running import close, error, run

DAMPING = 2.0**-5
MODES = ("pi", "sqrt", "factor")
INPUT_DIM, OUTPUT_DIM = 8, 6

# The number of rows of each side; None for a factor itself.
SIDES = {"rows": (5, 3), "input rows": (3, None), "output rows": (None, 5), "factors": (None, None)}


def draw(rows=(5, 3), count=2, dims=(INPUT_DIM, OUTPUT_DIM), dtype="float32", seed=0):
    """What both sides are given by, and a gradient."""
    rng, sides = np.random.default_rng(seed), []
    for n, dim, scale in zip(rows, dims, (1.0, 0.3), strict=True):
        side = scale * rng.standard_normal((count, 3 * dim if n is None else n, dim))
        sides.append((np.swapaxes(side, 1, 2) @ side if n is None else side).astype(dtype))
    return *sides, rng.standard_normal((count, *dims)).astype(dtype)


def factor(side):
    """The factors that one side stands for, in float64."""
    side = side.astype("float64")
    return side if side.shape[1] == side.shape[2] else np.swapaxes(side, 1, 2) @ side


def dense(x, y, v, damping=DAMPING, mode="pi"):
    blocks = zip(factor(x), factor(y), v.astype("float64"), strict=True)
    return np.stack([reference.dense_preconditioned(*block, damping, mode) for block in blocks])


@functools.cache
def step_of(shapes, dtype, mode):
    """Refreshes curvatures together and preconditions with each."""
    curvatures = [WoodburyCurvature(x[0], (x[1:], y[1:]), dtype, mode) for x, y in shapes]

    def step(damping, *tensors):
        problems = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
        states = WoodburyCurvature.refresh_all(curvatures, [p[:2] for p in problems], damping, None)
        pairs = zip(curvatures, states, problems, strict=True)
        return [
            (c.precondition(v, damping, state, functools.partial(list, (x, y))), state) for c, state, (x, y, v) in pairs
        ]

    return curvatures, step


def precondition(problems, damping=DAMPING, mode="pi", xla=False):
    """`P` and the new state of each of `problems`, `(x, y, v)`."""
    shapes = tuple((x.shape, y.shape) for x, y, _ in problems)
    _, step = step_of(shapes, str(problems[0][0].dtype), mode)
    return run(step, np.float32(damping), *(t for problem in problems for t in problem), xla=xla)


def test_equals_the_dense_solve():
    """All kinds of sides, refreshed together: equal sizes of rows and of factors share a batch."""
    problems = [draw(rows, seed=i) for i, rows in enumerate(SIDES.values())]
    for (p, _), problem in zip(precondition(problems), problems, strict=True):
        close(p, dense(*problem), 1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_dense_solve_in_float64(float64, mode):
    problems = [draw(SIDES[name], dtype="float64") for name in ("input rows", "output rows")]
    for damping in (DAMPING, 2.0**-8):
        for (p, _), problem in zip(precondition(problems, damping, mode), problems, strict=True):
            close(p, dense(*problem, damping, mode), 1e-9)


def test_compiled_by_xla():
    problems = [draw(), draw((6, None), count=1, dims=(9, 4), seed=1)]
    for (p, _), problem in zip(precondition(problems, xla=True), problems, strict=True):
        close(p, dense(*problem), 1e-4)


@pytest.mark.parametrize("sides", SIDES)
def test_before_the_first_refresh_gradients_pass_through(sides):
    x, y, v = draw(SIDES[sides])
    curvature = WoodburyCurvature(2, (x.shape[1:], y.shape[1:]), "float32", "pi")
    curvature.build(lambda shape, initializer, dtype, name: keras.Variable(initializer, shape, dtype, name=name))
    state = [np.asarray(v) for v in curvature.variables]
    np.testing.assert_array_equal(
        run(lambda v, x, y, *state: curvature.precondition(v, DAMPING, state, lambda: [x, y]), v, x, y, *state), v
    )
    assert curvature.bytes == sum(v.nbytes for v in state)


@pytest.mark.parametrize("sides", ["rows", "factors"])
def test_a_side_that_fails_counts_as_the_identity_and_alone(sides):
    """Its damping is not to be trusted either: nothing of its block's other side depends on it but through `pi`."""
    x, y, v = draw(SIDES[sides])
    ((good, _),) = precondition([(x, y, v)], mode="sqrt")
    broken = x.copy()
    broken[0, 1, 1] = np.nan
    ((_, state),) = precondition([(broken, y, v)], mode="sqrt")
    assert all(np.isfinite(part).all() for part in state)
    (curvature,), _ = step_of(((x.shape, y.shape),), "float32", "sqrt")
    p = run(lambda v, x, y, *state: curvature.precondition(v, DAMPING, state, lambda: [x, y]), v, x, y, *state)
    close(p[1], good[1], 1e-6)
    output = factor(y)[0] + DAMPING**0.5 * np.eye(OUTPUT_DIM)
    close(p[0], np.linalg.solve(output, v[0].T).T, 1e-4)


@pytest.mark.parametrize("sides", ["rows", "factors"])
def test_sides_of_zeros_leave_the_damping(sides):
    x, y, v = draw(SIDES[sides])
    x[0], y[1] = 0, 0
    ((p, _),) = precondition([(x, y, v)])
    close(p, dense(x, y, v), 1e-4)


def test_pi_does_not_depend_on_how_a_constant_is_shared():
    x, y, v = draw()
    p, other = (precondition([problem])[0][0] for problem in ((x, y, v), (16 * x, y / 16, v)))
    close(other, p, 1e-4)
    p, other = (precondition([problem], mode="sqrt")[0][0] for problem in ((x, y, v), (16 * x, y / 16, v)))
    assert error(other, p) > 0.1


def test_large_damping_leaves_the_gradient():
    x, y, v = draw()
    close(precondition([(x, y, v)], 2.0**24, "factor")[0][0] * 2.0**48, v, 1e-5)
