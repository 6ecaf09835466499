"""Starting together, averaging metrics, going on with other numbers of workers, and ending together."""

import os
import re
import signal
import time

import keras
import numpy as np
import pytest

from tf_tests.distributed import cases
from tf_tests.distributed.launch import horovod, launch, start
from tf_tests.small import relative_distance, weights

pytestmark = [*horovod, pytest.mark.slow]


def test_workers_start_equal_and_see_the_same_metrics(tmp_path):
    first, second = launch("glue", 2, tmp_path)
    for (path, value), other in zip(first["start"].items(), second["start"].values(), strict=True):
        np.testing.assert_array_equal(value, other, err_msg=path)
    assert first["history"] == second["history"]
    assert first["averaged"] == second["averaged"] == {"a": 0.5, "b": 1.0}


DISAGREEMENTS = {
    "model": r"shape of variable 0 is \[\[72, 8\], 'float32'\] on worker 0 but \[\[72, 9\], 'float32'\] on worker 1",
    "optimizer": "optimizer is 'KFAC' on worker 0 but 'THOR' on worker 1",
    "argument": "argument learning_rate is 0.05.* on worker 0 but 0.1.* on worker 1",
    "captured": "number of variables is 16 on worker 0 but 10 on worker 1",
    "nothing captured": "number of variables is 16 on worker 0 but 4 on worker 1",
    "steps": r"different numbers of steps in an epoch, by rank: \[4, 2\]",
    "fraction": "one of 0, 0.5, 1. Received: gradient_worker_fraction=0.3",
}


@pytest.fixture(scope="module")
def disagreements(tmp_path_factory):
    return launch("disagreements", 2, tmp_path_factory.mktemp("disagreements"), kinds=list(DISAGREEMENTS))


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_every_worker_says_what_is_wrong(what, disagreements):
    for worker in disagreements:
        assert re.search(DISAGREEMENTS[what], worker[what]), worker[what]


RESUMED = ["kfac", "kfac-mem-opt", "sp-ngd", "sngd-roomy"]


def test_statistics_that_others_have_are_not_lost_in_silence(tmp_path):
    first, second = launch("ungathered", 2, tmp_path, path=str(tmp_path))
    for worker in (first, second):
        for what in ("model", "weights", "start"):
            assert "GatherStatistics" in worker[what], what
        assert worker["went on"]
    for own, other in zip(first["averages"], second["averages"], strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Two workers, then three that start from a file of which only worker 0 knows; and where theirs is."""
    folders = [tmp_path_factory.mktemp(name) for name in ("two", "three")]
    first = launch("resumed", 2, folders[0], methods=RESUMED, steps=8, save=str(folders[0]))
    second = launch("resumed", 3, folders[1], methods=RESUMED, steps=8, load=str(folders[0]), save=str(folders[1]))
    return first, second, folders[1]


@pytest.mark.parametrize("method", RESUMED)
def test_training_goes_on_with_other_numbers_of_workers(method, resumed):
    """Two workers, then three, then one: as one worker all along."""
    first, second, folder = resumed
    for workers, step in ((first, 8), (second, 16)):
        assert len({worker[method]["digest"] for worker in workers}) == 1
        assert {worker[method]["step"] for worker in workers} == {step}
        assert not any(worker[method]["jit"] for worker in workers)
    model = keras.models.load_model(folder / f"{method}.keras")
    cases.fit(model, *cases.data(cases.BATCH * 8))
    alone = cases.prepared(method)
    for _ in range(3):
        cases.fit(alone, *cases.data(cases.BATCH * 8))
    assert int(model.optimizer.iterations) == 24
    assert relative_distance(weights(model), weights(alone)) < 1e-5


def test_a_killed_worker_ends_the_job_and_its_checkpoint_goes_on(tmp_path):
    path = str(tmp_path / "kfac.keras")
    job = start("killed", 3, tmp_path, path=path)
    try:
        output, _ = job.communicate(timeout=150)
    except Exception:
        os.killpg(job.pid, signal.SIGKILL)
        raise
    assert job.returncode != 0
    assert "Process 1 exit with status code" in output
    written = os.path.getmtime(path)
    assert time.time() - written < 60
    found = launch("resumed", 2, tmp_path, methods=["kfac"], steps=4, load=str(tmp_path))
    assert [worker["kfac"]["step"] for worker in found] == [cases.STEPS + 4] * 2
