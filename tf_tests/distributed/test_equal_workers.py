"""Several workers train as one with all their examples would, and stay equal to the last bit."""

import numpy as np
import pytest

from tf_tests.distributed import cases
from tf_tests.distributed.launch import horovod, launch
from tf_tests.small import weights

pytestmark = [*horovod, pytest.mark.slow]


@pytest.fixture(scope="module")
def alone():
    """The weights after 20 steps of one worker with whole batches, by method."""
    found = {}
    for name in cases.METHODS:
        model = cases.prepared(name)
        cases.fit(model, *cases.data())
        found[name] = weights(model)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def together(request, tmp_path_factory):
    """What all methods leave on two and on four workers, by rank."""
    return launch(
        "methods", request.param, tmp_path_factory.mktemp("methods"), names=[*cases.METHODS, *cases.COMPRESSING]
    )


@pytest.mark.parametrize("method", cases.METHODS)
def test_workers_equal_one_with_all_examples(alone, together, method):
    for worker in together:
        for (path, value), found in zip(alone[method].items(), worker[method]["weights"].values(), strict=True):
            distance = np.linalg.norm(found - value) / np.linalg.norm(value)
            assert distance < 1e-5, path


@pytest.mark.parametrize("method", [*cases.METHODS, *cases.COMPRESSING])
def test_weights_and_state_are_the_same_bits_on_all_workers(together, method):
    for worker in together:
        assert worker[method]["digests"] == together[0][method]["digests"]
        assert worker[method]["finite"]
