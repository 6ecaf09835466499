"""What THOR's trace rule sees and decides, recorded and drawn."""

import csv
import os
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ngd import keras_private, schedules, sharding
from keras_ngd.callbacks.summaries import ScalarWriter
from keras_ngd.optimizers import THOR
from keras_ngd.optimizers.trace_rule import DECISIONS
from keras_ngd.typing import Logs

_EXACT_SIZE = 1024
_FIELDS = ("epoch", "step", "layer", "trace", "change_rate", "decision", "stopped", "condition")


def _condition(inverses: np.ndarray) -> float:
    """Largest condition number of symmetric positive definite `[n, size, size]`; beyond 1024 rows from below."""
    if inverses.shape[-1] <= _EXACT_SIZE:
        values = np.linalg.eigvalsh(inverses.astype("float64"))
        return float(np.max(values[:, -1] / np.maximum(values[:, 0], 1e-300)))
    largest = _extreme(inverses)
    shifted = largest[:, None, None] * np.eye(inverses.shape[-1]) - inverses
    return float(np.max(largest / np.maximum(largest - _extreme(shifted), 1e-12 * largest)))


def _extreme(matrices: np.ndarray, steps: int = 30) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(*matrices.shape[:2], 1))
    for _ in range(steps):
        vectors = matrices @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return np.linalg.norm(vectors, axis=(1, 2))


class CurvatureMonitor(keras.callbacks.Callback):
    """Records what THOR's trace rule sees and decides, layer by layer.

    Of every layer at every record: the trace of its curvature, the change rate since its last update, the decision
    (`"update"`, `"keep"`, `"stop"`), whether it is stopped, and the largest condition number of its damped blocks.
    The epoch's logs gain `layers_updated`, `layers_kept`, `layers_stopped` (at the last refresh; stopped: in all) and
    `change_rate` (the median over the layers that are not stopped). Put it before callbacks that are to see these,
    such as `CSVLogger`.

    ```python
    monitor = keras_ngd.callbacks.CurvatureMonitor("curvature.csv")
    model.fit(x, y, callbacks=[monitor])
    keras_ngd.callbacks.plot_change_rate(monitor, "change_rate.png")
    ```

    Args:
        csv_path: file for all records, one line per layer and record; it is written afresh. Default None.
        log_dir: folder for TensorBoard. Default None.
        every: record at every so many steps, besides at the end of every epoch. Reading the state back takes time:
            use the inverses' interval or more. Default None, at the end of epochs only.
        layers_in_logs: whether the epoch's logs also have every layer's `<layer>/change_rate`, `<layer>/trace`,
            `<layer>/condition` and `<layer>/decision` (0 keep, 1 update, 2 stop). Keras's progress bar shows all logs.
            Default False.
        condition: whether to compute condition numbers. Default True.

    Attributes:
        records: list of dicts with the keys `epoch`, `step`, `layer`, `trace`, `change_rate`, `decision`, `stopped`,
            `condition`. `step` counts optimizer steps.

    Raises:
        ValueError: if the model is not compiled with `keras_ngd.THOR`.
    """

    def __init__(
        self,
        csv_path: str | os.PathLike | None = None,
        log_dir: str | os.PathLike | None = None,
        every: int | None = None,
        layers_in_logs: bool = False,
        condition: bool = True,
    ) -> None:
        super().__init__()
        self.csv_path, self.log_dir = csv_path, log_dir
        self.every = None if every is None else schedules.check_count("every", every)
        self.layers_in_logs, self.condition = layers_in_logs, condition
        self.records: list[dict[str, Any]] = []
        self._epoch = 0
        self._writer: ScalarWriter | None = None

    def on_train_begin(self, logs: Logs = None) -> None:
        if not isinstance(self.model.optimizer, THOR):
            raise ValueError(
                "CurvatureMonitor records THOR's trace rule: compile the model with `keras_ngd.THOR`. Its optimizer is "
                f"{self.model.optimizer!r}. To watch KFAC, use THOR(split=None, omega=(0, 0)), which is KFAC."
            )
        self.records = []
        if self.csv_path is not None:
            os.makedirs(os.path.dirname(os.path.abspath(self.csv_path)), exist_ok=True)
            self._write_rows([], "w")
        if self.log_dir is not None:
            self._writer = ScalarWriter(self.log_dir)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if self.every is not None and (batch + 1) % self.every == 0:
            self._record()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        entries = self._record()
        if logs is None or not entries:
            return
        active = [e["change_rate"] for e in entries if not e["stopped"] and np.isfinite(e["change_rate"])]
        logs["change_rate"] = float(np.median(active)) if active else 0.0
        logs["layers_updated"] = sum(e["decision"] == "update" for e in entries)
        logs["layers_stopped"] = sum(e["stopped"] for e in entries)
        logs["layers_kept"] = len(entries) - logs["layers_updated"] - logs["layers_stopped"]
        if self.layers_in_logs:
            logs.update({f"{layer}/{name}": value for layer, name, value in self._scalars(entries)})

    def on_train_end(self, logs: Logs = None) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _write_rows(self, entries: Sequence[dict[str, Any]], mode: str) -> None:
        assert self.csv_path is not None
        with open(self.csv_path, mode, newline="") as file:
            table = csv.DictWriter(file, _FIELDS)
            if mode == "w":
                table.writeheader()
            table.writerows(entries)

    def _record(self) -> list[dict[str, Any]]:
        keras_private.write_back_state(self.model)
        optimizer = self.model.optimizer
        step = int(ops.convert_to_numpy(optimizer.iterations))
        if self.records and self.records[-1]["step"] == step:
            return [r for r in self.records if r["step"] == step]
        conditions = self._conditions(optimizer) if self.condition else {}
        entries = [
            {
                "epoch": self._epoch,
                "step": step,
                "layer": layer,
                "trace": found["trace"],
                "change_rate": found["change_rate"],
                "decision": found["decision"],
                "stopped": found["stopped"],
                "condition": conditions.get(layer, float("nan")),
            }
            for layer, found in optimizer.trace_report().items()
        ]
        self.records += entries
        if self.csv_path is not None:
            self._write_rows(entries, "a")
        if self._writer is not None:
            self._write_summaries(entries, step)
        return entries

    @staticmethod
    def _conditions(optimizer: THOR) -> dict[str, float]:
        result = {}
        for group in optimizer.local_layout.groups:
            parts = [sharding.to_numpy(variable) for variable in group.curvature.variables]
            ends = np.cumsum([block.geometry.groups for block in group.blocks])
            for block, own in zip(
                group.blocks, zip(*(np.split(p, ends[:-1]) for p in parts), strict=True), strict=True
            ):
                result[block.layer] = max(_condition(p.reshape(-1, *p.shape[2:])) for p in own)
        return result

    @staticmethod
    def _scalars(entries: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, float]]:
        for entry in entries:
            for name in ("change_rate", "trace", "condition"):
                yield entry["layer"], name, entry[name]
            yield entry["layer"], "decision", DECISIONS.index(entry["decision"])

    def _write_summaries(self, entries: Sequence[dict[str, Any]], step: int) -> None:
        scalars = {f"{name}/{layer}": value for layer, name, value in self._scalars(entries) if np.isfinite(value)}
        assert self._writer is not None
        self._writer.write(scalars, step)


