"""Curvatures in eigenbases, against float64, and their limits."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ngd.curvature import EigenAdamCurvature, EigenbasisCurvature, EKFACCurvature, Slot
from keras_ngd.linalg import diagonal
from tf_tests.curvature.test_kronecker import draw, first_state
from tf_tests.linalg.test_diagonal import block_diagonal
from tf_tests.reference import eigenbasis as reference
from tf_tests.reference.running import close, run

ADAM = {"beta_1": 0.9, "beta_2": 0.95, "epsilon": 1e-8}

# Whole factors; blocks of both, one of them smaller, and a bias.
PARTS = {
    "whole": (((1, 7),), ((1, 5),)),
    "split": (diagonal.partition(6, True, 4), diagonal.partition(5, False, 2)),
    "no basis on the left": (((7, 1),), ((1, 5),)),
    "none": (((7, 1),), ((5, 1),)),
}
every_split = pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)


class Rotating(EigenbasisCurvature):
    """`P = QA^T V QG`."""

    def precondition(self, v, damping, state, inputs):
        return self.rotated(v, state)


def blocks(a, g, parts):
    return [np.asarray(b) for side, p in zip((a, g), parts, strict=True) for b in diagonal.blocks_of(side, p)]


def make(kind, parts, count=2, dtype="float32", **arguments):
    return kind(count, *parts, dtype, **arguments)


def dense(side, parts):
    """The bases of a side's parts as one matrix for each of the `k`, from a list with None for those that have none."""
    count = next((len(b) for b in side if b is not None), 2)
    found = [
        np.tile(np.eye(size), (count, number, 1, 1)) if basis is None else basis
        for basis, (number, size) in zip(side, parts, strict=True)
    ]
    return block_diagonal(found, parts)


def refreshed(curvature, inputs):
    state = first_state(curvature)
    kept = [value for value, slot in zip(state, curvature.slots, strict=True) if slot.refreshed]
    damping = np.float32(1.0)
    return run(lambda *t: curvature.refresh(list(t[: len(inputs)]), damping, list(t[len(inputs) :])), *inputs, *kept)


@every_split
def test_rotations_are_those_of_the_eigenvectors_of_all_blocks(parts):
    a, g, v = draw(dtype="float64")
    curvature = make(Rotating, parts)
    state = refreshed(curvature, blocks(a.astype("float32"), g.astype("float32"), parts))
    assert [tuple(t.shape) for t in state] == [slot.shape for slot in curvature.slots]
    left, right = curvature._bases(state)
    qa, qg = dense(left, parts[0]), dense(right, parts[1])
    rotated = run(lambda v, *s: curvature.rotated(v, s), v.astype("float32"), *state)
    close(rotated, np.swapaxes(qa, 1, 2) @ v @ qg, 1e-5)
    close(run(lambda v, *s: curvature.rotated_back(v, s), rotated, *state), v, 1e-5)
    # In its basis each block is diagonal.
    for side, basis, of_side in zip((a, g), (qa, qg), parts, strict=True):
        cut = block_diagonal([np.asarray(b) for b in diagonal.blocks_of(side, of_side)], of_side)
        for matrix, q in zip(cut, basis, strict=True):
            assert reference.residual(matrix, q) < 1e-5


def test_blocks_of_one_size_are_decomposed_together_and_failures_counted_by_layer():
    a, g, _ = draw(input_dim=5, output_dim=5)
    curvatures = [make(Rotating, PARTS["whole"]), make(Rotating, (((1, 5),), ((1, 5),)))]
    b, _, _ = draw(input_dim=7, output_dim=5, seed=1)
    inputs = [blocks(b, g, PARTS["whole"]), [a[:, None], g[:, None]]]
    inputs[1][0][1, 0, 2, 2] = np.inf
    states = [first_state(c) for c in curvatures]
    found = Rotating.refresh_all(curvatures, inputs, 1.0, states)
    assert [np.asarray(c.failures(s)).tolist() for c, s in zip(curvatures, found, strict=True)] == [[0, 0], [0, 1]]
    np.testing.assert_array_equal(np.asarray(found[1][0])[1, 0], np.eye(5))
    # What is not chosen stays as it was.
    chosen = [ops.convert_to_tensor([True, False]), ops.convert_to_tensor([False, True])]
    some = Rotating.refresh_all(curvatures, inputs, 1.0, states, chosen)
    np.testing.assert_array_equal(np.asarray(some[0][0])[0], np.asarray(found[0][0])[0])
    np.testing.assert_array_equal(np.asarray(some[0][0])[1, 0], np.eye(7))


