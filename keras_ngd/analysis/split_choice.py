"""How large THOR's blocks should be: what splitting loses against what it saves."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ngd import backend, schedules
from keras_ngd.analysis.factors import input_factors
from keras_ngd.analysis.measuring import median_seconds
from keras_ngd.linalg import inverse, symmetric

CANDIDATES = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
TOLERANCE = 0.01


def information_loss(factor, split):
    """`L = 1 - max over blocks of lmax(block) / lmax(factor)` (THOR, eq. 11, for positive semi-definite factors).

    Args:
        factor: array `[d, d]`, symmetric positive semi-definite.
        split: size of the blocks.

    Returns:
        A float in `[0, 1 - 1 / number of blocks]`; 0 where nothing is split, and for a factor of zeros.
    """
    factor = np.asarray(factor, "float64")
    if split >= len(factor):
        return 0.0
    whole = _largest_eigenvalues(factor[None])[0]
    if whole <= 0:
        return 0.0
    full = len(factor) // split * split
    blocks = [factor[i : i + split, i : i + split] for i in range(0, full, split)]
    largest = _largest_eigenvalues(np.stack(blocks)).max() if blocks else 0.0
    if full < len(factor):
        largest = max(largest, _largest_eigenvalues(factor[None, full:, full:])[0])
    return float(min(max(1 - largest / whole, 0.0), 1.0))


def _largest_eigenvalues(matrices, steps=100, tolerance=1e-6):
    """By power iteration, from the columns' sums of absolute values: exact sizes are not needed, 1% is the question."""
    vectors = np.abs(matrices).sum(axis=2, keepdims=True) + 1e-300
    previous = np.zeros(len(matrices))
    for _ in range(steps):
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300)
        products = matrices @ vectors
        values = (vectors * products).sum(axis=(1, 2))
        if np.all(np.abs(values - previous) <= tolerance * np.abs(values)):
            break
        vectors, previous = products, values
    return values


def inversion_seconds(size):
    """Median time of inverting one damped `size x size` matrix on the present device, compiled."""
    factor = np.random.default_rng(size).normal(size=(1, size, size + 8)).astype("float32")
    factor = ops.convert_to_tensor(factor @ factor.transpose(0, 2, 1) / size)
    invert = backend.traced_once(lambda m: inverse.cholesky_inverse(symmetric.add_diagonal(m, ops.ones((1,)))))
    return median_seconds(invert, factor)


def choose(candidates, kept, performance):
    """Where keeping and performing cross, and the nearest candidate.

    Args:
        candidates: increasing sizes.
        kept: for each the share of factors that lose less than is tolerated; rises with the size.
        performance: for each `p_1 / p_n`, the time of the first over its own (eq. 12); falls with the size.

    Returns:
        `(split, crossing)`: the candidate nearest to the crossing of the two piecewise linear curves, and the crossing as
        `(size, share)`. Where they do not cross, the end of the list at which they are closest, and None.
    """
    gaps = [k - p for k, p in zip(kept, performance, strict=True)]
    for i in range(len(gaps) - 1):
        if gaps[i] <= 0 < gaps[i + 1]:
            part = -gaps[i] / (gaps[i + 1] - gaps[i])
            size = candidates[i] + part * (candidates[i + 1] - candidates[i])
            crossing = (size, kept[i] + part * (kept[i + 1] - kept[i]))
            return min(candidates, key=lambda c: abs(c - size)), crossing
    return (candidates[0] if abs(gaps[0]) <= abs(gaps[-1]) else candidates[-1]), None


