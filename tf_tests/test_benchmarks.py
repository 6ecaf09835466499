"""What benchmarks do with their cases and figures; nothing is timed here."""

import json
import math
import pathlib
import subprocess
import sys
import time
import types

import keras
import numpy as np
import pytest

import keras_ngd
from benchmarks import (
    ablations,
    alone,
    costs,
    defaults,
    gpu,
    harness,
    kinds,
    networks,
    peers,
    readme,
    results,
    robustness,
    task_data,
    tasks,
    texts,
    trials,
)
from keras_ngd.analysis import exchanges


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


def test_costs_are_averages_over_a_cycle():
    factors = {"plain": 10.0, "statistics": 16.0, "inverses": 26.0}
    assert costs.cost(factors, 1, 1) == 26
    assert costs.cost(factors, 1, 10) == pytest.approx((26 + 9 * 16) / 10)
    assert costs.cost(factors, 10, 100) == pytest.approx((26 + 9 * 16 + 90 * 10) / 100)
    rows = {"plain": 10.0, "inverses": 16.0}
    assert costs.cost(rows, 1, 10) == pytest.approx((16 + 9 * 10) / 10)
    assert costs.cost({"plain": 10.0}, 10, 100) == 10


def test_the_target_is_what_the_best_first_order_method_ends_with():
    def case(optimizer, *last, target=None):
        runs = [{"loss": [1.0, loss], "seconds": [1, 1]} for loss in last]
        return {"task": "t", "optimizer": optimizer, "target": target, "runs": runs}

    assert tasks.targets({"cases": [case("SGD", 0.5, 0.3), case("Adam", 0.3, 0.3), case("KFAC", 0.1)]}) == {"t": 0.3}
    assert tasks.targets({"cases": [case("SGD", 0.5, target=0.05)]}) == {"t": 0.05}
    assert tasks.epochs_to([0.5, 0.2, 0.1], 0.2) == 2
    assert tasks.epochs_to([0.5], 0.2) is None


def test_comparisons_are_of_medians_and_of_methods_that_get_there():
    runs = [{"loss": [0.5, 0.1, 0.1], "seconds": [3, 2, 4]}, {"loss": [0.5, 0.4, 0.1], "seconds": [3, 2, 4]}]
    slow = {"task": "t", "optimizer": "SGD", "target": 0.2, "epochs": 3, "runs": runs}
    never = {**slow, "optimizer": "Adam", "runs": [{"loss": [0.5] * 3, "seconds": [1] * 3}]}
    fast = {**slow, "optimizer": "KFAC", "runs": [{"loss": [0.1, 0.1, 0.1], "seconds": [4, 4, 4]}]}
    assert tasks.needs(slow, 0.2) == {"epochs": 2.5, "seconds": 7}
    epochs, seconds = tasks.goals({"cases": [slow, never, fast]})
    assert epochs[2:] == ("0.40 (KFAC, 1, of SGD's 2.5)", True, "")
    assert seconds[2:] == ("0.57 (KFAC, 4, of SGD's 7)", True, "")
    fast["runs"] = never["runs"]
    epochs, _ = tasks.goals({"cases": [slow, never, fast]})
    assert epochs[2:] == ("not reached (SGD: 2.5)", False, "KFAC ends at 0.5, the target is 0.2")


def rivals(**curves):
    """Cases of a task whose target is where AdamW ends, by the losses of the only seed of each."""
    return [
        {
            "task": "t",
            "optimizer": name.replace("_", ", "),
            "target": "AdamW",
            "epochs": 4,
            "runs": [{"loss": losses, "seconds": [1] * 4}],
        }
        for name, losses in curves.items()
    ]


def test_rivals_are_measured_by_where_adamw_and_muon_end():
    first = {"Adam": [3, 3, 3, 1.5], "AdamW": [3, 2.5, 2, 2], "Muon": [3, 3, 3, 1.6]}
    cases = rivals(**first, KFAC=[3, 2, 1.8, 1.7], THOR=[3, 2.5, 1.9, 1.5], KFAC_defaults=[3, 3, 3, 2.5])
    assert tasks.targets({"cases": cases}) == {"t": 2}
    # By definition, although the third of its losses is as low.
    assert tasks.needs(cases[1], 2) == {"epochs": 4, "seconds": 4}
    assert tasks.goals({"cases": cases}) == [
        ("epochs to AdamW's end, t", "<= 0.50 of AdamW's", "0.50 (KFAC: 2, AdamW: 4)", True, ""),
        ("loss at the end, t", "< Muon's", "1.5 (THOR), 1.6 (Muon)", True, ""),
        (
            "epochs to AdamW's end, t, defaults",
            "<= 0.50 of AdamW's",
            "not reached",
            False,
            "KFAC, defaults ends at 2.5, AdamW at 2",
        ),
        ("loss at the end, t, defaults", "< Muon's", "2.5 (KFAC, defaults), 1.6 (Muon)", False, ""),
    ]


