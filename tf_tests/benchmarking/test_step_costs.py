"""What benchmarks of steps make of their times."""

import pytest

import keras_ngd
from benchmarks import costs, fisher_cost, kinds, networks, readme, stagger, startup
from keras_ngd.analysis import exchanges


def test_costs_are_averages_over_a_cycle():
    factors = {"plain": 10.0, "statistics": 16.0, "inverses": 26.0}
    assert costs.cost(factors, 1, 1) == 26
    assert costs.cost(factors, 1, 10) == pytest.approx((26 + 9 * 16) / 10)
    assert costs.cost(factors, 10, 100) == pytest.approx((26 + 9 * 16 + 90 * 10) / 100)
    rows = {"plain": 10.0, "inverses": 16.0}
    assert costs.cost(rows, 1, 10) == pytest.approx((16 + 9 * 10) / 10)
    assert costs.cost({"plain": 10.0}, 10, 100) == 10


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
    factors = {"statistics": 1, "inverses": 4, "preconditioning": 2}
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


def test_a_step_with_drawn_labels_is_compared_with_one_of_the_same_kind():
    ms = {
        "sgd": {"plain": 8.0},
        "kfac, empirical": {"plain": 10.0, "statistics": 20.0, "inverses": 40.0},
        "kfac, sampled": {"plain": 10.0, "statistics": 20.5, "inverses": 44.0},
        "thor, empirical": {"plain": 10.0, "inverses": 30.0},
        "thor, sampled": {"plain": 9.0, "inverses": 30.0},
    }
    payload = {"cases": [{"network": "n", "mode": "jax", "methods": ["kfac", "thor"], "milliseconds": ms}]}
    goals = fisher_cost.goals(payload)
    assert [goal[2:4] for goal in goals] == [
        ("1.000x", True),
        ("1.025x", True),
        ("1.100x", False),
        ("0.900x", True),
        ("1.000x", True),
    ]
    assert goals[2][4] == "+4.0 ms"
    assert "| kfac | all due | 40.0 | 44.0 | 1.100x |" in fisher_cost.table(payload)


def test_the_longest_step_of_a_round_is_seen_beside_its_median():
    spread, at_once = {"milliseconds": [10.0, 12.0, 10.0, 15.0]}, {"milliseconds": [50.0, 10.0, 10.0, 10.0]}
    kinds_of = {"at once": at_once, "spread": spread}
    for found, shares in ((at_once, 1), (spread, 2)):
        found |= {"shares": shares, "first_step_seconds": 3.0}
    assert stagger.longest(at_once) == 5
    case = {"name": "n-jax", "network": "n", "mode": "jax", "kinds": kinds_of}
    [(name, asked, measured, met, _)] = stagger.goals({"cases": [case]})
    assert (asked, measured, met) == ("<= 2x of the median step", "1.36x", True)
    assert "n, jax" in name
    assert "| n, jax | at once | 1 | 10 | 20 | 50 | 5.00x | 3 |" in stagger.table({"cases": [case]})


def test_what_the_start_takes_is_neither_tracing_nor_a_step():
    case = {"network": "resnet50", "mode": "jax", "first_on_the_clock": 9.0, "nodes": 3, "nodes_of": {"keras": 3}}
    sgd = {**case, "method": "sgd", "first": 10.0, "tracing": 1.0, "step": 0.5}
    kfac = {**case, "method": "kfac", "first": 30.0, "tracing": 4.0, "step": 7.0, "nodes_of": {"keras": 1, "linalg": 2}}
    lines = startup.table({"cases": [sgd, kfac]}).splitlines()
    assert lines[-1] == "| kfac | 30.00 | 3.00 | 4.00 | 19.00 | 7.00 | 9.00 | 3 | linalg 2 |"
    [goal] = startup.goals({"cases": [sgd, kfac]})
    assert goal[1:] == ("<= 1.8x of SGD's", "3.00x", False, "tracing 4.0 s, compiling 19.0, the step 7.0")


def test_operations_are_counted_by_the_innermost_line_of_the_package():
    text = """
    %0 = stablehlo.add %a, %b : tensor<f32> loc(#loc5)
    %1 = stablehlo.multiply %0, %0 : tensor<f32> loc(#loc2)
#loc1 = loc("/x/keras/src/ops/numpy.py":3:4)
#loc2 = loc("train"(#loc1))
#loc3 = loc("/x/keras_ngd/linalg/inverse.py":7:4)
#loc4 = loc("/x/keras_ngd/optimizers/kfac.py":9:4)
#loc5 = loc(callsite(#loc1 at #loc6))
#loc6 = loc(callsite(#loc3 at #loc4))
"""
    assert startup._nodes_of_text(text) == {"linalg": 1, "keras": 1}