@dataclass(frozen=True)
class SplitChoice:
    """What was measured of each candidate, and what follows.

    Attributes:
        candidates: sizes of blocks.
        losses: `[factors, candidates]`, the information losses.
        seconds: inversion time of one block of each size.
        tolerance: the loss that counts as none.
        device: where the times were taken.
    """

    candidates: tuple[int, ...]
    losses: np.ndarray
    seconds: tuple[float, ...]
    tolerance: float
    device: str

    @property
    def counts(self) -> list[int]:
        """How many factors lose less than `tolerance` at each candidate."""
        return [int(n) for n in (self.losses < self.tolerance).sum(axis=0)]

    @property
    def kept(self) -> list[float]:
        """`counts` as shares of all factors."""
        return [count / len(self.losses) for count in self.counts]

    @property
    def performance(self) -> list[float]:
        """`p_1 / p_n` (eq. 12)."""
        return [self.seconds[0] / seconds for seconds in self.seconds]

    @property
    def crossing(self) -> tuple[float, float] | None:
        """`(size, share)` where the curves cross, or None."""
        return choose(self.candidates, self.kept, self.performance)[1]

    @property
    def split(self) -> int:
        """The candidate nearest to the crossing."""
        return choose(self.candidates, self.kept, self.performance)[0]

    def __str__(self) -> str:
        header = f"{'split':>6}  {'factors kept':>12}  {'share':>6}  {'inverse, us':>11}  {'performance':>11}"
        lines = [header, "-" * len(header)]
        for row in zip(self.candidates, self.counts, self.kept, self.seconds, self.performance, strict=True):
            size, count, kept, seconds, performance = row
            lines.append(f"{size:>6}  {count:>12}  {kept:>6.3f}  {seconds * 1e6:>11.1f}  {performance:>11.4f}")
        where = "no crossing" if self.crossing is None else "crossing at ({:.0f}, {:.2f})".format(*self.crossing)
        return "\n".join([*lines, f"{len(self.losses)} factors, {self.device}; {where}: split {self.split}"])

    def plot(self, path: str | os.PathLike) -> None:
        """Draws both curves and their crossing (the paper's Figure 5); needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        positions = range(len(self.candidates))
        label = f"factors that lose less than {self.tolerance:.0%}"
        axes.plot(positions, self.kept, "o-", label=label)
        axes.plot(positions, self.performance, "s-", label="performance, $p_1 / p_n$")
        if self.crossing is not None:
            at = np.interp(self.crossing[0], self.candidates, positions)
            axes.plot(at, self.crossing[1], "k*", markersize=14, label="({:.0f}, {:.2f})".format(*self.crossing))
        axes.axvline(self.candidates.index(self.split), color="0.8", zorder=0)
        axes.set_xticks(positions, self.candidates)
        axes.set(xlabel="split dimension", ylabel="share", title=f"split {self.split}")
        axes.legend()
        figure.savefig(path, dpi=120)


def split_dimension(
    model: keras.Model,
    data: Any,
    candidates: Sequence[int] = CANDIDATES,
    tolerance: float = TOLERANCE,
    progress: bool = False,
) -> SplitChoice:
    """Measures what THOR's block size should be for this model on this device (THOR, eq. 11 and 12, Table 1).

    For every candidate: the share of the model's input factors that lose less than `tolerance` of their largest
    eigenvalue when split, and the time to invert a block of this size, as a share of the smallest candidate's. The first
    rises with the size, the second falls; the candidate nearest to their crossing is the choice. The model is
    left as it is.

    ```python
    choice = keras_ngd.analysis.split_dimension(model, x[:256])
    print(choice)
    optimizer = keras_ngd.THOR(split=choice.split)
    ```

    Args:
        model: a built model, as for `keras_ngd.capture`; copied with `keras.models.clone_model`.
        data: a batch of the model's inputs; `(inputs, targets)`, of which the targets are not looked at; or a
            `tf.data.Dataset` or `keras.utils.PyDataset` of such batches, of which four are taken.
        candidates: increasing ints of at least 1.
        tolerance: in (0, 1). Default 0.01.
        progress: whether to show a progress bar (tqdm).

    Returns:
        A `SplitChoice`: `split`, `crossing`, `print` for the table, `plot(path)` for the figure.

    Raises:
        ValueError: if there are no data, or the candidates are not increasing ints.
    """
    sizes: Any = [schedules.check_split("candidates", c) for c in candidates]
    if len(sizes) < 2 or None in sizes or sizes != sorted(set(sizes)):
        raise ValueError(f"`candidates` must be at least two increasing ints. Received: {sizes!r}")
    if not schedules.is_number(tolerance) or not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` must be in (0, 1). Received: tolerance={tolerance!r}")
    factors = input_factors(model, data)
    if progress:
        from tqdm import tqdm

        factors = tqdm(factors, unit="factor", desc="information loss")
    losses = np.array([[information_loss(factor, c) for c in sizes] for factor in factors])
    if progress:
        sizes = tqdm(sizes, unit="size", desc="inversion time")
    seconds = tuple(inversion_seconds(c) for c in sizes)
    return SplitChoice(tuple(sizes), losses, seconds, tolerance, backend.device_name())
