"""How many rows a batch is worth: the numerical rank of the kernel matrices."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_ngd import schedules
from keras_ngd.analysis.layer_rows import layer_rows


def numerical_rank(values, share):
    """How many of the largest `values`, eigenvalues of a positive semi-definite matrix, make up `share` of their sum.

    0 where all are zero.
    """
    values = np.sort(np.maximum(np.asarray(values, "float64"), 0))[::-1]
    # Rounding leaves eigenvalues of zero a little above it.
    values[values <= len(values) * np.finfo("float64").eps * values[0]] = 0
    return int(np.searchsorted(np.cumsum(values), share * values.sum() * (1 - 1e-12))) + 1 if values[0] > 0 else 0


@dataclass(frozen=True)
class KernelRanks:
    """The numerical rank of each layer's kernel matrix on one batch.

    Attributes:
        layers: their paths.
        ranks: of each.
        batch_size: examples in the batch, the largest possible rank.
        share: of the eigenvalues' sum that the rank makes up.
    """

    layers: tuple[str, ...]
    ranks: tuple[int, ...]
    batch_size: int
    share: float

    @property
    def fractions(self) -> list[float]:
        """`ranks` as fractions of the batch size."""
        return [rank / self.batch_size for rank in self.ranks]

    @property
    def median(self) -> float:
        """The median rank."""
        return float(np.median(self.ranks))

    def __str__(self) -> str:
        width = max(5, *map(len, self.layers))
        lines = [f"{'layer':<{width}}  {'rank':>5}  {'fraction':>8}"]
        lines.append("-" * len(lines[0]))
        for layer, rank, fraction in zip(self.layers, self.ranks, self.fractions, strict=True):
            lines.append(f"{layer:<{width}}  {rank:>5}  {fraction:>8.3f}")
        median = f"median rank {self.median:g}, {self.median / self.batch_size:.1%} of the batch of {self.batch_size}"
        return "\n".join([*lines, f"{len(self.ranks)} layers, {self.share:.0%} of the eigenvalues' sum: {median}"])

    def plot(self, path: str | os.PathLike) -> None:
        """Draws the distribution of the ranks over the layers; needs matplotlib."""
        plot_kernel_ranks([self], path)


def draw_kernel_ranks(axes, results, labels):
    """Draws on axes what `plot_kernel_ranks` does."""
    rng = np.random.default_rng(0)
    positions = range(1, len(results) + 1)
    box = {"widths": 0.55, "showfliers": False, "medianprops": {"color": "black", "linewidth": 1.6}}
    axes.boxplot([result.ranks for result in results], positions=positions, **box)
    for position, result in zip(positions, results, strict=True):
        beside = position + rng.uniform(-0.18, 0.18, len(result.ranks))
        axes.plot(beside, result.ranks, "o", color="tab:blue", alpha=0.45, markersize=4, markeredgewidth=0)
        text = f"{result.median:g} ({result.median / result.batch_size:.0%})"
        style = {"fontsize": 8, "ha": "center", "va": "bottom"}
        axes.annotate(text, (position, max(result.ranks)), (0, 5), textcoords="offset points", **style)
    axes.set_xticks(positions, labels)
    axes.set_ylim(0, 1.12 * max(1, *(rank for result in results for rank in result.ranks)))
    axes.set_ylabel(f"rank: {results[0].share:.0%} of the eigenvalues' sum")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def plot_kernel_ranks(
    results: Sequence[KernelRanks], path: str | os.PathLike, labels: Sequence[str] | None = None
) -> None:
    """Draws the distributions of ranks of several results side by side (HyLo, Figure 10); needs matplotlib.

    A box spans half of the layers, a point is a layer; above is the median, and its share of the batch.

    Args:
        results: list of `KernelRanks`.
        path: of the image file.
        labels: one for each. Default None: the batch sizes.

    Raises:
        ValueError: if there are no results, or not a label for each.
    """
    from matplotlib.figure import Figure

    results = list(results)
    if not results:
        raise ValueError("`results` must be at least one result of `kernel_rank`. Received: results=[]")
    if labels is not None and len(labels) != len(results):
        raise ValueError(f"`labels` must be one for each of {len(results)} results. Received: labels={labels!r}")
    figure = Figure(figsize=(max(3.5, 1.2 * len(results) + 1.5), 4), layout="constrained")
    axes = figure.subplots()
    draw_kernel_ranks(axes, results, [result.batch_size for result in results] if labels is None else labels)
    if labels is None:
        axes.set_xlabel("batch size")
    figure.savefig(path, dpi=120)


def ranks_of(rows, share):
    """`kernel_rank` of a list of `LayerRows`."""
    ranks = [numerical_rank(np.linalg.eigvalsh(layer.kernel()), share) for layer in rows]
    return KernelRanks(tuple(layer.layer for layer in rows), tuple(ranks), len(rows[0].a), share)


def kernel_rank(model: keras.Model, x: Any, y: Any, loss: Any = None, share: float = 0.9) -> KernelRanks:
    """Measures how many rows each layer's curvature is worth on a batch: the numerical rank of its kernel matrix.

    That is how many eigenvalues of `(a a^T) o (g g^T)`, one row for each example, make up `share` of their sum: about
    the `rank` with which `keras_ngd.HyLo` still sees most of what `keras_ngd.SNGD` does. The model is left as it is.

    ```python
    ranks = keras_ngd.analysis.kernel_rank(model, x[:512], y[:512])
    print(ranks)
    optimizer = keras_ngd.HyLo(rank=int(ranks.median), batch_size=512)
    ```

    Args:
        model: a built model, as for `keras_ngd.capture`; copied with `keras.models.clone_model`.
        x, y: one batch of inputs and targets: arrays, or structures of arrays.
        loss: as for `compile`. Default None: the loss the model is compiled with.
        share: in (0, 1). Default 0.9, the paper's.

    Returns:
        A `KernelRanks`: `ranks`, `fractions`, `median`, `print` for the table, `plot(path)` for the figure; see also
        `plot_kernel_ranks`.

    Raises:
        ValueError: if there is no loss, `x` or `y` is not one batch, no layer can be captured, or `share` is out of range.

    Reference:
        - [Mu et al., 2022](https://doi.org/10.1109/SC41404.2022.00053), the HyLo paper, Figure 10
    """
    if not schedules.is_number(share) or not 0 < share < 1:
        raise ValueError(f"`share` must be in (0, 1). Received: share={share!r}")
    return ranks_of(layer_rows(model, x, y, loss), float(share))
