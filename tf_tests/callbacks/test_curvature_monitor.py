"""The callback that watches THOR's trace rule."""

import csv

import numpy as np
import pytest

from keras_ngd.callbacks.curvature_monitor import CurvatureMonitor, _condition, plot_change_rate
from tf_tests import paper
from tf_tests.small import array, captured, compiled, fit, kfac, mlp, regression


def thor(**kwargs):
    return paper.THOR(**{"factor_interval": 1, "inverse_interval": 2, "split": 2, **kwargs})


def test_logs_and_records_every_layer(tmp_path):
    monitor = CurvatureMonitor(tmp_path / "new" / "curvature.csv", every=2, layers_in_logs=True)
    model = captured(mlp(), thor())
    history = fit(model, *regression(), epochs=2, callbacks=[monitor]).history
    assert [len(history[name]) for name in ("change_rate", "layers_updated", "layers_kept", "layers_stopped")] == [
        2
    ] * 4
    assert history["layers_updated"][-1] + history["layers_kept"][-1] + history["layers_stopped"][-1] == 2
    assert {"hidden/change_rate", "outputs/trace", "outputs/condition", "hidden/decision"} <= set(history)
    assert [(r["epoch"], r["step"]) for r in monitor.records[::2]] == [(0, 2), (0, 4), (1, 6), (1, 8)]
    last = {r["layer"]: r for r in monitor.records[-2:]}
    for layer, entry in model.optimizer.trace_report().items():
        assert {k: last[layer][k] for k in ("trace", "change_rate", "decision", "stopped")} == {
            k: v for k, v in entry.items() if k != "reference"
        }
    with open(tmp_path / "new" / "curvature.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["step"]), r["layer"], float(r["trace"])) for r in rows] == [
        (r["step"], r["layer"], r["trace"]) for r in monitor.records
    ]


def test_conditions_are_those_of_the_inverses():
    monitor = CurvatureMonitor()
    model = captured(mlp(), thor())
    fit(model, *regression(), callbacks=[monitor])
    (group,) = model.optimizer.layout.groups
    for i, block in enumerate(group.blocks):
        blocks = [b for v in group.curvature.variables for b in array(v)[i]]
        record = next(r for r in monitor.records if r["layer"] == block.layer)
        np.testing.assert_allclose(record["condition"], max(np.linalg.cond(b) for b in blocks), rtol=1e-3)


def test_conditions_of_large_blocks():
    values = np.linspace(0.01, 1, 1100)
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(1100, 1100)))
    estimate = _condition(((basis * values) @ basis.T)[None])
    assert 20 <= estimate <= 101


def test_writes_for_tensorboard(tmp_path):
    from tensorflow.python.summary.summary_iterator import summary_iterator

    model = captured(mlp(), thor())
    fit(model, *regression(), epochs=2, callbacks=[CurvatureMonitor(log_dir=tmp_path)])
    (file,) = tmp_path.glob("events*")
    tags = {(value.tag, event.step) for event in summary_iterator(str(file)) for value in event.summary.value}
    assert {("trace/hidden", 4), ("change_rate/outputs", 8), ("condition/hidden", 8), ("decision/outputs", 4)} <= tags


def test_draws_change_rates(tmp_path):
    monitor = CurvatureMonitor(tmp_path / "curvature.csv", every=2)
    model = captured(mlp(), thor())
    fit(model, *regression(), epochs=3, callbacks=[monitor])
    plot_change_rate(monitor, tmp_path / "monitor.png")
    plot_change_rate(tmp_path / "curvature.csv", tmp_path / "csv.png", layers=["hidden"], omega=(0.01, 0.001))
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("monitor.png", "csv.png"))
    with pytest.raises(ValueError, match="no change rates to draw.*missing"):
        plot_change_rate(monitor, tmp_path / "none.png", layers=["missing"])


def test_needs_thor():
    x, y = regression()
    for model in (captured(mlp(), kfac()), compiled(mlp(), "sgd")):
        with pytest.raises(ValueError, match="compile the model with `keras_ngd.THOR`"):
            fit(model, x, y, callbacks=[CurvatureMonitor()])


def test_bad_interval():
    with pytest.raises(ValueError, match="`every`"):
        CurvatureMonitor(every=0)
