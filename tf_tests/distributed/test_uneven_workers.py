"""Workers whose batches differ, in size or by not being finite, stay in step."""

import numpy as np
import pytest

from tf_tests.distributed import cases
from tf_tests.distributed.launch import horovod, launch
from tf_tests.small import weights

pytestmark = [*horovod, pytest.mark.slow]
SIZES, STEPS = (5, 3), 6


@pytest.mark.parametrize("method", ["kfac", "thor"])
def test_unequal_batches_count_by_their_examples(method, tmp_path):
    found = launch("unequal", 2, tmp_path, method=method, sizes=SIZES)
    alone = cases.prepared(method)
    x, y = cases.data(sum(SIZES) * STEPS)
    alone.fit(x, y, batch_size=sum(SIZES), shuffle=False, verbose=0)
    assert found[0]["digest"] == found[1]["digest"]
    for (path, value), other in zip(weights(alone).items(), found[0]["weights"].values(), strict=True):
        assert np.linalg.norm(other - value) < 1e-5 * np.linalg.norm(value), path


def test_one_workers_nan_is_skipped_by_all(tmp_path):
    found = launch("unequal", 2, tmp_path, method="kfac-eigen", sizes=(4, 4), bad=1)
    assert found[0]["digest"] == found[1]["digest"]
    assert found[0]["counters"] == found[1]["counters"] == (1, 1, STEPS - 1)
    assert all(np.isfinite(value).all() for value in found[0]["weights"].values())
