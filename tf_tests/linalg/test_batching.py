"""Work on some matrices of a batch, and on no others."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ngd.linalg import batching
from tf_tests.reference.running import run
from tf_tests.small import JIT


@pytest.fixture(params=[1, 2, 8], ids=lambda entries: f"{entries} at once")
def at_once(request, monkeypatch):
    """How many of the matrices of a test are worked on at a time."""
    monkeypatch.setattr(batching, "_CHUNK_ENTRIES", request.param * 9)
    return request.param


MATRICES, OLD = (np.random.default_rng(seed).normal(size=(5, 3, 3)).astype("float32") for seed in range(2))
CHOICES = [[False] * 5, [True] * 5, [False, True, False, False, True]]


@pytest.mark.parametrize("chosen", CHOICES)
def test_what_is_not_chosen_stays(at_once, chosen):
    found = run(
        lambda m, old: batching.of_chosen(lambda m, old: 2 * m + old, np.array(chosen), [m], old), MATRICES, OLD
    )
    np.testing.assert_allclose(found, np.where(np.reshape(chosen, (5, 1, 1)), 2 * MATRICES + OLD, OLD), rtol=1e-6)


@pytest.mark.skipif(not JIT, reason="XLA compiles what JAX runs")
@pytest.mark.parametrize("chosen", CHOICES)
def test_nothing_is_done_where_nothing_is_chosen(at_once, chosen):
    """XLA takes out of a loop what is the same in each of its turns, and computes it even if there are none."""
    import jax

    calls = []

    def counted(matrices, old):
        def note(matrices):
            calls.append(len(matrices))
            return matrices

        return jax.pure_callback(note, jax.ShapeDtypeStruct(matrices.shape, matrices.dtype), matrices)

    function = jax.jit(lambda chosen, m, old: batching.of_chosen(counted, chosen, [m], old))
    function(np.array(chosen), MATRICES, OLD).block_until_ready()
    turns = {0: 0, 5: -(-5 // min(at_once, 5)), 2: -(-2 // min(at_once, 5))}
    assert len(calls) == turns[sum(chosen)]


def test_batches_of_one_size_are_worked_on_together():
    sizes = []

    def doubled(matrices):
        sizes.append(tuple(matrices.shape))
        return [2 * matrices]

    work = [[keras.ops.ones((k, d, d))] for k, d in ((2, 3), (1, 4), (3, 3))]
    found = batching.batched_by_size(doubled, work)
    assert sizes == [(5, 3, 3), (1, 4, 4)]
    assert [tuple(one.shape) for [one] in found] == [(2, 3, 3), (1, 4, 4), (3, 3, 3)]
    assert all(float(ops.max(ops.abs(one - 2))) == 0 for [one] in found)
