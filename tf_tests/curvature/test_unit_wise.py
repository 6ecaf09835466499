"""Preconditioning with the blocks of each feature's scale and offset, against dense solves in float64."""

import functools

import keras
import numpy as np
import pytest

from keras_ngd.curvature import UnitWiseCurvature
from tf_tests.reference import normalization as reference
from tf_tests.reference.running import close, run

# A power of two: exact in float32, which dampings pass through.
DAMPING = 2.0**-3
MODES = ("relative", "pi", "sqrt", "factor")


def draw(count=2, parameters=2, features=5, dtype="float32", seed=0):
    """Blocks of `[scale, offset]` as they arise, of scales that differ between layers, and gradients."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, features, 6, parameters)) * np.logspace(0, -2, count)[:, None, None, None]
    rows[..., -1] += rows[..., 0]
    v = rng.standard_normal((count, parameters, features))
    return (np.swapaxes(rows, 2, 3) @ rows).astype(dtype), v.astype(dtype)


@functools.cache
def curvatures_and_step(shapes, mode, factor):
    """Curvatures of `(count, parameters, features, dtype)`, and their refresh and application as one function."""
    curvatures = [UnitWiseCurvature(*shape, mode, factor) for shape in shapes]

    def step(blocks, gradients, damping, states, chosen):
        new = UnitWiseCurvature.refresh_all(curvatures, [[b] for b in blocks], damping, [[s] for s in states], chosen)
        directions = [c.precondition(v, damping, s, None) for c, v, s in zip(curvatures, gradients, new, strict=True)]
        return directions, [state for [state] in new]

    return curvatures, step


def first_states(curvatures):
    for curvature in curvatures:
        curvature.build(lambda shape, initializer, dtype, name: keras.Variable(initializer, shape, dtype, name=name))
    return [np.asarray(variable) for curvature in curvatures for variable in curvature.variables]


def precondition(problems, mode="relative", damping=DAMPING, factor=1.0, states=None, chosen=None, xla=False):
    """`P` of pairs of blocks and gradients, all refreshed together, and the states."""
    shapes = tuple((*v.shape, str(v.dtype)) for _, v in problems)
    curvatures, step = curvatures_and_step(shapes, mode, factor)
    states = first_states(curvatures) if states is None else states
    n = len(problems)

    def flat(*tensors):
        parts = [list(tensors[i * n : (i + 1) * n]) for i in range(3)]
        return step(parts[0], parts[1], tensors[3 * n], parts[2], list(tensors[3 * n + 1 :]) or None)

    blocks, gradients = zip(*problems, strict=True)
    return run(flat, *blocks, *gradients, *states, np.float32(damping), *(chosen or []), xla=xla)


def dense(blocks, v, mode="relative", damping=DAMPING):
    pairs = zip(blocks.astype("float64"), v.astype("float64"), strict=True)
    return np.stack([reference.preconditioned(*pair, damping, mode) for pair in pairs])


@pytest.mark.parametrize("parameters", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_dense_solve(mode, parameters):
    blocks, v = draw(parameters=parameters)
    close(precondition([(blocks, v)], mode)[0][0], dense(blocks, v, mode), 1e-5)


@pytest.mark.parametrize("parameters", [1, 2])
def test_equals_the_dense_solve_in_float64(float64, parameters):
    blocks, v = draw(parameters=parameters, dtype="float64")
    close(precondition([(blocks, v)])[0][0], dense(blocks, v), 1e-12)


def test_groups_of_several_shapes_under_xla():
    problems = [draw(3, 2, 4, seed=1), draw(1, 1, 6, seed=2), draw(2, 2, 1, seed=3)]
    for found, problem in zip(precondition(problems, xla=True)[0], problems, strict=True):
        close(found, dense(*problem), 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_damping_is_multiplied(mode):
    blocks, v = draw()
    close(precondition([(blocks, v)], mode, factor=4.0)[0][0], dense(blocks, v, mode, 4 * DAMPING), 1e-5)


def test_relative_damping_is_that_of_each_layer():
    """The direction does not depend on the scale of the blocks, of which the second layer's are smaller."""
    blocks, v = draw()
    scaled = blocks * np.array([2.0**10, 2.0**-30], "float32").reshape(-1, 1, 1, 1)
    found, expected = (precondition([(b, v)])[0][0] for b in (scaled, blocks))
    close(found[0] * 2.0**10, expected[0], 1e-5)
    close(found[1] * 2.0**-30, expected[1], 1e-5)


