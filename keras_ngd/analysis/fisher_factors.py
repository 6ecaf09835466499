"""A model's factors of either Fisher matrix on data, without training it; and how the two differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ngd import keras_private
from keras_ngd.analysis.copies import captured_copy
from keras_ngd.layers import Structure
from keras_ngd.optimizers import KFAC
from keras_ngd.optimizers.blocks import find_blocks
from keras_ngd.optimizers.label_sampling import FISHERS


@dataclass(frozen=True)
class LayerFisher:
    """The factors of one matrix of a captured layer: its Fisher block is about `A (x) G`, in units of the loss.

    Attributes:
        layer: its path; of several matrices or groups of a layer, followed by what tells them apart.
        a: `[input_dim, input_dim]`, in float64.
        g: `[output_dim, output_dim]`, in float64.
    """

    layer: str
    a: np.ndarray
    g: np.ndarray

    @property
    def trace(self) -> float:
        """That of `A (x) G`."""
        return float(np.trace(self.a) * np.trace(self.g))


def fisher(
    model: keras.Model,
    x: Any,
    y: Any,
    kind: str = "sampled",
    draws: int = 16,
    likelihood: Any = None,
    loss: Any = None,
    seed: int = 0,
) -> list[LayerFisher]:
    """The Kronecker factors of a model's layers on one batch; the model stays as it is.

    Args:
        model: a built model, as for `keras_ngd.capture`; copied with `keras.models.clone_model`.
        x, y: one batch, arrays or structures of these.
        kind: `"sampled"` (default): of labels that are drawn from the model; `"empirical"`: of the data's labels.
        draws: int, how many labels are drawn for each example, for `"sampled"`. Default 16.
        likelihood: as for `keras_ngd.KFAC`.
        loss: as for `compile`. Default None: the loss the model is compiled with, and its weights.
        seed: int, of the draws. Default 0.

    Returns:
        A list of `LayerFisher`, one for each matrix that `keras_ngd.capture` captures, in the order of the model's layers.

    Raises:
        ValueError: if there is no loss, its likelihood is not known, or the model cannot be captured.
    """
    if kind not in FISHERS:
        raise ValueError(f"`kind` must be one of {FISHERS}. Received: kind={kind!r}")
    arguments = {"loss": loss}
    if loss is None:
        compiled = keras_private.compile_arguments(model)
        arguments = {key: compiled.get(key) for key in ("loss", "loss_weights")}
    if arguments["loss"] is None:
        raise ValueError(
            f"Model {model.name!r} is not compiled with a loss, whose Fisher matrix it would be: compile it first, or give "
            "the loss: `loss='sparse_categorical_crossentropy'`."
        )
    # A step with a learning rate of 0, whose statistics are those of the batch alone.
    given: dict[str, Any] = {"learning_rate": 0.0, "factor_interval": 1, "inverse_interval": 10**6, "factor_decay": 0.0}
    if kind == "sampled":
        # Twice the batch, the first half of which has its labels drawn.
        x, y = (keras.tree.map_structure(lambda t: np.concatenate([np.asarray(t)] * 2), data) for data in (x, y))
        given |= {"fisher": "sampled", "statistics_fraction": 0.5, "likelihood": likelihood, "seed": seed}
    else:
        given["fisher_scale"] = None
    optimizer = KFAC(**given, rest_learning_rate=1e-30)
    copy = captured_copy(model, x, optimizer)
    copy.compile(optimizer=optimizer, **arguments)
    sums: list[Any] = []
    count = draws if kind == "sampled" else 1
    for _ in range(count):
        copy.train_on_batch(x, y)
        new = [_factors(optimizer, block) for block in optimizer.layout.blocks if _is_matrix(block)]
        sums = (
            [[s + n for s, n in zip(old, now, strict=True)] for old, now in zip(sums, new, strict=True)]
            if sums
            else new
        )
    found = []
    for block, (a, g) in zip(filter(_is_matrix, find_blocks(copy.trainable_variables, id)), sums, strict=True):
        for group, (of_inputs, of_gradients) in enumerate(zip(a / count, g / count, strict=True)):
            name = block.layer if block.geometry.groups == 1 else f"{block.layer}:{group}"
            found.append(LayerFisher(name, of_inputs, of_gradients))
    return found


def _is_matrix(block: Any) -> bool:
    # Tables and scales have no two whole factors.
    return block.geometry.structure is Structure.MATRIX


def _factors(optimizer: KFAC, block: Any) -> list[np.ndarray]:
    averages = [ops.convert_to_tensor(v) for v in block.statistics.averages]
    calls = block.statistics.tallied("calls")
    return [
        ops.convert_to_numpy(t).astype("float64") for t in optimizer.curvature_input(block.statistics, averages, calls)
    ]


def plot_fisher(measured: "dict[float, dict[str, Sequence[LayerFisher]]]", path: str | None = None) -> Any:
    """Draws the traces of both Fisher matrices over training, layer by layer.

    ```python
    measured = {}
    for epoch in range(10):
        measured[epoch] = {kind: keras_ngd.analysis.fisher(model, x, y, kind) for kind in ("empirical", "sampled")}
        model.fit(...)
    keras_ngd.analysis.plot_fisher(measured, "fisher.png")
    ```

    Args:
        measured: dict from an epoch, or a step, to a dict from the kind to what `fisher` gave then.
        path: of the file that it is drawn into. Default None: none.

    Returns:
        The figure of Matplotlib's.
    """
    from matplotlib.figure import Figure

    if not measured:
        raise ValueError(
            "`measured` is empty: it is a dict from epochs to what `keras_ngd.analysis.fisher` gave, by kind."
        )
    times = sorted(measured)
    layers = [layer.layer for layer in next(iter(measured[times[0]].values()))]
    columns = min(len(layers), 4)
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    for number, layer in enumerate(layers):
        axes = figure.add_subplot(rows, columns, number + 1)
        for kind, style in zip(FISHERS, ("--", "-"), strict=True):
            known = [time for time in times if kind in measured[time]]
            axes.plot(known, [measured[time][kind][number].trace for time in known], style, marker=".", label=kind)
        axes.set_title(layer, fontsize="small")
        axes.set_yscale("log")
        if number == 0:
            axes.set_ylabel("trace")
            axes.legend(fontsize="small")
    if path is not None:
        figure.savefig(path)
    return figure
