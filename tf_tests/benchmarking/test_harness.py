"""How benchmarks are run and what they leave behind."""

import json
import math
import pathlib
import subprocess
import sys
import time
import types

import pytest

from benchmarks import (
    ablations,
    alone,
    costs,
    defaults,
    fisher,
    fisher_cost,
    gpu,
    harness,
    kinds,
    peers,
    readme,
    results,
    robustness,
    stagger,
    startup,
    tasks,
)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A benchmark of three cases that can be interrupted; its measured cases, in order."""
    done = types.SimpleNamespace(cases=[{"name": n, "size": 1} for n in "abc"], measured=[], fails=())

    def measured(name, case, running):
        if case["name"] in done.fails:
            raise KeyboardInterrupt
        done.measured.append(case["name"])
        return {"found": case["size"]}

    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    monkeypatch.setattr(harness, "PARTIAL", tmp_path / "partial")
    monkeypatch.setattr(harness, "module_of", lambda name: types.SimpleNamespace(cases=lambda quick: done.cases))
    monkeypatch.setattr(harness, "measured_in_process", measured)
    monkeypatch.setattr(harness, "AT_ONCE", 1)
    return done


def found(path):
    return {case["name"]: case["found"] for case in json.loads(path.read_text())["cases"]}


def test_an_interrupted_benchmark_goes_on_where_it_was(runs):
    runs.fails = ("c",)
    with pytest.raises(KeyboardInterrupt):
        harness.run("some")
    runs.fails = ()
    assert found(harness.run("some")) == {"a": 1, "b": 1, "c": 1}
    assert runs.measured == ["a", "b", "c"]
    # What is complete is measured anew.
    harness.run("some")
    assert runs.measured == ["a", "b", "c"] * 2


def test_a_case_that_has_changed_is_measured_again(runs):
    runs.fails = ("c",)
    with pytest.raises(KeyboardInterrupt):
        harness.run("some")
    runs.fails, runs.cases[0]["size"] = (), 2
    assert found(harness.run("some")) == {"a": 2, "b": 1, "c": 1}
    assert runs.measured == ["a", "b", "a", "c"]


def test_single_cases_can_be_measured_anew(runs):
    harness.run("some")
    for case in runs.cases:
        case["size"] = 3
    assert found(harness.run("some", only=["b"])) == {"a": 1, "b": 3, "c": 1}
    with pytest.raises(ValueError, match="no cases"):
        harness.run("some", only=["d"])


def test_cases_are_measured_by_patterns_of_names(runs):
    for case, name in zip(runs.cases, ("text-SGD", "text-KFAC", "vit-KFAC"), strict=True):
        case["name"] = name
    harness.run("some", only=["text-*"])
    assert runs.measured == ["text-SGD", "text-KFAC"]
    with pytest.raises(ValueError, match="no cases"):
        harness.run("some", only=["*-KFAC", "mlp-*"])


def test_cases_that_have_to_be_named_are_kept_by_runs_of_the_others(runs):
    runs.cases[2]["by_name"] = True
    assert found(harness.run("some", only=["c"])) == {"c": 1}
    path = harness.run("some")
    assert found(path) == {"a": 1, "b": 1, "c": 1}
    assert runs.measured == ["c", "a", "b"]
    # All others were measured in one run.
    assert json.loads(path.read_text())["minutes"] > 0


def test_a_result_says_how_long_all_of_it_took(runs):
    def minutes(**only):
        return json.loads(harness.run("some", **only).read_text())["minutes"]

    assert minutes(only=["a"]) is None
    taken = minutes()
    assert 0 < taken < 1
    assert minutes(only=["a"]) == taken
    runs.fails = ("c",)
    with pytest.raises(KeyboardInterrupt):
        harness.run("some")
    runs.fails = ()
    assert minutes() is None


def test_a_case_without_an_interpreter_is_left_out(runs, monkeypatch):
    monkeypatch.setattr(
        harness, "measured_in_process", lambda name, case, running: None if case["name"] == "b" else {"found": 1}
    )
    assert found(harness.run("some")) == {"a": 1, "c": 1}


def test_what_is_timed_has_the_machine_to_itself(tmp_path, monkeypatch):
    monkeypatch.setenv(alone.VARIABLE, str(tmp_path))
    count = (
        "import sys, time\n"
        "from benchmarks.alone import registered\n"
        "with registered(), open(sys.argv[1], 'wb', buffering=0) as file:\n"
        "    while file.write(b'.'):\n"
        "        time.sleep(0.001)\n"
    )
    file = tmp_path / "counted"
    other = subprocess.Popen([sys.executable, "-c", count, str(file)])
    try:
        while not file.exists():
            time.sleep(0.01)
        with alone.alone():
            # A signal arrives when its process is next to run.
            while pathlib.Path(f"/proc/{other.pid}/stat").read_text().rsplit(") ", 1)[1][0] != "T":
                time.sleep(0.01)
            before = file.stat().st_size
            time.sleep(0.3)
            assert file.stat().st_size == before
        until = time.monotonic() + 30
        while file.stat().st_size == before and time.monotonic() < until:
            time.sleep(0.01)
        assert file.stat().st_size > before
    finally:
        other.kill()
        other.wait()


def test_a_case_that_ends_while_it_is_alone_does_not_leave_others_stopped(tmp_path, monkeypatch):
    cases = [{"name": "dies"}, {"name": "waits"}]
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, sys, time, pathlib\n"
        f"sys.path.insert(0, {str(pathlib.Path.cwd())!r})\n"
        "from benchmarks import alone\n"
        f"there = pathlib.Path({str(tmp_path)!r}) / 'there'\n"
        "with alone.registered():\n"
        "    if 'waits' in sys.argv[-1]:\n"
        "        there.touch()\n"
        "        time.sleep(1)\n"
        "        print('{}')\n"
        "    else:\n"
        "        while not there.exists():\n"
        "            time.sleep(0.01)\n"
        "        with alone.alone():\n"
        "            print('{}', flush=True)\n"
        "            os._exit(0)\n"
    )
    program.chmod(0o755)
    module = types.SimpleNamespace(environment=lambda case: {}, python=lambda case: str(program))
    monkeypatch.setattr(harness, "module_of", lambda name: module)
    assert len(list(harness.found_of("some", cases))) == 2


def test_seconds_are_put_into_the_result(runs, monkeypatch):
    def timings(cases):
        return [{"name": "all", "timed": [case["name"] for case in cases]}]

    module = types.SimpleNamespace(cases=lambda quick: runs.cases, timings=timings)
    monkeypatch.setattr(harness, "module_of", lambda name: module)
    with pytest.raises(ValueError, match="no measured cases"):
        harness.time_again("some")
    before = json.loads(harness.run("some").read_text())
    monkeypatch.setattr(
        harness,
        "measured_in_process",
        lambda name, case, running: {"epoch_seconds": {one: [1.0, 2.0] for one in case["timed"]}},
    )
    after = json.loads(harness.time_again("some", ["a", "b"]).read_text())
    assert [case.pop("epoch_seconds", None) for case in after["cases"]] == [[1.0, 2.0], [1.0, 2.0], None]
    assert after == before


def test_one_optimizer_is_measured_beside_what_there_is_of_others(runs, monkeypatch):
    def one(loss):
        return {"loss": loss, "test_loss": loss, "accuracy": None, "chance": None, "clipped": None}

    problems = [
        {"name": n, "kind": "tables", "problem": n, "epochs": 1, "optimizers": ["SGD", "Adam", "KFAC"]} for n in "ab"
    ]
    module = types.SimpleNamespace(cases=lambda quick: problems, merged=defaults.merged)
    monkeypatch.setattr(harness, "module_of", lambda name: module)
    losses = {"SGD": 0.4, "Adam": 0.3, "KFAC": 0.2, "EKFAC": 0.1}
    monkeypatch.setattr(
        harness,
        "measured_in_process",
        lambda name, case, running: {"found": {name: one(losses[name]) for name in case["optimizers"]}},
    )
    harness.run("some")
    problems[:] = [{**case, "optimizers": ["SGD", "Adam", "KFAC", "EKFAC"]} for case in problems]
    losses["KFAC"] = 9.0
    payload = json.loads(harness.run("some", only=["a"], optimizers=["EKFAC"]).read_text())
    a, b = payload["cases"]
    assert {name: found["loss"] for name, found in a["found"].items()} == {**losses, "KFAC": 0.2}
    assert (a["optimizers"], list(b["found"])) == (list(losses), ["SGD", "Adam", "KFAC"])
    with pytest.raises(ValueError, match="no cases of the optimizers"):
        harness.run("some", optimizers=["Lion"])
    lines = defaults.table(payload).splitlines()
    assert lines[0] == "| tables | SGD | Adam | KFAC | EKFAC |"
    assert lines[3] == "| b, 1 epochs | 0.4 (0.4) | 0.3 (0.3) | **0.2 (0.2)** | - |"
    assert "| EKFAC | 1 of 1 | 0 | 0 | 0.33 |" in readme.defaults_table(payload).splitlines()
    assert [goal[0] for goal in defaults.goals({"cases": [a]}) if "THOR" in goal[0]] == []


def test_a_result_names_the_threads_that_were_set(runs, monkeypatch):
    for threads, end in (("1", " OPENBLAS_NUM_THREADS=1."), (None, ".")):
        if threads is None:
            monkeypatch.delenv(results.THREADS)
        else:
            monkeypatch.setenv(results.THREADS, threads)
        harness.run("some")
        source = results.source("some", results.load("some"))
        assert source.endswith(end)
        assert (results.THREADS in source) == (threads is not None)


@pytest.mark.parametrize(
    "benchmark",
    [costs, tasks, ablations, peers, gpu, kinds, robustness, fisher, fisher_cost, startup, stagger],
    ids=lambda module: module.__name__,
)
@pytest.mark.parametrize("quick", [True, False])
def test_cases_have_names_of_their_own_and_fit_into_json(benchmark, quick):
    found = benchmark.cases(quick)
    assert found == json.loads(json.dumps(found))
    assert len({case["name"] for case in found}) == len(found)
    if benchmark in (tasks, peers) and not quick:
        for of in tasks.by_task([case for case in found if case.get("grid")]).values():
            assert len({math.prod(map(len, case["grid"].values())) for case in of}) == 1