def test_eigen_adam_is_measured_by_where_adam_and_muon_end():
    curves = {"Adam": [3, 3, 3, 2], "Muon": [3, 3, 2, 1.6], "EigenAdam": [3, 1.5, 1, 1], "EigenAdam_defaults": [3] * 4}
    cases = [{**case, "target": None, "epochs": 4} for case in rivals(**curves)]
    assert tasks.goals_of_eigen_adam("t", cases) == [
        (
            "epochs of EigenAdam, defaults, to Adam's end, t",
            "<= 0.50 of Adam's",
            "not reached",
            False,
            "EigenAdam, defaults ends at 3, Adam at 2",
        ),
        ("epochs of EigenAdam, to Muon's end, t", "<= 0.67 of Muon's", "0.50 (2 of 4)", True, ""),
    ]
    assert tasks.goals_of_eigen_adam("t", cases[:2]) == []


def test_rivals_set_no_targets():
    cases = [{**case, "target": None} for case in rivals(Adam=[3, 2], **{"KL-Shampoo": [2, 1]}, SOAP=[2, 2])]
    assert tasks.targets({"cases": cases}) == {"t": 2}
    assert tasks.comparison(cases, 2)["epochs"] == (("Adam", 2), ("SOAP", 1))
    assert tasks.row("KL-Shampoo", {**cases[1], "grid": {}, "trials": []}, 2).startswith("| KL-Shampoo | - | 0 | 1.0")


def test_seconds_are_those_measured_beside_each_other():
    one = {"task": "t", "name": "t-SGD", "optimizer": "SGD", "target": 0.2, "epochs": 3, "grid": {}, "trials": []}
    one |= {"runs": [{"loss": [0.5, 0.1, 0.1], "seconds": [3, 2, 4]}], "batch_size": 8, "backend": "jax"}
    timed = {**one, "name": "t-KFAC", "optimizer": "KFAC", "epoch_seconds": [10, 10, 30]}
    assert [tasks.needs(case, 0.2)["seconds"] for case in (one, timed)] == [5, 20]
    assert [tasks.epoch_seconds(case) for case in (one, timed)] == [3, 10]
    cells = [line.split(" | ")[6] for line in tasks.task_table([one, timed], 0.2).splitlines()[-2:]]
    assert cells == ["3000.0*", "10000.0"]
    assert "*" not in tasks.task_table([one], 0.2).splitlines()[-1]
    [timing] = tasks.timings([one, timed])
    assert (timing["task"], timing["backend"]) == ("t", "jax")
    assert [(case["name"], "runs" in case) for case in timing["timed"]] == [("t-SGD", False), ("t-KFAC", False)]


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


@pytest.mark.slow
def test_epochs_of_a_task_are_timed_in_turn():
    cases = [case for case in tasks.cases(False) if case["name"] in ("mlp-SGD", "mlp-EigenAdam-defaults")]
    cases = [{**case, "epochs": 2, "best": {"momentum": 0.9, "learning_rate": 0.1}} for case in cases]
    found = trials.epoch_seconds(cases, passes=2)
    assert set(found) == {case["name"] for case in cases}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found.values())


