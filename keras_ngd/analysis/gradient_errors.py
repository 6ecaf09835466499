"""What a few rows in place of a batch's cost: the error of HyLo's preconditioned gradient."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ngd import backend, schedules
from keras_ngd.analysis.layer_rows import layer_rows
from keras_ngd.curvature import KernelCurvature
from keras_ngd.linalg.sampling import SAMPLINGS
from keras_ngd.optimizers import HyLo
from keras_ngd.statistics.low_rank import KID, KIS

RANKS = (0.05, 0.1, 0.2, 0.4)
# Layers are preconditioned so many at a time that this many entries are at work.
_CHUNK_ENTRIES = 2**24


@dataclass(frozen=True)
class GradientErrors:
    """Errors `|P' - P| / |P|` of preconditioned gradients, `P` being SNGD's.

    Attributes:
        layers: their paths.
        methods: `"KID"`, and `"KIS"` with each sampling.
        ranks: numbers of rows.
        batch_size: examples in the batch.
        errors: `[methods, ranks, layers]`.
        totals: `[methods, ranks]`, of all layers' gradients as one vector.
        without: `[layers]`, the error of `V / damping`, which is all that is left with no rows.
        total_without: the same of all layers' as one vector.
        dampings: `[layers]`, what was added to the curvature.
    """

    layers: tuple[str, ...]
    methods: tuple[str, ...]
    ranks: tuple[int, ...]
    batch_size: int
    errors: np.ndarray
    totals: np.ndarray
    without: np.ndarray
    total_without: float
    dampings: np.ndarray

    def __str__(self) -> str:
        width = max(len("all layers"), *map(len, self.layers))
        blocks = []
        for method, errors, totals in zip(self.methods, self.errors, self.totals, strict=True):
            header = f"{method:<{width}}" + "".join(f"{f'rank {rank}':>11}" for rank in self.ranks) + f"{'no rows':>11}"
            lines = [header, "-" * len(header)]
            rows = [*zip(self.layers, errors.T, self.without, strict=True), ("all layers", totals, self.total_without)]
            for name, values, without in rows:
                lines.append(f"{name:<{width}}" + "".join(f"{value:>11.3g}" for value in (*values, without)))
            blocks.append("\n".join(lines))
        return "\n\n".join([*blocks, f"|P' - P| / |P|, batch of {self.batch_size}; KIS: means over its draws"])

    def plot(self, path: str | os.PathLike) -> None:
        """Draws the errors by rank: lines of all layers together, bands from the lower to the upper quartile of the layers.

        Needs matplotlib.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        shares = [rank / self.batch_size for rank in self.ranks]
        for i, (method, errors, totals) in enumerate(zip(self.methods, self.errors, self.totals, strict=True)):
            axes.fill_between(
                shares, *np.quantile(errors, (0.25, 0.75), axis=1), color=f"C{i}", alpha=0.15, linewidth=0
            )
            axes.plot(shares, totals, "o-", color=f"C{i}", label=method)
        axes.axhline(self.total_without, color="0.4", linestyle=":", label="no rows")
        axes.set_xscale("log")
        axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
        axes.minorticks_off()
        scale_errors(axes)
        axes.set(xlabel=f"rank, of a batch of {self.batch_size}", ylabel="error of the preconditioned gradient")
        axes.legend()
        figure.savefig(path, dpi=120)