@every_split
def test_steps_are_those_of_adam_in_the_bases(parts):
    a, g, _ = draw()
    curvature = make(EigenAdamCurvature, parts, **ADAM)
    bases = refreshed(curvature, blocks(a, g, parts))
    left, right = curvature._bases(bases)
    qa, qg = (dense(side, p) for side, p in zip((left, right), parts, strict=True))
    state = [*bases, *first_state(curvature)[len(bases) :]]
    adams = [reference.Adam((7, 5)) for _ in range(2)]

    def step(v, *state):
        new = curvature.stepped(v, state, None)
        return curvature.precondition(v, None, [*state[:-3], *new], None), new

    for seed in range(4):
        v = draw(seed=10 + seed)[2]
        found, new = run(step, v, *state)
        state = [*state[:-3], *new]
        expected = [adam.direction(*block) for adam, *block in zip(adams, v.astype("float64"), qa, qg, strict=True)]
        close(found, np.stack(expected), 1e-4)
    assert state[-1].tolist() == [4, 4]


@every_split
def test_a_new_basis_turns_the_mean_of_gradients(parts):
    a, g, v = draw()
    curvature = make(EigenAdamCurvature, parts, tolerance=0.01, **ADAM)
    state = first_state(curvature)
    kept = [i for i, slot in enumerate(curvature.slots) if slot.refreshed]
    for i, value in zip(kept, refreshed(curvature, blocks(a, g, parts)), strict=True):
        state[i] = value
    first = state[-3] = run(lambda v, *s: curvature.stepped(v, s)[0], v, *state)

    def mean(state):
        return run(lambda *s: curvature.rotated_back(s[-3], s), *state)

    # Both factors of the second block are other ones.
    others = [np.concatenate([side[:1], new[1:]]) for side, new in zip((a, g), draw(seed=3)[:2], strict=True)]
    inputs = blocks(*others, parts)

    def refresh(*tensors):
        return curvature.refresh(list(tensors[: len(inputs)]), 1.0, list(tensors[len(inputs) :]))

    for i, value in zip(kept, run(refresh, *inputs, *(state[i] for i in kept)), strict=True):
        state[i] = value
    close(mean(state), 0.1 * v, 1e-5)
    np.testing.assert_array_equal(state[-3][0], first[0])
    assert np.allclose(state[-3][1], first[1]) == (not curvature.with_bases)


def ekfac_steps(parts, damping_mode, damping, dtype="float64", scale=5.0):
    """After a refresh and two steps: the dense bases, the state, the last gradients and what became of them."""
    a, g, _ = draw(dtype=dtype)
    curvature = make(EKFACCurvature, parts, dtype=dtype, decay=0.9, damping_mode=damping_mode)
    state = refreshed(curvature, blocks(a, g, parts))
    start = np.array(state[-1])
    left, right = curvature._bases(state)

    def step(v, *state):
        [new] = curvature.stepped(v, state, lambda: ops.full((2,), scale, dtype))
        return curvature.precondition(v, np.asarray(damping, dtype), [*state[:-1], new], None), new

    for seed in range(2):
        v = draw(dtype=dtype, seed=seed)[2]
        p, second = run(step, v, *state)
        state = [*state[:-1], second]
    return dense(left, parts[0]), dense(right, parts[1]), start, second, v, p


