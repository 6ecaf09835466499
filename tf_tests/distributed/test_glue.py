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


RESUMED = ["kfac", "kfac-mem-opt", "sp-ngd", "sngd-roomy"]
DISAGREEMENTS = {
    "model": r"shape of variable 0 is \[\[72, 8\], 'float32'\] on worker 0 but \[\[72, 9\], 'float32'\] on worker 1",
    "optimizer": "optimizer is 'KFAC' on worker 0 but 'THOR' on worker 1",
    "argument": "argument learning_rate is 0.05.* on worker 0 but 0.1.* on worker 1",
    "captured": "number of variables is 15 on worker 0 but 10 on worker 1",
    "nothing captured": "number of variables is 15 on worker 0 but 4 on worker 1",
    "steps": r"different numbers of steps in an epoch, by rank: \[4, 2\]",
    "fraction": "one of 0, 0.5, 1. Received: gradient_worker_fraction=0.3",
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What is left by two workers that do one thing after the other, by rank; and the folder of their files."""
    folder = tmp_path_factory.mktemp("two")
    cases = {
        "glue": {},
        "resumed": {"methods": RESUMED, "steps": 8, "save": str(folder)},
        "ungathered": {"path": str(folder)},
        "disagreements": {"kinds": list(DISAGREEMENTS)},
    }
    return launch("several", 2, folder, cases=cases), folder


def test_workers_start_equal_and_see_the_same_metrics(two):
    first, second = (worker["glue"] for worker in two[0])
    for (path, value), other in zip(first["start"].items(), second["start"].values(), strict=True):
        np.testing.assert_array_equal(value, other, err_msg=path)
    assert first["history"] == second["history"]
    assert first["averaged"] == second["averaged"] == {"a": 0.5, "b": 1.0}


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_every_worker_says_what_is_wrong(what, two):
    for worker in two[0]:
        message = worker["disagreements"][what]
        assert re.search(DISAGREEMENTS[what], message), message


def test_statistics_that_others_have_are_not_lost_in_silence(two):
    first, second = (worker["ungathered"] for worker in two[0])
    for worker in (first, second):
        for what in ("model", "weights", "start"):
            assert "GatherStatistics" in worker[what], what
        assert worker["went on"]
    for own, other in zip(first["averages"], second["averages"], strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.fixture(scope="module")
def resumed(two, tmp_path_factory):
    """Two workers, then three that start from a file of which only worker 0 knows; and where theirs is."""
    workers, before = two
    folder = tmp_path_factory.mktemp("three")
    second = launch("resumed", 3, folder, methods=RESUMED, steps=8, load=str(before), save=str(folder))
    return [worker["resumed"] for worker in workers], second, folder


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
