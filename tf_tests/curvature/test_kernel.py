"""Preconditioning with a batch's rows, against dense solves with the sum of their outer products."""

import functools

import keras
import numpy as np
import pytest

from keras_ngd.curvature import KernelCurvature
from tf_tests.reference import low_rank as reference
from tf_tests.reference.running import close, error, run

# A power of two: exact in float32, which dampings pass through.
DAMPING = 2.0**-3


def draw(count=2, rows=6, input_dim=5, output_dim=3, dtype="float32", seed=0):
    """Rows and a gradient."""
    rng = np.random.default_rng([seed, count, rows])
    shapes = (count, rows, input_dim), (count, rows, output_dim), (count, input_dim, output_dim)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def variables(curvature):
    """The state that a new curvature starts from."""
    curvature.build(lambda shape, initializer, dtype, name: keras.Variable(initializer, shape, dtype, name=name))
    return [np.asarray(v) for v in curvature.variables]


@functools.cache
def step_of(counts, rows, dtype, weighted):
    """Refreshes curvatures together and preconditions with each."""
    curvatures = [KernelCurvature(count, rows, dtype) for count in counts]

    def step(damping, *tensors):
        size = 5 if weighted else 3
        problems = [tensors[i : i + size] for i in range(0, len(tensors), size)]
        states = KernelCurvature.refresh_all(curvatures, [p[:-1] for p in problems], damping, None)
        found = []
        for curvature, state, (a, g, *_, v) in zip(curvatures, states, problems, strict=True):
            found.append((curvature.precondition(v, damping, state, functools.partial(list, (a, g))), state))
        return found

    return step


def precondition(problems, damping=DAMPING, xla=False):
    """`P` and the new state of each of `problems`, `(a, g, v)` or `(a, g, weights, dampings, v)`."""
    first = problems[0][0]
    step = step_of(tuple(len(p[0]) for p in problems), first.shape[1], str(first.dtype), len(problems[0]) > 3)
    return run(step, np.float32(damping), *(t for problem in problems for t in problem), xla=xla)


def dense(a, g, v, damping=DAMPING):
    blocks = zip(*(t.astype("float64") for t in (a, g, v)), strict=True)
    return np.stack([reference.dense_preconditioned(*block, damping) for block in blocks])


@pytest.mark.parametrize(("rows", "xla"), [(1, False), (6, False), (6, True), (20, False)])
def test_equals_the_dense_solve(rows, xla):
    """With fewer and with more examples than the block has entries."""
    problem = draw(rows=rows)
    ((p, _),) = precondition([problem], xla=xla)
    close(p, dense(*problem), 1e-4)


@pytest.mark.parametrize("damping", [1.0, 2.0**-7, 2.0**-13])
def test_equals_the_dense_solve_in_float64(float64, damping):
    problem = draw(dtype="float64")
    ((p, _),) = precondition([problem], damping)
    close(p, dense(*problem, damping), 1e-10)


def test_layers_of_different_width_are_refreshed_together():
    problems = [draw(), draw(count=1, input_dim=9, output_dim=1, seed=1), draw(count=3, input_dim=2, seed=2)]
    for (p, _), problem in zip(precondition(problems), problems, strict=True):
        close(p, dense(*problem), 1e-4)


def test_interpolated_rows_stand_for_all(float64):
    """The whole of KID's eq. 8, from a batch's rows: chosen rows, their weights and the damping these were made with."""
    rows, rank, damping = 7, 3, 2.0**-4
    a, g, v = draw(count=2, rows=rows, dtype="float64")
    parts, expected = [], []
    for block in zip(a, g, v, strict=True):
        q = reference.kernel(*block[:2])
        _, chosen = reference.pivoted_cholesky(q, rank)
        parts.append((block[0][chosen], block[1][chosen], reference.row_weights(q, chosen, damping)))
        expected.append(reference.interpolated(*block, damping, rank))
    chosen_a, chosen_g, weights = (np.stack(part) for part in zip(*parts, strict=True))
    # The damping of today, which the rows were not weighted with, is not asked for.
    ((p, _),) = precondition([(chosen_a, chosen_g, weights, np.full(2, damping), v)], damping=99.0)
    close(p, np.stack(expected), 1e-10)


def test_rows_of_zeros_contribute_nothing(float64):
    a, g, v = draw(dtype="float64")
    ((p, _),) = precondition([(a, g, v)])
    padded = [np.concatenate([side, np.zeros((2, 3, side.shape[2]))], axis=1) for side in (a, g)]
    ((found, _),) = precondition([(*padded, v)])
    close(found, p, 1e-13)
    ((found, _),) = precondition([(0 * a, g, v)])
    close(found, v / DAMPING, 1e-14)


def test_the_order_of_the_examples_does_not_matter(float64):
    a, g, v = draw(dtype="float64")
    order = np.random.default_rng(0).permutation(6)
    close(precondition([(a[:, order], g[:, order], v)])[0][0], precondition([(a, g, v)])[0][0], 1e-13)


def test_before_the_first_refresh_gradients_pass_through():
    a, g, v = draw()
    curvature = KernelCurvature(2, 6, "float32")
    state = variables(curvature)
    p = run(lambda v, a, g, *state: curvature.precondition(v, DAMPING, state, lambda: [a, g]), v, a, g, *state)
    np.testing.assert_array_equal(p, v)
    assert curvature.bytes == sum(v.nbytes for v in state)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_block_that_fails_passes_its_gradient_through_alone(weighted):
    a, g, v = draw()
    extra = [np.broadcast_to(np.eye(6, dtype="float32"), (2, 6, 6)), np.full(2, DAMPING, "float32")] * weighted
    ((good, _),) = precondition([(a, g, *extra, v)])
    broken = a.copy()
    broken[0, 0, 0] = np.nan
    ((_, state),) = precondition([(broken, g, *extra, v)])
    assert all(np.isfinite(part).all() for part in state)
    curvature = KernelCurvature(2, 6, "float32")
    p = run(lambda v, a, g, *state: curvature.precondition(v, DAMPING, state, lambda: [a, g]), v, a, g, *state)
    np.testing.assert_array_equal(p[0], v[0])
    close(p[1], good[1], 1e-6)


def test_large_damping_leaves_the_gradient():
    a, g, v = draw()
    close(precondition([(a, g, v)], 2.0**24)[0][0] * 2.0**24, v, 1e-5)


def test_linear_positive_and_symmetric():
    a, g, v = draw()
    w = draw(seed=1)[2]
    p, q = (precondition([(a, g, t)])[0][0] for t in (v, w))
    close(precondition([(a, g, 2 * v - 3 * w)])[0][0], 2 * p - 3 * q, 1e-4)
    assert np.all(np.sum(p * v, axis=(1, 2)) > 0)
    assert not precondition([(a, g, 0 * v)])[0][0].any()
    np.testing.assert_allclose(np.sum(p * w), np.sum(v * q), rtol=1e-3)


def test_more_examples_are_more_curvature():
    a, g, v = draw()
    p, q = precondition([(a, g, v)])[0][0], precondition([(2 * a, g, v)])[0][0]
    assert np.all(np.sum(q * v, axis=(1, 2)) < np.sum(p * v, axis=(1, 2)))
    assert error(p, v) > 0.1
