"""What the benchmark of bases does with its cases and figures."""

import json

import keras
import pytest

from benchmarks import eigenvectors


def test_steps_of_orthogonal_iteration_are_held_against_eigendecompositions():
    name = keras.backend.backend()
    case = {"name": f"64-{name}", "size": 64, "backend": name, "rounds": 1}
    case |= eigenvectors.measure(case)
    assert set(case["milliseconds"]) == set(eigenvectors.KINDS)
    assert "| 64 |" in eigenvectors.table({"cases": [case]})
    assert not list(eigenvectors.goals({"cases": [case]}))
    medians = {"eigh": 9.0, "qr": 5.0, "iteration": 3.0, "check": 1.0}
    case |= {"size": 512, "milliseconds": {kind: {"median": ms} for kind, ms in medians.items()}}
    assert eigenvectors.shares(case) == pytest.approx((1 / 3, 0.4))
    assert [goal[2:4] for goal in eigenvectors.goals({"cases": [case]})] == [("0.33", True)]


@pytest.mark.parametrize("quick", [True, False])
def test_cases_have_names_of_their_own_and_fit_into_json(quick):
    found = eigenvectors.cases(quick)
    assert found == json.loads(json.dumps(found))
    assert len({case["name"] for case in found}) == len(found)