def scale_errors(axes):
    """A logarithmic scale of errors, with plain numbers where it spans less than a decade, too."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


class _Problem:
    """A layer's preconditioning in as many dimensions as the batch has examples.

    `P` differs between sets of rows only within the span of the rows' outer products, the rows of `U`. In the orthonormal
    basis that the eigenvectors of `U U^T = E diag(l) E^T` give it, `U` is `E diag(sqrt(l))`, and all layers have one shape,
    whatever theirs are. The rest of `V` is divided by the damping by every method.
    """

    def __init__(self, rows, damping, relative_damping):
        values, vectors = np.linalg.eigh(rows.kernel())
        # Directions of zero length but for rounding; dividing by it would make much of nothing.
        values = np.where(values > len(values) * 4 * np.finfo("float64").eps * values[-1], values, 0)
        roots = np.sqrt(values)
        self.outer = vectors * roots
        self.v = np.where(roots > 0, vectors.T @ rows.products(), 0) / np.where(roots > 0, roots, 1)
        largest = values[-1] if values[-1] > 0 else 1.0
        self.damping = relative_damping * largest if damping is None else damping
        self.exact = self.v / (values + self.damping)
        rest = max(np.sum(rows.v.astype("float64") ** 2) - np.sum(self.v**2), 0.0)
        self.squared = np.sum(self.exact**2) + rest / self.damping**2


def _ratio(squared, squared_of):
    return np.sqrt(squared / np.where(squared_of > 0, squared_of, 1))


def _hylo(rank, batch_size, sampling, power):
    """The optimizer of KIS with this `sampling`, or of KID if it is None."""
    # What the damping is, each call of the probe is told.
    shared = {"damping": 1.0, "damping_mode": "absolute", "batch_size": batch_size, "rank": rank}
    if sampling is None:
        return HyLo(**shared, mode="kid")
    power = power or (1.0 if sampling == "paper" else 2.0)
    return HyLo(**shared, mode="kis", sampling=sampling, power=power)


def _choose(statistics, a, damping, draw):
    """Of the `_Problem`s' rows those that `LowRankStatistics` keep, their weights and the damping."""
    g = ops.ones_like(a[:, :, :1])
    return statistics.merge(None, [a, g], [damping, draw], True, KID if statistics.mode == "kid" else KIS)[0]


def _precondition(rank, chosen, v):
    """HyLo's `P` with the rows chosen."""
    curvature = KernelCurvature(v.shape[0], rank, "float32")
    # It has no use for an old state, nor for the damping where rows have weights.
    unused: Any = None
    return curvature.precondition(v, unused, curvature.refresh(chosen, unused, unused), lambda: chosen)


# Kept, for whoever measures again and again during training. Not closures: TensorFlow takes several of the same code for one
# that is traced too often, and warns.
@functools.cache
def _compiled_choose(*settings):
    return backend.traced_once(functools.partial(_choose, _hylo(*settings).make_statistics(None)))


@functools.cache
def _compiled_precondition(rank):
    return backend.traced_once(functools.partial(_precondition, rank))


