"""What benchmarks of trainings make of their losses, and what they train."""

import math

import keras
import numpy as np
import pytest

from benchmarks import fisher, networks, results, robustness, task_data, tasks, texts, trials


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
    assert tasks.comparison(cases, 2)["epochs"] == (("Adam", 4), ("SOAP", 1))
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


def test_drawn_labels_are_compared_with_the_same_trainings(tmp_path, monkeypatch):
    empirical = {case["name"]: case for case in tasks.cases(False)}
    found = fisher.cases(False)
    for case in found:
        assert trials.make(case, {})[0].fisher == "sampled"
        skipped = {"skip": "positions"} if case["task"] in ("text", "vit") else {}
        assert case | {"arguments": {}} == empirical[case["name"]] | {"arguments": {}} | skipped
    assert {case["task"] for case in found} == set(tasks.TASKS)
    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    assert fisher.compared({"cases": found}) == []
    cases = [{**case, "name": f"t-{case['optimizer']}"} for case in rivals(AdamW=[3, 3, 3, 2], KFAC=[3, 2, 2, 1.5])]
    results.save("tasks", {"cases": cases})
    sampled = {**cases[1], "runs": [{"loss": [3, 3, 2, 1.25], "seconds": [1] * 4}]}
    line = "| t | KFAC | 1 | 1.50000 ± 0.00000 | **1.25000 ± 0.00000** | 2 | 3 |"
    assert fisher.table({"cases": [sampled, {**sampled, "name": "t-THOR"}]}).splitlines()[2:] == [line]


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


def test_what_is_not_measured_yet_has_no_goals():
    cases = rivals(Adam=[3, 3, 3, 1.5], KFAC=[3, 2, 1.8, 1.7])
    assert tasks.goals({"cases": cases}) == []
    assert tasks.goals({"cases": [{**case, "target": None} for case in cases[:1]]}) == []


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
    assert task_data.MODELS["vit"]().output_shape == (None, 10)
    assert [layer.units for layer in networks.deep_autoencoder().layers] == [400, 200, 100, 25, 100, 200, 400, 784]
