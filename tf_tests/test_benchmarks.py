"""What benchmarks do with their cases and figures; nothing is timed here."""

import json
import types

import pytest

from benchmarks import ablations, costs, gpu, harness, peers, results, tasks


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A benchmark of three cases that can be interrupted; its measured cases, in order."""
    done = types.SimpleNamespace(cases=[{"name": n, "size": 1} for n in "abc"], measured=[], fails=())

    def measured(name, case):
        if case["name"] in done.fails:
            raise KeyboardInterrupt
        done.measured.append(case["name"])
        return {"found": case["size"]}

    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    monkeypatch.setattr(harness, "PARTIAL", tmp_path / "partial")
    monkeypatch.setattr(harness, "module_of", lambda name: types.SimpleNamespace(cases=lambda quick: done.cases))
    monkeypatch.setattr(harness, "measured_in_process", measured)
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


def test_a_case_without_an_interpreter_is_left_out(runs, monkeypatch):
    monkeypatch.setattr(
        harness, "measured_in_process", lambda name, case: None if case["name"] == "b" else {"found": 1}
    )
    assert found(harness.run("some")) == {"a": 1, "c": 1}


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


@pytest.mark.parametrize("benchmark", [costs, tasks, ablations, peers, gpu], ids=lambda module: module.__name__)
@pytest.mark.parametrize("quick", [True, False])
def test_cases_have_names_of_their_own_and_fit_into_json(benchmark, quick):
    found = benchmark.cases(quick)
    assert found == json.loads(json.dumps(found))
    assert len({case["name"] for case in found}) == len(found)
    if benchmark is tasks:
        assert quick or {len(case["values"]) * len(case["rates"]) for case in found} == {16}
