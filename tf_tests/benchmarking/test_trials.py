"""Trials of settings, and runs of the best: what starts over and what does not."""

import keras
import numpy as np
import pytest

from benchmarks import task_data, tasks, trials


@pytest.mark.slow
def test_epochs_of_a_task_are_timed_in_turn():
    cases = [case for case in tasks.cases(False) if case["name"] in ("mlp-SGD", "mlp-EigenAdam-defaults")]
    cases = [{**case, "epochs": 2, "best": {"momentum": 0.9, "learning_rate": 0.1}} for case in cases]
    found = trials.epoch_seconds(cases, passes=2)
    assert set(found) == {case["name"] for case in cases}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found.values())


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