@every_split
@pytest.mark.parametrize("damping_mode", ["relative", "exact"])
def test_second_moments_are_solved_for_as_the_dense_matrix(float64, parts, damping_mode):
    qa, qg, _, second, v, p = ekfac_steps(parts, damping_mode, 0.3)
    for left, right, s, gradient, found in zip(qa, qg, second, v, p, strict=True):
        both = np.kron(left, right)
        damping = 0.3 * s.mean() if damping_mode == "relative" else 0.3
        fisher = both @ np.diag(s.reshape(-1)) @ both.T + damping * np.eye(s.size)
        close(found, np.linalg.solve(fisher, gradient.reshape(-1)).reshape(gradient.shape), 1e-10)


@every_split
def test_second_moments_begin_with_the_eigenvalues_and_average_squares(float64, parts):
    qa, qg, start, second, _, _ = ekfac_steps(parts, "exact", 1.0)
    a, g, _ = draw(dtype="float64")
    expected = []
    for i in range(2):
        values = [np.diag(q[i].T @ side[i] @ q[i]) for q, side in ((qa, a), (qg, g))]
        expected.append(np.outer(*values))
        close(start[i], expected[i], 1e-10)
        for seed in range(2):
            v = draw(dtype="float64", seed=seed)[2][i]
            expected[i] = 0.9 * expected[i] + 0.1 * 5.0 * (qa[i].T @ v @ qg[i]) ** 2
    close(second, np.stack(expected), 1e-10)


def test_second_moments_go_on_where_the_bases_stay():
    a, g, _ = draw()
    curvature = make(EKFACCurvature, PARTS["whole"], decay=0.9, damping_mode="exact", tolerance=0.01)
    state = refreshed(curvature, blocks(a, g, PARTS["whole"]))
    state[-1] = 2 * state[-1]
    other = np.array(a)
    other[1] = draw(seed=3)[0][1]
    again = curvature.refresh(blocks(other, g, PARTS["whole"]), 1.0, state)
    np.testing.assert_array_equal(np.asarray(again[-1])[0], state[-1][0])
    assert not np.allclose(np.asarray(again[-1])[1], state[-1][1])
    assert np.asarray(again[-1])[1].sum() == pytest.approx(np.trace(other[1]) * np.trace(g[1]), rel=1e-4)


def test_without_second_moments_a_gradient_stays_as_it_is():
    curvature = make(EKFACCurvature, PARTS["whole"], decay=0.9, damping_mode="relative")
    v = draw()[2]
    close(run(lambda v, *s: curvature.precondition(v, 0.1, s, None), v, *first_state(curvature)), v, 1e-6)


def test_which_part_of_the_state_refreshes_and_steps_renew():
    curvature = make(EigenAdamCurvature, PARTS["whole"], **ADAM)
    assert curvature.has_steps
    assert [s.name.rsplit("_", 2)[0] for s in curvature.slots if s.refreshed] == [
        "input_basis_0",
        "output_basis_0",
        "failed_bases",
        "first_moment",
    ]
    assert [s.name.rsplit("_", 2)[0] for s in curvature.slots if s.stepped] == [
        "first_moment",
        "second_moment",
        "steps",
    ]
    curvature.build(lambda shape, initializer, dtype, name: keras.Variable(initializer, shape, dtype, name=name))
    assert [v.name for v in curvature.refreshed_variables] == [s.name for s in curvature.slots[:4]]
    assert [v.name for v in curvature.stepped_variables] == [s.name for s in curvature.slots[3:]]
    # Without a basis there is nothing to turn.
    assert [s.refreshed for s in make(EigenAdamCurvature, PARTS["none"], **ADAM).slots] == [True, False, False, False]
    assert not make(Rotating, PARTS["whole"]).has_steps
    assert Slot("name", (1,), "zeros", "float32") == ("name", (1,), "zeros", "float32", True, False)
