"""Every collective on three real processes, against NumPy."""

import numpy as np
import pytest

from tf_tests.distributed import cases
from tf_tests.distributed.launch import horovod, launch

pytestmark = [*horovod, pytest.mark.slow]
P = 3
OWNERS = (2, 0, 2, 2)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collectives")
    return launch("collectives", P, folder, owners=OWNERS, file=str(folder / "first"))


def given(rank):
    return cases.tensors(rank)


@pytest.mark.parametrize("where", ["eager", "graph"])
def test_all_reduce_sums_on_all(found, where):
    for name in ("float32", "float64", "int32", "bfloat16"):
        expected = sum(np.float64(given(rank)[name]) for rank in range(P))
        for worker in found:
            np.testing.assert_allclose(
                np.float64(worker[where]["all_reduce"][name]), expected, rtol=1e-2 if name == "bfloat16" else 1e-6
            )
            np.testing.assert_array_equal(worker[where]["all_reduce"][name], found[0][where]["all_reduce"][name])


@pytest.mark.parametrize("where", ["eager", "graph"])
def test_all_gather_takes_different_lengths(found, where):
    expected = np.concatenate([given(rank)["ragged"] for rank in range(P)])
    for worker in found:
        np.testing.assert_array_equal(worker[where]["all_gather"], expected)


@pytest.mark.parametrize("where", ["eager", "graph"])
def test_reduce_scatter_gives_each_sum_to_its_owner_alone(found, where):
    for rank, worker in enumerate(found):
        for i, (owner, value) in enumerate(zip(OWNERS, worker[where]["reduce_scatter"], strict=True)):
            if owner != rank:
                assert value is None
            else:
                expected = sum(given(other)["layers"][i] for other in range(P))
                np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("where", ["eager", "graph"])
def test_broadcast_gives_the_roots(found, where):
    for worker in found:
        for value, expected in zip(worker[where]["broadcast"], given(1)["layers"], strict=True):
            np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_numbers_on_the_wire_are_the_same_on_all_and_half_the_bytes(found, dtype):
    for worker in found:
        for value, first, exact in zip(
            worker[dtype]["broadcast"], found[0][dtype]["broadcast"], given(1)["layers"], strict=True
        ):
            np.testing.assert_array_equal(value, first)
            np.testing.assert_allclose(value, exact, rtol=1e-2, atol=1e-3)
            assert not np.array_equal(value, exact)
        for stage, size in worker[dtype]["bytes"].items():
            assert 2 * size == worker["eager"]["bytes"][stage]


def test_received_bytes(found):
    """A ring's all-reduce; everyone else's part of a gather; P - 1 times what is owned; what the root has."""
    ragged = [given(rank)["ragged"].nbytes for rank in range(P)]
    layers = [layer.nbytes for layer in given(0)["layers"]]
    reduced = sum(given(0)[name].nbytes for name in ("float32", "float64", "int32")) + 2 * given(0)["bfloat16"].nbytes
    for rank, worker in enumerate(found):
        for where in ("eager", "graph"):
            received = worker[where]["bytes"]
            assert received["gradients"] == 2 * (P - 1) * reduced // P
            assert received["rows"] == sum(ragged) - ragged[rank]
            owned = sum(size for size, owner in zip(layers, OWNERS, strict=True) if owner == rank)
            assert received["statistics"] == (P - 1) * owned
            assert received["inverses"] == (0 if rank == 1 else sum(layers))


def test_objects_and_worker_zeros_object(found):
    for worker in found:
        assert worker["gathered"] == [{"rank": rank} for rank in range(P)]
        assert worker["of worker 0"] == "from 0"


def test_first_of_the_machine_goes_first(found):
    assert found[0]["in turn"] == 0
    assert all(worker["in turn"] == 1 for worker in found[1:])


def test_shards_are_equal_disjoint_and_nearly_everything(found):
    parts = [worker["shard"] for worker in found]
    assert [len(part) for part in parts] == [3, 3, 3]
    assert sorted(sum(parts, [])) == list(range(9))
