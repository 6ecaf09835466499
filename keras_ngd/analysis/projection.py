"""How long steps and updates take with more workers than there are at hand."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import keras

from keras_ngd import schedules
from keras_ngd.analysis.exchanges import (
    BLOCK_METHODS,
    FACTOR_METHODS,
    METHODS,
    ROW_METHODS,
    STAGES,
    Job,
    check_method,
    exchanges,
    layer_shapes,
)
from keras_ngd.analysis.rates import Rates, measure_rates
from keras_ngd.distributed import place
from keras_ngd.distributed.placement import loads

WORKERS = tuple(2**i for i in range(11))
# Operations of a symmetric eigendecomposition with vectors, for each of Cholesky's with the inverse.
EIGEN_OPERATIONS = 9
# Of products with matrices of its size what following a basis takes: two for `Q^T F Q`, one for `Q L`, one for Gram-Schmidt; and
# what rotating gradients takes: there and back, of EigenAdam also of their mean.
BASIS_PRODUCTS, ROTATIONS = 4, {"ekfac": 2, "eigen-adam": 3}


@dataclass(frozen=True)
class StepCost:
    """Where the time of one method goes with one number of workers, in seconds.

    Attributes:
        gradient: forward and backward pass, at every step.
        statistics: factors, or rows and what is chosen of them, at every update of these.
        inversion: of the worker that has most to invert, at every refresh.
        preconditioning: of the worker that has most to precondition, at every step.
        sent_gradients, sent_preconditioned: their transport, at every step.
        sent_statistics, sent_inverses: theirs, when they are renewed.
        factor_interval, inverse_interval: steps between these; equal for methods on rows.
    """

    gradient: float
    statistics: float
    inversion: float
    preconditioning: float
    sent_gradients: float
    sent_statistics: float
    sent_inverses: float
    sent_preconditioned: float
    factor_interval: int = 1
    inverse_interval: int = 1

    @property
    def update(self) -> float:
        """All that renewing statistics and inverses once adds to a step."""
        return self.statistics + self.sent_statistics + self.inversion + self.sent_inverses

    @property
    def step(self) -> float:
        """A step, with its share of what is not done at every step."""
        always = self.gradient + self.sent_gradients + self.preconditioning + self.sent_preconditioned
        statistics = (self.statistics + self.sent_statistics) / self.factor_interval
        return always + statistics + (self.inversion + self.sent_inverses) / self.inverse_interval


SERIES = (*(f.name for f in fields(StepCost) if not f.name.endswith("interval")), "update", "step")


@dataclass(frozen=True)
class CostModel:
    """What `cost_model` projects.

    Attributes:
        methods: their names.
        workers: the numbers of workers.
        costs: dict of `(method, workers)`: a `StepCost`.
        batch_size: examples of one worker.
        rates: what was projected with.
    """

    methods: tuple[str, ...]
    workers: tuple[int, ...]
    costs: dict[tuple[str, int], StepCost]
    batch_size: int
    rates: Rates

    def seconds(self, method: str, what: str = "step") -> list[float]:
        """One method's times for each number of workers.

        Args:
            method: one of `methods`.
            what: `"step"` (default), `"update"`, or an attribute of `StepCost`.
        """
        if method not in self.methods:
            raise ValueError(f"`method` must be one of {self.methods}. Received: method={method!r}")
        if what not in SERIES:
            raise ValueError(f"`what` must be one of {SERIES}. Received: what={what!r}")
        return [getattr(self.costs[method, p], what) for p in self.workers]

    def __str__(self) -> str:
        width = max(map(len, self.methods))
        lines = []
        for what in ("update", "step"):
            lines.append(f"{what + ', s':<{max(width, 10)}}" + "".join(f"{f'P={p}':>10}" for p in self.workers))
            lines.append("-" * len(lines[-1]))
            for method in self.methods:
                times = "".join(f"{seconds:>10.4g}" for seconds in self.seconds(method, what))
                lines.append(f"{method:<{max(width, 10)}}{times}")
            lines.append("")
        return "\n".join([*lines, f"{self.batch_size} examples for each worker, {self.rates}"])

    def plot(self, path: str | os.PathLike) -> None:
        """Draws update and step times against the number of workers; needs matplotlib."""
        plot_cost_model(self, path)


def plot_cost_model(result: CostModel, path: str | os.PathLike) -> None:
    """Draws update and step times of all methods against the number of workers; needs matplotlib.

    Args:
        result: a `CostModel`.
        path: of the image file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    titles = {"update": "one update of statistics and inverses", "step": "one step, updates averaged"}
    for axes, (what, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for i, method in enumerate(result.methods):
            times = result.seconds(method, what)
            # Plain SGD has no updates, and zero no logarithm.
            if max(times) > 0:
                style = {"color": f"C{i}", "marker": "osv^D*XP<>h"[i % 11], "markersize": 4}
                axes.plot(result.workers, times, label=method, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(result.workers, result.workers)
        axes.set(xlabel="workers", ylabel="seconds", title=title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)


def statistics_seconds(method, job, rates):
    """What a worker does to its own examples at an update."""
    if method == "sgd":
        return 0.0
    m = job.batch_size
    if method in FACTOR_METHODS:
        return rates.product(sum(m * t * (a**2 + g**2) for a, g, t in job.shapes))
    if method in BLOCK_METHODS:
        blocks = [job.blocks(method, a) + job.blocks(method, g) for a, g, _ in job.shapes]
        squares = [sum(b**2 for b in of_layer) for of_layer in blocks]
        return rates.product(sum(m * t * n for n, (_, _, t) in zip(squares, job.shapes, strict=True)))
    # One row per example, whose kernel matrix KID decomposes; KIS takes the rows' lengths.
    seconds = rates.product(sum(m * t * (a + g) for a, g, t in job.shapes))
    if method == "hylo-kid":
        chosen = sum(m**2 * (a + g) + m * job.local_rank**2 for a, g, _ in job.shapes)
        seconds += rates.product(chosen) + len(job.shapes) * rates.inverse(m)
    elif method == "hylo-kis":
        seconds += rates.product(sum(m * (a + g) for a, g, _ in job.shapes))
    return seconds


def inversion_costs(method, job, rates):
    """For each layer the seconds of its inversion on one worker."""
    if method in FACTOR_METHODS:
        operations = EIGEN_OPERATIONS if job.eigen else 1
        return [sum(rates.inverse(size, operations=operations) for size in (a, g)) for a, g, _ in job.shapes]
    if method in BLOCK_METHODS:
        blocks = [(*job.blocks(method, a), *job.blocks(method, g)) for a, g, _ in job.shapes]
        if method == "thor":
            return [rates.inverse(*sizes) for sizes in blocks]
        return [rates.product(BASIS_PRODUCTS * sum(b**3 for b in sizes)) + rates.inverse(*sizes) for sizes in blocks]
    if method == "skfac":
        return [sum(_factor_by_rows(job.examples, size, rates) for size in (a, g)) for a, g, _ in job.shapes]
    rows = job.examples if method == "sngd" else job.global_rank
    # The weights Y are block-diagonal, one block for each worker.
    weighting = 4 * rows**2 * job.local_rank if method == "hylo-kid" else 0
    return [rates.product(rows**2 * (a + g) + weighting) + rates.inverse(rows) for a, g, _ in job.shapes]


def _factor_by_rows(rows, size, rates):
    """The inverse of a factor of so many rows: of the rows' products where there are fewer of them than columns."""
    return rates.product(rows * size * min(rows, size)) + rates.inverse(min(rows, size))


def preconditioning_costs(method, job, rates):
    """For each layer the seconds of preconditioning its gradient once."""
    return [rates.product(_preconditioning(method, job, a, g)) for a, g, _ in job.shapes]


def _preconditioning(method, job, a, g):
    if method in FACTOR_METHODS:
        return a * g * (a + g) * (2 if job.eigen else 1)
    if method in BLOCK_METHODS:
        split = job.split_of(method)
        return a * g * (min(a, split) + min(g, split)) * ROTATIONS.get(method, 1)
    rows = {"skfac": job.examples, "sngd": job.examples}.get(method, job.global_rank)
    if method == "skfac":
        sides = ((a, g), (g, a))
        return sum(2 * rows * a * g + rows**2 * o if rows < size else size * a * g for size, o in sides)
    return 2 * rows * a * g + rows**2


def owners_seconds(method, job, rates, placement):
    """The longest inversion and the longest preconditioning of any worker."""
    if method == "sgd":
        return 0.0, 0.0
    inverting, preconditioning = inversion_costs(method, job, rates), preconditioning_costs(method, job, rates)

    def longest(costs, among):
        return max(loads(costs, placement(inverting, among), among))

    return longest(inverting, job.workers), longest(preconditioning, job.workers // job.holders(method))


def step_cost(method, job, rates, gradient, intervals=(1, 1), placement=place):
    """The `StepCost` of one method."""
    sent = dict.fromkeys(STAGES, 0.0)
    for exchange in exchanges(method, job):
        sent[exchange.stage] += rates.exchange(exchange)
    inversion, preconditioning = owners_seconds(method, job, rates, placement)
    if method in ROW_METHODS:
        intervals = (intervals[0], intervals[0])
    statistics = statistics_seconds(method, job, rates)
    others: list[Any] = [*(sent[s] for s in STAGES), *intervals]
    return StepCost(gradient, statistics, inversion, preconditioning, *others)


def cost_model(
    model_or_shapes: keras.Model | Sequence[tuple[int, int, int]],
    workers: Sequence[int] = WORKERS,
    methods: str | Sequence[str] = METHODS,
    batch_size: int = 32,
    rates: Rates | None = None,
    factor_interval: int = 10,
    inverse_interval: int = 100,
    split: int = 128,
    rank: int | float = 0.1,
    gradient_seconds: float | None = None,
    packed: bool = True,
    fraction: float = 1.0,
    eigen: bool = False,
    placement: Callable[[Sequence[float], int], Sequence[int]] = place,
) -> CostModel:
    """Projects how long steps and updates take with a number of workers, method by method.

    Every worker has `batch_size` examples, so the global batch grows with the workers. With `m` a worker's examples, `T` a
    layer's positions, `M` the global batch, `r` the global rank and `b` factors' blocks, a worker's operations for each layer:

        method      statistics                      inversion                   preconditioning
        kfac...     m T (dA^2 + dG^2)               dA^3 + dG^3                 dA dG (dA + dG)
        thor        m T sum b^2                     sum b^3                     dA dG (split + split)
        ekfac       m T sum b^2                     4 sum b^3, sum b^3          2 dA dG (split + split)
        eigen-adam  m T sum b^2                     4 sum b^3, sum b^3          3 dA dG (split + split)
        skfac       m T (dA + dG)                   M^2 (dA + dG), 2 M^3        4 M dA dG + M^2 (dA + dG)
        sngd        m T (dA + dG)                   M^2 (dA + dG), M^3          2 M dA dG + M^2
        hylo-kid    as sngd, m^2 (dA + dG), m^3     r^2 (dA + dG), r^3          2 r dA dG + r^2
        hylo-kis    as sngd, m (dA + dG)            r^2 (dA + dG), r^3          2 r dA dG + r^2

    An owner inverts its layers alone, and its longest load is what all wait for, so a single large layer bounds the time
    however many workers there are. Bases are followed from refresh to refresh, after an eigendecomposition at first that is not
    counted. SKFAC takes each factor that has no more columns than rows as KFAC would. What is
    exchanged, see `received`; how long that takes, see `Rates`: one operation for each layer, but for the gradients and for
    SP-NGD, which exchange all layers' at once. Nothing is assumed to overlap, and convolutions
    are reduced to one row per example.

    ```python
    projected = keras_ngd.analysis.cost_model(model, batch_size=80, rates=keras_ngd.analysis.measure_rates())
    print(projected)
    projected.plot("cost_model.png")
    ```

    Args:
        model_or_shapes: a built model, as for `layer_shapes`, or a list of `(input_dim, output_dim, positions)`.
        workers: numbers of workers. Default 1, 2, 4, ... 1024.
        methods: of `"sgd"`, `"kfac"` (all workers hold all inverses), `"kfac-mem-opt"` (only the owner does), `"sp-ngd"`,
            `"thor"`, `"ekfac"`, `"eigen-adam"`, `"skfac"`, `"sngd"`, `"hylo-kid"` and `"hylo-kis"`. Default: all.
        batch_size: examples of one worker. Default 32.
        rates: a `Rates`. Default None: `measure_rates()`, this machine's, with a network of 100 Gbit/s.
        factor_interval: steps between updates of factors, and of rows with their inverses. Default 10.
        inverse_interval: steps between refreshes of the inverses of factors. Default 100.
        split, rank, packed, fraction, eigen: as for `received`.
        gradient_seconds: of a forward and a backward pass of `batch_size` examples. Default None: that of the captured
            layers' products, `3 m T dA dG`, at `rates.product_flops`.
        placement: function of costs and a number of workers that gives each layer's owner. Default
            `keras_ngd.distributed.place`, the longest first, each to the worker that has least.

    Returns:
        A `CostModel`: `seconds(method, what)`, `costs`, `print` for the table, `plot(path)` for the figure.

    Raises:
        ValueError: naming the argument that is out of range.

    Reference:
        - [Osawa et al., 2019](https://arxiv.org/abs/1811.12019), the SP-NGD paper, times per iteration on ResNet-50
        - [Mu et al., 2022](https://doi.org/10.1109/SC41404.2022.00053), the HyLo paper, Table I and Figure 3
    """
    shapes = layer_shapes(model_or_shapes) if isinstance(model_or_shapes, keras.Model) else model_or_shapes
    methods = (methods,) if isinstance(methods, str) else tuple(methods)
    methods = tuple(check_method("methods", method) for method in methods)
    workers = tuple(schedules.check_count("workers", p) for p in workers)
    if not workers or not methods:
        raise ValueError(f"Give at least one of each. Received: workers={workers!r}, methods={methods!r}")
    intervals = tuple(
        schedules.check_count(name, value)
        for name, value in (("factor_interval", factor_interval), ("inverse_interval", inverse_interval))
    )
    if rates is not None and not isinstance(rates, Rates):
        raise ValueError(f"`rates` must be a `Rates`, such as `measure_rates()` gives. Received: rates={rates!r}")
    if gradient_seconds is not None:
        gradient_seconds = schedules.check_positive_number("gradient_seconds", gradient_seconds)
    jobs = [Job(shapes, p, batch_size, rank, packed, fraction, split, eigen) for p in workers]
    rates = rates or measure_rates()
    if gradient_seconds is None:
        gradient_seconds = 3 * rates.product(sum(jobs[0].batch_size * a * g * t for a, g, t in jobs[0].shapes))
    costs = {
        (method, job.workers): step_cost(method, job, rates, gradient_seconds, intervals, placement)
        for method in methods
        for job in jobs
    }
    return CostModel(methods, workers, costs, jobs[0].batch_size, rates)