def test_the_width_of_rates_is_that_around_the_best():
    case = {"task": "mlp", "optimizer": "EigenAdam", "target": None, "default": 1.0, "factors": [0.01, 0.1, 1, 10, 100]}
    case |= {"rates": [0.01, 0.1, 1.0, 10.0, 100.0], "epochs": 2}

    def width(*losses, **changed):
        return robustness.width({**case, **changed, "final_loss": losses})

    # Between the second and the third rate the loss passes 1.05 halfway.
    assert width(3, 1.1025, 1, 1.1025, 3) == (pytest.approx(10), False)
    assert width(1.04, 1.01, 1, 1.02, 1e30) == (pytest.approx(1000, rel=0.01), True)
    # What is near the best again, beyond a loss that is not, does not count.
    assert width(1.01, 3, 1.1025, 1, 1.1025) == (pytest.approx(10), False)
    assert width(1e-3, 1e-5, 1e-4, 1e30, 1e30, target=0.01) == (
        pytest.approx(100 * 105 ** (math.log(10) / math.log(1e34)), rel=1e-3),
        True,
    )
    payload = {"cases": [{**case, "final_loss": [3, 1.1, 1, 1.1, 1e30]}]}
    [goal] = robustness.goals(payload)
    assert goal[:4] == ("EigenAdam's rates within 5% of the best, mlp", ">= 10x", "10.6x", True)
    assert robustness.table(payload).splitlines()[-1] == "| EigenAdam | 1 | 3 | 1.1 | 1 | 1.1 | diverged | 10.6x |"
    assert robustness.table({"cases": []}) == ""


@pytest.mark.parametrize("optimizer", ["Adam", "EigenAdam", "SOAP", "KL-Shampoo", "KFAC", "HyLo-KID"])
def test_optimizers_are_made_of_their_grids(optimizer):
    case = next(case for case in tasks.cases(False) if case["name"] == f"cnn-{optimizer}")
    made, held = trials.make(case, {"momentum": 0.7})
    assert set(held) == {"learning_rate"} | ({"damping"} if "damping" in case["grid"] else set())
    assert getattr(made, "beta_1", getattr(made, "momentum", None)) == 0.7
    if optimizer in ("EigenAdam", "SOAP"):
        assert made.basis == ("gradient" if optimizer == "SOAP" else "fisher")
        assert (made.inverse_interval, made.interval_growth) == (3, None)


def test_what_runs_at_defaults_has_no_arguments():
    for case in tasks.cases(False):
        if case["name"].endswith("-defaults"):
            made, _ = trials.make(case, {})
            config, of_class = made.get_config(), trials.kind_of(case)().get_config()
            assert {**config, "learning_rate": 0} == {**of_class, "learning_rate": 0}


def test_what_is_not_measured_yet_has_no_goals():
    cases = rivals(Adam=[3, 3, 3, 1.5], KFAC=[3, 2, 1.8, 1.7])
    assert tasks.goals({"cases": cases}) == []
    assert tasks.goals({"cases": [{**case, "target": None} for case in cases[:1]]}) == []


def test_defaults_run_without_trials():
    def run(settings, seed, **shortened):
        assert not settings
        assert not shortened
        return {"loss": [1.0], "seconds": [1]}

    case = {"optimizer": "KFAC, defaults", "grid": {}, "trial_seeds": 1, "seeds": 2, "target": "AdamW", "epochs": 1}
    found = trials.measured(case, run)
    assert (found["trials"], found["best"], len(found["runs"])) == ([], {}, 2)
    assert trials.default_rate(case) == 0.02
    assert tasks.row("KFAC, defaults", {**case, **found}, 1.0).startswith(
        "| KFAC, defaults | - | 0 | 1.0 ± 0.0 | 2 of 2"
    )


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["AdamW", "KFAC"])
def test_trials_change_what_the_optimizer_holds_and_start_over(optimizer):
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(64, 8, 8, 1)).astype("float32"), rng.integers(0, 10, 64)
    problem = task_data.Problem(
        (images, labels), keras.losses.SparseCategoricalCrossentropy(from_logits=True), (images[:8], labels[:8]), True
    )
    case = {"task": "mlp", "optimizer": optimizer, "batch_size": 16, "steps": 2, "epochs": 3, "schedule": "cosine"}
    case["grid"] = {"learning_rate": [0.01, 0.02]} | ({"damping": [0.5, 1.0]} if optimizer == "KFAC" else {})
    points = [{name: values[i] for name, values in case["grid"].items()} for i in range(2)]

    def warm():
        found = trials.Training(case, problem, {"damping_mode": "relative"} if optimizer == "KFAC" else {})
        # The first fit of a model draws a batch more, to build it.
        found.run(points[0], 0, 1)
        return found

    training = warm()
    first, second, again = (training.run(points[i], 7, 3) for i in (0, 1, 0))
    assert [len(values) for values in first.values()] == [3, 3, 3]
    assert float(training.optimizer.learning_rate) == pytest.approx(0, abs=1e-9)
    assert first["loss"] != second["loss"]
    if keras.backend.backend() == "jax":
        # TensorFlow draws batches of a seed that goes on.
        assert first["loss"] == again["loss"]
        assert warm().run(points[1], 7, 3)["loss"] == second["loss"]
        if optimizer == "KFAC":
            assert training.run({**points[0], "damping": 1.0}, 7, 3)["loss"] != first["loss"]


