"""Preconditioning with block-diagonal factors, against KFAC's on the same factors with all other entries set to zero."""

import functools

import keras
import numpy as np
import pytest

from keras_ngd.curvature import KroneckerCurvature, SplitCurvature
from keras_ngd.linalg import batching, diagonal, inverse
from tf_tests.curvature.test_kronecker import DAMPING, draw
from tf_tests.linalg.test_diagonal import block_diagonal
from tf_tests.reference.running import close, error, run


def partitions(a, g, split, use_bias=True):
    width = a.shape[-1] - int(use_bias)
    return diagonal.partition(width, use_bias, split), diagonal.partition(g.shape[-1], False, split)


@functools.cache
def step_of(shapes, parts, method, mode):
    """Refreshes curvatures together and preconditions with each."""
    curvatures = [
        SplitCurvature(count, *sides, dtype, method, mode) for (count, dtype), sides in zip(shapes, parts, strict=True)
    ]

    def step(factors, gradients, damping, states, chosen):
        states = SplitCurvature.refresh_all(curvatures, factors, damping, states, chosen)
        return [
            c.precondition(v, damping, s, None) for c, v, s in zip(curvatures, gradients, states, strict=True)
        ], states

    return curvatures, step


def precondition(problems, splits, damping=DAMPING, method="cholesky", mode="pi", states=None, chosen=None, xla=False):
    """`P` of several groups refreshed together, and their states; `problems` are triples `(a, g, v)`."""
    parts = tuple(partitions(a, g, split) for (a, g, _), split in zip(problems, splits, strict=True))
    shapes = tuple((len(a), str(a.dtype)) for a, *_ in problems)
    curvatures, step = step_of(shapes, parts, method, mode)
    factors = [[*blocks(a, sides[0]), *blocks(g, sides[1])] for (a, g, _), sides in zip(problems, parts, strict=True)]
    if states is None:
        states = []
        for curvature in curvatures:
            curvature.build(
                lambda shape, initializer, dtype, name: keras.Variable(initializer, shape, dtype, name=name)
            )
            states.append([np.asarray(v) for v in curvature.variables])
    chosen = [np.ones(len(a), bool) for a, *_ in problems] if chosen is None else chosen
    sizes = [len(f) for f in factors]

    def flat(*tensors):
        tensors, take = list(tensors), lambda n: [tensors.pop(0) for _ in range(n)]
        arguments = [take(n) for n in sizes], take(len(sizes)), take(1)[0], [take(n) for n in sizes], take(len(sizes))
        return step(*arguments)

    arguments = [*sum(factors, []), *(v for *_, v in problems), np.float32(damping), *sum(states, []), *chosen]
    return run(flat, *arguments, xla=xla)


def blocks(matrices, parts):
    result, start = [], 0
    for count, size in parts:
        spans = [slice(start + i * size, start + (i + 1) * size) for i in range(count)]
        result.append(np.stack([matrices[:, s, s] for s in spans], axis=1))
        start += count * size
    return result


def dense(a, g, v, split, damping=DAMPING, mode="pi"):
    """The same by solves with dense matrices; the dampings are those of the whole factors."""
    from tf_tests.reference import kronecker as reference

    parts = partitions(a, g, split)
    cut = [block_diagonal(blocks(m.astype("float64"), p), p) for m, p in zip((a, g), parts, strict=True)]
    return np.stack(
        [
            reference.dense_preconditioned(*block, float(np.float32(damping)), mode)
            for block in zip(*cut, v, strict=True)
        ]
    )


@pytest.mark.parametrize("mode", ["pi", "sqrt", "factor"])
@pytest.mark.parametrize("method", ["cholesky", "newton-schulz", "auto"])
@pytest.mark.parametrize("split", [1, 3, 5, 100])
def test_equals_the_dense_solve_with_the_blocks(method, mode, split):
    problem = draw(count=2, input_dim=8, output_dim=5)
    found, _ = precondition([problem], [split], method=method, mode=mode)
    close(found[0], dense(*problem, split, mode=mode), 1e-4)


def test_equals_the_dense_solve_in_float64(float64):
    problem = draw(count=2, input_dim=8, output_dim=5, dtype="float64")
    found, _ = precondition([problem], [3])
    close(found[0], dense(*problem, 3), 1e-10)


