"""Workers whose batches differ, in size or by not being finite, stay in step."""

import numpy as np
import pytest

from tf_tests.distributed import cases
from tf_tests.distributed.launch import horovod, launch
from tf_tests.small import relative_distance, weights

pytestmark = [*horovod, pytest.mark.slow]
SIZES, STEPS = (5, 3), 6


METHODS = ["kfac", "thor"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return launch("uneven", 2, tmp_path_factory.mktemp("uneven"), methods=METHODS, sizes=SIZES)


@pytest.mark.parametrize("method", METHODS)
def test_unequal_batches_count_by_their_examples(method, both):
    found = [worker[method] for worker in both]
    alone = cases.prepared(method)
    x, y = cases.data(sum(SIZES) * STEPS)
    alone.fit(x, y, batch_size=sum(SIZES), shuffle=False, verbose=0)
    assert found[0]["digest"] == found[1]["digest"]
    assert relative_distance(found[0]["weights"], weights(alone)) < 1e-5


def test_one_workers_nan_is_skipped_by_all(both):
    found = [worker["nan"] for worker in both]
    assert found[0]["digest"] == found[1]["digest"]
    assert found[0]["counters"] == found[1]["counters"] == (1, 1, STEPS - 1)
    assert all(np.isfinite(value).all() for value in found[0]["weights"].values())