def test_a_rate_falls_along_half_a_cosine():
    held = trials.Held(4)
    held.held_by(keras.optimizers.SGD(held), "learning_rate").assign(2.0)
    rates = [float(held(step)) for step in range(6)]
    np.testing.assert_allclose(rates, 1 + np.cos(np.pi * np.array([0, 1, 2, 3, 4, 4]) / 4), atol=1e-6)


def test_text_is_trained_on_and_validated_on_different_characters():
    training, other, alphabet = task_data.characters()
    assert len(training) == 1_000_000
    assert 90 < alphabet <= 128
    problem = task_data.problem("text")
    for x, y in (problem.training, problem.validation):
        np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
        assert x.shape[1] == task_data.CONTEXT
    assert (
        len(problem.training[0])
        == task_data.WINDOWS
        == 64 * math.prod(tasks.TASKS["text"][n] for n in ("steps", "epochs"))
    )
    assert len(problem.validation[0]) == 400
    np.testing.assert_array_equal(problem.validation[0][1], other[500:564])


def test_codes_of_a_text_are_by_the_order_of_its_characters():
    (first, second), count = texts.codes(["cab", "b"])
    assert (list(first), list(second), count) == ([2, 0, 1], [1], 3)


def test_a_language_model_sees_the_past_alone():
    model = networks.language_model(vocabulary=11, length=6, width=8, heads=2, depth=1)
    tokens = np.random.default_rng(0).integers(0, 11, (1, 6))
    changed = tokens.copy()
    changed[0, 4] = (changed[0, 4] + 1) % 11
    logits, others = (keras.ops.convert_to_numpy(model(x)) for x in (tokens, changed))
    assert logits.shape == (1, 6, 11)
    np.testing.assert_allclose(logits[:, :4], others[:, :4], atol=1e-6)
    assert (np.abs(logits - others)[:, 4:].max(-1) > 1e-4).all()
    # Tokens and positions.
    assert sum("embeddings" in v.path for v in model.trainable_variables) == 2


def test_networks_of_images_end_in_logits():
    assert networks.vision_transformer().output_shape == (None, 10)
    assert [layer.units for layer in networks.deep_autoencoder().layers] == [400, 200, 100, 25, 100, 200, 400, 784]


def test_the_best_trial_is_the_first_to_a_named_loss_or_else_ends_lowest():
    # By learning rate, losses for each seed of a trial.
    curves = {0.1: [[0.5, 0.01], [0.02, 0.01], [0.5, 0.3]], 0.2: [[0.05, 0.2]] * 3, 0.3: [[0.05, 0.1]] * 3}

    def run(settings, seed, **shortened):
        assert bool(shortened) == (seed >= trials.TRIAL_SEED)
        return {"loss": curves[settings["learning_rate"]][seed % 10 % 3], "seconds": [1, 1]}

    case = {"grid": {"momentum": [0.9], "learning_rate": list(curves)}, "trial_seeds": 3, "seeds": 2, "target": 0.1}
    case |= {"epochs": 2}
    found = trials.measured(case, run)
    assert [(trial["epochs"], trial["final_loss"]) for trial in found["trials"]] == [(2, 0.01), (1, 0.2), (1, 0.1)]
    assert found["best"]["learning_rate"] == 0.3
    assert [run["seed"] for run in found["runs"]] == [101, 102]
    assert trials.measured({**case, "target": None}, run)["best"]["learning_rate"] == 0.1
    assert trials.measured({**case, "target": 1e-6}, run)["trials"][0]["epochs"] is None


def test_goals_of_costs_are_of_the_longest_intervals():
    kfac = {"plain": 10.0, "statistics": 16.0, "inverses": 26.0}
    rows = {"plain": 12.0, "inverses": 14.0}
    ms = {"sgd": {"plain": 10.0}, "kfac": kfac, "thor": kfac, "hylo-kid": rows, "hylo-kis": rows}
    ideal = {method: {"statistics": 1.0, "inverses": 1.0, "preconditioning": 0.5} for method in ms}
    case = {"network": "n", "mode": "jax", "milliseconds": ms, "ideal_milliseconds": ideal}
    found = costs.goals({"cases": [case]})
    assert [goal[2:4] for goal in found] == [("1.07x", True), ("1.07x", False), ("1.20x", False), ("1.20x", False)]
    assert found[0][4] == ""
    assert found[1][4].startswith(
        "statistics +0.060, inverses +0.010, preconditioning +0.000, whose operations take 0.050"
    )
    assert found[2][4].startswith("statistics +0.002, inverses +0.000, preconditioning +0.200")