def plot_change_rate(
    source: CurvatureMonitor | str | os.PathLike,
    path: str | os.PathLike,
    layers: Sequence[str] | None = None,
    omega: tuple[float, float] | None = None,
) -> None:
    """Draws the change rates of the trace by step, one line per layer (the paper's Figures 2 and 3); needs matplotlib.

    Args:
        source: a `CurvatureMonitor` after training, or the path of its CSV file.
        path: the picture's file.
        layers: layers to draw: names, or parts of names. Default None, all.
        omega: `(omega1, omega2)` to draw as horizontal lines. Default: the optimizer's, if `source` is a monitor.

    Raises:
        ValueError: if there is nothing to draw.
    """
    from matplotlib.figure import Figure

    if isinstance(source, CurvatureMonitor):
        records = source.records
        omega = source.model.optimizer.omega if omega is None and source.model is not None else omega
    else:
        with open(source, newline="") as file:
            records = list(csv.DictReader(file))
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        rate = float(record["change_rate"])
        if np.isfinite(rate) and (layers is None or any(name in record["layer"] for name in layers)):
            lines.setdefault(record["layer"], []).append((int(record["step"]), rate))
    if not lines:
        raise ValueError(
            f"There are no change rates to draw in {source!r} for layers={layers!r}: train for two refreshes."
        )
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for layer, points in lines.items():
        steps, rates = zip(*points, strict=True)
        axes.plot(steps, np.maximum(rates, 1e-8), ".-", linewidth=1, label=layer if len(lines) <= 12 else None)
    for name, value in zip(("omega1", "omega2"), omega or (), strict=False):
        if value > 0:
            axes.axhline(value, color="black", linestyle="--", linewidth=0.8)
            axes.annotate(
                f"{name} = {value:g}", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom"
            )
    axes.set(xlabel="step", ylabel="change rate of the trace", yscale="log")
    if len(lines) <= 12:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
