"""Which worker does what, what it holds, and what travels."""

import collections

import pytest

from keras_ngd.linalg.packing import packed_size
from tf_tests.distributed.launch import horovod, launch

pytestmark = [*horovod, pytest.mark.slow]
P, STEPS = 3, 20


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each worker says of itself, by rank, by method."""
    names = ["kfac", "kfac-mem-opt", "sp-ngd"]
    workers = launch("all_shares", P, tmp_path_factory.mktemp("shares"), methods=names)
    return {name: [worker[name] for worker in workers] for name in names}


def triangles(worker):
    return 4 * sum(packed_size(size) for shape in worker["shapes"] for size in shape)


def received(workers, stage):
    return [worker["received"].get(stage, 0) for worker in workers]


@pytest.mark.parametrize("method", ["kfac", "kfac-mem-opt", "sp-ngd"])
def test_every_matrix_is_inverted_by_one_worker(found, method):
    inverted = collections.Counter()
    for worker in found[method]:
        assert worker["inverted"]
        inverted.update(worker["inverted"])
    refreshes = found[method][0]["updates"][1]
    sizes = [size for shape in found[method][0]["shapes"] for size in shape]
    assert inverted == {size: refreshes * count for size, count in collections.Counter(sizes).items()}


def controls(layers):
    """Numbers that travel with the gradients: of examples, of the loss and its count, and of each layer three marks."""
    return 3 + 3 * layers


@pytest.mark.parametrize("method", ["kfac", "kfac-mem-opt"])
def test_gradients_and_statistics_are_reduced_as_in_a_ring(found, method):
    """Gradients `2 (P - 1) / P W` at every step; one triangle of each factor at each of its updates."""
    first, layers = found[method][0], len(found[method][0]["shapes"])
    assert first["updates"] == (10, 5)
    gradients = 4 * (first["plain"] + controls(layers))
    statistics = 10 * 2 * (P - 1) * triangles(first) / P
    for worker in found[method]:
        assert worker["received"]["gradients"] == STEPS * (2 * (P - 1) * gradients // P)
        # Each layer's is rounded down.
        assert 0 <= statistics - worker["received"]["statistics"] <= 10 * layers


def test_all_hold_all_inverses_or_each_its_own(found):
    """COMM-OPT sends inverses at refreshes, MEM-OPT preconditioned gradients at every step."""
    everywhere, own = found["kfac"], found["kfac-mem-opt"]
    sizes = 4 * sum(size**2 for shape in own[0]["shapes"] for size in shape)
    assert [worker["held"] for worker in everywhere] == [sizes] * P
    assert sum(worker["held"] for worker in own) == sizes
    assert max(worker["held"] for worker in own) < sizes

    assert sum(received(everywhere, "inverses")) == 5 * (P - 1) * triangles(own[0])
    assert received(everywhere, "preconditioned") == received(own, "inverses") == [0] * P
    blocks = 4 * (sum(rows * columns for rows, columns in own[0]["shapes"]) + P)  # and each worker's part of the clip
    assert sum(received(own, "preconditioned")) == STEPS * (P - 1) * blocks


def test_owners_alone_receive_what_they_need(found):
    """SP-NGD's reduce-scatters: half the bytes of the same reduced to all, together."""
    owner, reduced = found["sp-ngd"], found["kfac-mem-opt"]
    first = owner[0]
    blocks, layers = sum(rows * columns for rows, columns in first["shapes"]), len(first["shapes"])
    rest = 2 * (P - 1) * 4 * (first["plain"] - blocks + controls(layers)) // P
    assert sum(received(owner, "gradients")) == STEPS * ((P - 1) * 4 * blocks + P * rest)
    assert sum(received(owner, "statistics")) == 10 * (P - 1) * triangles(first)
    assert received(owner, "preconditioned") == received(reduced, "preconditioned")
    assert [worker["held"] for worker in owner] == [worker["held"] for worker in reduced]