def test_groups_of_different_shape_are_refreshed_together():
    """Blocks of 3 from both factors of both groups share one batch."""
    problems = [draw(count=2, input_dim=8, output_dim=6), draw(count=1, input_dim=10, output_dim=3, seed=1)]
    found, _ = precondition(problems, [3, 3])
    for result, problem in zip(found, problems, strict=True):
        close(result, dense(*problem, 3), 1e-4)


def test_a_split_of_everything_is_kfac_to_the_last_bit():
    a, g, v = draw(count=3)
    kfac = KroneckerCurvature(3, a.shape[-1], g.shape[-1], "float32", "cholesky", "pi")
    identity = [np.broadcast_to(np.eye(m.shape[-1], dtype="float32"), m.shape) for m in (a, g)]

    def step(a, g, v, *state):
        return kfac.precondition(v, DAMPING, kfac.refresh([a, g], DAMPING, list(state)), None)

    np.testing.assert_array_equal(precondition([(a, g, v)], [100])[0][0], run(step, a, g, v, *identity))


def test_a_split_of_one_divides_by_the_diagonals():
    a, g, v = draw(count=1)
    mean_a, mean_g = (np.trace(m[0]) / m.shape[-1] for m in (a, g))
    pi, root = np.sqrt(mean_a / mean_g), np.sqrt(DAMPING)
    scale = np.outer(np.diag(a[0]) + pi * root, np.diag(g[0]) + root / pi)
    close(precondition([(a, g, v)], [1])[0][0][0], v[0] / scale, 1e-6)


@pytest.mark.parametrize("xla", [False, True])
def test_only_the_chosen_are_renewed(xla):
    problem = draw(count=4, input_dim=7, output_dim=4)
    _, (first,) = precondition([problem], [3], xla=xla)
    other = draw(count=4, input_dim=7, output_dim=4, seed=5)
    chosen = np.array([True, False, False, True])
    _, (second,) = precondition([other], [3], states=[first], chosen=[chosen], xla=xla)
    _, (everything,) = precondition([other], [3], states=[first], xla=xla)
    for before, after, renewed in zip(first, second, everything, strict=True):
        np.testing.assert_array_equal(after[~chosen], before[~chosen])
        close(after[chosen], renewed[chosen], 1e-6)
        if before.shape[-1] > 1:
            assert error(after[chosen], before[chosen]) > 1e-3


@pytest.mark.parametrize("count", [1, 5, 6, 7, 12])
def test_inverting_by_chunks(count, monkeypatch):
    """Whatever is chosen, and whether or not it fills the chunks."""
    monkeypatch.setattr(batching, "_CHUNK_ENTRIES", 3 * 16)
    rng = np.random.default_rng(count)
    rows = rng.normal(size=(count, 8, 4))
    factors = (np.swapaxes(rows, 1, 2) @ rows).astype("float32")
    damping, previous = np.full(count, 0.5, "float32"), rng.normal(size=(count, 4, 4)).astype("float32")

    def invert(factors, damping, previous, chosen):
        return inverse.damped_inverse_of(factors, damping, previous, chosen, "cholesky")

    expected = np.linalg.inv(factors + 0.5 * np.eye(4))
    for chosen in (np.zeros(count, bool), np.ones(count, bool), rng.random(count) < 0.5, np.arange(count) == count - 1):
        found = run(invert, factors, damping, previous, chosen)
        np.testing.assert_array_equal(found[~chosen], previous[~chosen])
        if chosen.any():
            close(found[chosen], expected[chosen], 1e-4)


def test_blocks_that_are_not_finite_keep_their_inverses():
    a, g, v = draw(count=2, input_dim=7, output_dim=4)
    _, (state,) = precondition([(a, g, v)], [3])
    broken = a.copy()
    broken[0, 0, 0] = np.nan
    _, (after,) = precondition([(broken, g, v)], [3], states=[state])
    assert all(np.isfinite(part).all() for part in after)
    np.testing.assert_array_equal(after[0][0, 0], state[0][0, 0])
    assert error(after[0][0, 1], state[0][0, 1]) > 0