@pytest.mark.parametrize("magnitude", [1e-25, 1e25])
def test_blocks_whose_products_no_float32_holds(magnitude):
    blocks, v = draw()
    blocks *= np.float32(magnitude)
    close(precondition([(blocks, v)])[0][0], dense(blocks, v), 1e-5)


def test_without_a_refresh_the_gradient_is_left_alone():
    _, v = draw()
    curvature = UnitWiseCurvature(*v.shape, "float32", "relative")
    states = first_states([curvature])
    np.testing.assert_array_equal(run(lambda v, s: curvature.precondition(v, 0.0, [s], None), v, *states), v)


def test_where_nothing_arrived_the_block_is_the_identity():
    blocks, v = draw()
    blocks[1] = 0
    close(precondition([(blocks, v)])[0][0], np.stack([dense(blocks, v)[0], v[1]]), 1e-5)


def test_only_the_chosen_layers_are_renewed():
    problems = [draw(3), draw(2, 1)]
    old = precondition(problems)[1]
    other = [draw(3, seed=5), draw(2, 1, seed=5)]
    chosen = [np.array([True, False, True]), np.array([False, True])]
    new, all_new = precondition(other, states=old, chosen=chosen)[1], precondition(other, states=old)[1]
    for found, before, after, which in zip(new, old, all_new, chosen, strict=True):
        np.testing.assert_array_equal(found[~which], before[~which])
        np.testing.assert_array_equal(found[which], after[which])
        assert np.any(before[which] != after[which])


@pytest.mark.parametrize("parameters", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e3])
def test_a_refresh_that_fails_keeps_the_old_state(parameters, bad):
    blocks, v = draw(2, parameters)
    old = precondition([(blocks, v)], "sqrt")[1]
    other = draw(2, parameters, seed=5)[0]
    failing = other.copy()
    np.fill_diagonal(failing[1, 3], bad)
    new, good = (precondition([(b, v)], "sqrt", states=old)[1][0] for b in (failing, other))
    failed = np.zeros((2, 5), bool)
    failed[1, 3] = True
    np.testing.assert_array_equal(new[failed], old[0][failed])
    np.testing.assert_array_equal(new[~failed], good[~failed])
    assert np.any(good[failed] != old[0][failed])


@pytest.mark.parametrize("block", [[[1, 1], [1, 1]], [[1, 2], [2, 1]], [[-1, 0], [0, -2]], [[0, 0], [0, 0]]])
def test_a_block_that_is_not_positive_definite_keeps_the_old_state(block):
    """A singular block, whose determinant rounding may leave on either side of zero, or an indefinite one."""
    blocks, v = draw(1)
    old = precondition([(blocks, v)], "sqrt")[1]
    failing = np.broadcast_to(np.array(block, "float32"), blocks.shape)
    new = precondition([(failing, v)], "sqrt", damping=0.0, states=old)[1]
    np.testing.assert_array_equal(new[0], old[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_relative_damping_of_a_block_that_is_not_finite_keeps_the_layer(bad):
    blocks, v = draw()
    old = precondition([(blocks, v)])[1]
    other = draw(seed=5)[0]
    failing = other.copy()
    failing[1, 0, 0, 0] = bad
    new = precondition([(failing, v)], states=old)[1][0]
    np.testing.assert_array_equal(new[0], precondition([(other, v)], states=old)[1][0][0])
    np.testing.assert_array_equal(new[1], old[0][1])


def test_traces_and_costs():
    blocks, v = draw(3)
    curvature = UnitWiseCurvature(*v.shape, "float32", "relative")
    close(run(lambda b: curvature.trace([b]), blocks), [sum(np.trace(f) for f in layer) for layer in blocks], 1e-6)
    assert curvature.refresh_cost == 3 * 5 * 8
    assert curvature.bytes == 3 * 5 * 4 * 4
    assert curvature.symmetric