def _chunks(problems):
    """The problems as float32 tensors, so many at a time."""
    size = max(1, _CHUNK_ENTRIES // len(problems[0].v) ** 2)
    chunks = []
    for start in range(0, len(problems), size):
        part = problems[start : start + size]
        arrays = [np.stack([p.outer for p in part]), np.stack([p.v[:, None] for p in part]), [p.damping for p in part]]
        chunks.append([ops.convert_to_tensor(np.asarray(array, "float32")) for array in arrays])
    return chunks


class ErrorMeasurement:
    """`gradient_error` of lists of `LayerRows`.

    Args:
        damping, relative_damping, ranks, samplings, power, draws, seed: as for `gradient_error`.
    """

    def __init__(self, damping, relative_damping, ranks, samplings, power, draws, seed):
        self.damping = None if damping is None else schedules.check_positive_number("damping", damping)
        self.relative_damping = schedules.check_positive_number("relative_damping", relative_damping)
        self.draws = schedules.check_count("draws", draws)
        self.seed = schedules.check_seed("seed", seed)
        self.ranks, self.samplings = _checked_list("ranks", ranks), _checked_list("samplings", samplings, 0)
        for sampling in self.samplings:
            if sampling not in SAMPLINGS:
                raise ValueError(f"`samplings` must be among {SAMPLINGS}. Received: samplings={samplings!r}")
        self.power = None if power is None else schedules.check_positive_number("power", power)
        for rank in self.ranks:
            _hylo(rank, None, None, None)

    def _squared_errors(self, settings, problems, chunks, draw):
        """`|P' - P|^2` of each layer."""
        choose, precondition = _compiled_choose(*settings), _compiled_precondition(settings[0])
        new = []
        for number, (a, v, damping) in enumerate(chunks):
            seed = np.array([self.seed * 4096 + number, draw], "float32")
            chosen = choose(a, damping, ops.convert_to_tensor(seed))
            new.append(ops.convert_to_numpy(precondition(chosen, v)))
        exact = np.stack([problem.exact for problem in problems])
        return np.sum((np.concatenate(new)[:, :, 0] - exact) ** 2, axis=1)

    def __call__(self, rows):
        batch_size = len(rows[0].a)
        counts = tuple(_hylo(rank, batch_size, None, None).rows for rank in self.ranks)
        problems = [_Problem(layer, self.damping, self.relative_damping) for layer in rows]
        chunks = _chunks(problems)
        squared = np.array([problem.squared for problem in problems])
        methods = [None, *self.samplings]
        errors = np.zeros((len(methods), len(counts), len(problems)))
        totals = np.zeros(errors.shape[:2])
        for i, sampling in enumerate(methods):
            draws = 1 if sampling is None else self.draws
            for j, count in enumerate(counts):
                settings = (count, batch_size, sampling, self.power)
                for k in range(draws):
                    found = self._squared_errors(settings, problems, chunks, k)
                    errors[i, j] += _ratio(found, squared) / draws
                    totals[i, j] += _ratio(found.sum(), squared.sum()) / draws
        without = np.array([np.sum((p.v / p.damping - p.exact) ** 2) for p in problems])
        return GradientErrors(
            layers=tuple(layer.layer for layer in rows),
            methods=tuple("KID" if sampling is None else f"KIS {sampling}" for sampling in methods),
            ranks=counts,
            batch_size=batch_size,
            errors=errors,
            totals=totals,
            without=_ratio(without, squared),
            total_without=float(_ratio(without.sum(), squared.sum())),
            dampings=np.array([problem.damping for problem in problems]),
        )


def _checked_list(name, values, least=1):
    if isinstance(values, str) or not hasattr(values, "__iter__") or len(values := tuple(values)) < least:
        raise ValueError(f"`{name}` must be a list" + " of at least one" * least + f". Received: {name}={values!r}")
    return values


def gradient_error(
    model: keras.Model,
    x: Any,
    y: Any,
    loss: Any = None,
    damping: float | None = None,
    relative_damping: float = 0.1,
    ranks: Sequence[int | float] = RANKS,
    samplings: Sequence[str] = ("priority", "paper"),
    power: float | None = None,
    draws: int = 8,
    seed: int = 0,
    losses_per_example: float = 1,
) -> GradientErrors:
    """Measures on a batch what HyLo's preconditioned gradient loses against SNGD's, by rank, and layer by layer.

    The error is `|P' - P| / |P|`: `P = (F + damping I)^-1 V` with the Fisher matrix of all rows of the batch, `P'` with
    those that KID or KIS choose of the same batch, computed as `keras_ngd.HyLo` computes them. What `F` does not see of
    the gradient counts in `|P|`, too; all methods divide it by the damping alone. The model is left as it is.

    ```python
    errors = keras_ngd.analysis.gradient_error(model, x[:512], y[:512], damping=0.01)
    print(errors)
    errors.plot("errors.png")
    ```

    Args:
        model: a built model, as for `keras_ngd.capture`; copied with `keras.models.clone_model`.
        x, y: one batch of inputs and targets: arrays, or structures of arrays.
        loss: as for `compile`. Default None: the loss the model is compiled with.
        damping: positive float: the optimizer's. Default None: relative to each layer's curvature, by the next argument.
        relative_damping: positive float: where `damping` is None, it is this share of the largest eigenvalue of each
            layer's kernel matrix, so that no layer's error is all damping or all rank. Default 0.1.
        ranks: how many rows, as `rank` of `keras_ngd.HyLo`. Default (0.05, 0.1, 0.2, 0.4).
        samplings: KIS's, as for `keras_ngd.HyLo`. Default `("priority", "paper")`.
        power: KIS's, as for `keras_ngd.HyLo`. Default None: 1, the paper's, for `"paper"`, 2 for the others.
        draws: samples that KIS's errors are means of. Default 8.
        seed: int in [0, 2**12), of the samples. Default 0.
        losses_per_example: as for `keras_ngd.SNGD`. Default 1.

    Returns:
        A `GradientErrors`: `errors`, `totals`, `print` for the table, `plot(path)` for the figure.

    Raises:
        ValueError: if there is no loss, `x` or `y` is not one batch, no layer can be captured, or an argument is out of
            range.

    Reference:
        - [Mu et al., 2022](https://doi.org/10.1109/SC41404.2022.00053), the HyLo paper, Figure 12
    """
    measurement = ErrorMeasurement(damping, relative_damping, ranks, samplings, power, draws, seed)
    return measurement(layer_rows(model, x, y, loss, losses_per_example))