def test_eigen_adam_is_compared_with_adam():
    ms = {"sgd": {"plain": 5.0}, "adam": {"plain": 10.0}, "kfac": {"plain": 5.5, "inverses": 5.5, "statistics": 5.5}}
    ms["eigen-adam"] = {"plain": 11.0, "statistics": 16.0, "inverses": 66.0}
    ideal = {method: {"statistics": 1.0, "inverses": 1.0, "preconditioning": 0.5} for method in ms}
    case = {"network": "n", "mode": "jax", "milliseconds": ms, "ideal_milliseconds": ideal, "methods": list(ms)[1:]}
    _, longest, ten = costs.goals({"cases": [case]})
    assert longest[:4] == ("eigen-adam at (10,100), n, jax", "<= 1.15x of Adam's step", "1.20x", False)
    assert longest[4].startswith("statistics +0.050, inverses +0.050, preconditioning +0.100")
    assert ten[:4] == ("eigen-adam at (10,10), n, jax", "<= 1.50x of Adam's step", "1.65x", False)
    assert ten[4].startswith("statistics +0.050, inverses +0.500, preconditioning +0.100")
    # A case that was measured before there was such a method.
    older = {**case, "network": "o", "methods": ["adam", "kfac"], "milliseconds": {n: ms[n] for n in ("sgd", "kfac")}}
    assert len(costs.goals({"cases": [older]})) == 1
    assert readme.costs_table({"cases": [case, older]}).splitlines() == [
        "| network, backend | kfac | eigen-adam (of Adam's) |",
        "|---|---|---|",
        "| n, jax | 1.10x | 1.20x |",
        "| o, jax | 1.10x | - |",
    ]


def test_operations_of_eigenbases_are_those_of_their_rotations():
    job = exchanges.Job([(100, 50, 1), (2048, 8, 1)], 1, 32)
    kfac, eigen = (costs.ideal(method, job, 1e9) for method in ("kfac", "eigen-adam"))
    small = exchanges.Job(job.shapes[:1], 1, 32)
    kfac_small, eigen_small = (costs.ideal(method, small, 1e9) for method in ("kfac", "eigen-adam"))
    factors = {"statistics": 1, "inverses": 4, "preconditioning": 3}
    assert eigen_small == pytest.approx({part: factors[part] * ms for part, ms in kfac_small.items()})
    # Blocks of 1,024.
    assert eigen["inverses"] < kfac["inverses"] * 4 / 3


def test_each_captured_layer_of_a_language_model_is_of_one_kind():
    model = networks.language_model(vocabulary=11, length=6, width=8, heads=2, depth=1)
    found = {kind: [] for kind in kinds.KINDS}
    keras_ngd.capture(model, keras_ngd.KFAC(), include=lambda layer: True)
    for layer in model._flatten_layers():
        if getattr(layer, "statistics", None) is not None:
            found[kinds.kind_of(layer)].append(layer.name)
    assert [len(names) for names in found.values()] == [4, 3, 2, 3]


def test_parts_of_an_update_are_differences_of_steps():
    factors = {"plain": 12.0, "statistics": 16.0, "inverses": 26.0}
    assert costs.parts(factors, 10.0) == {"statistics": 4, "inverses": 10, "preconditioning": 2}
    assert costs.parts({"plain": 12.0, "inverses": 15.0}, 10.0) == {
        "statistics": 3,
        "inverses": 0,
        "preconditioning": 2,
    }


@pytest.mark.parametrize(
    "benchmark", [costs, tasks, ablations, peers, gpu, kinds, robustness], ids=lambda module: module.__name__
)
@pytest.mark.parametrize("quick", [True, False])
def test_cases_have_names_of_their_own_and_fit_into_json(benchmark, quick):
    found = benchmark.cases(quick)
    assert found == json.loads(json.dumps(found))
    assert len({case["name"] for case in found}) == len(found)
    if benchmark in (tasks, peers) and not quick:
        for of in tasks.by_task([case for case in found if case.get("grid")]).values():
            assert len({math.prod(map(len, case["grid"].values())) for case in of}) == 1
