"""What the workers of a data-parallel training send each other, method by method, from the layers' shapes alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import keras

from keras_ngd import schedules
from keras_ngd.capturing import layers_to_capture
from keras_ngd.layers import Structure, kind_of
from keras_ngd.linalg.packing import packed_size
from keras_ngd.optimizers.eigenbasis_method import DEFAULT_SPLIT

METHODS = (
    "sgd",
    "kfac",
    "kfac-mem-opt",
    "sp-ngd",
    "thor",
    "ekfac",
    "eigen-adam",
    "skfac",
    "sngd",
    "hylo-kid",
    "hylo-kis",
)
FACTOR_METHODS = ("kfac", "kfac-mem-opt", "sp-ngd")
BASIS_METHODS = ("ekfac", "eigen-adam")
BLOCK_METHODS = ("thor", *BASIS_METHODS)
ROW_METHODS = ("skfac", "sngd", "hylo-kid", "hylo-kis")
STAGES = ("gradients", "statistics", "inverses", "preconditioned")


def layer_shapes(model: keras.Model) -> list[tuple[int, int, int]]:
    """The shapes of the layers that `keras_ngd.capture` would capture.

    Args:
        model: a built Functional or Sequential model with inputs of a fixed size.

    Returns:
        A list of `(input_dim, output_dim, positions)`: the sizes of the factors `A` (with one for the bias) and `G`, and
        how many positions an example has: outputs, or inputs of a transposed convolution and of a recurrent layer. A grouped
        convolution is one entry for each group, a depthwise one for each channel, and a separable one has entries for both
        of its parts; a layer called several times counts as called once. Tables and scales, whose factors are diagonal
        or small, have no entry.

    Raises:
        ValueError: if no layer would be captured, or a layer's number of positions is unknown.
    """
    layers = layers_to_capture(model)
    if not layers:
        raise ValueError(f"`model` has no layer that can be captured. Received: model={model.name!r}")
    seen = _seen_inside(model, layers)
    return [shape for layer in layers for shape in _shapes_of(layer, seen)]


def _seen_inside(model, layers):
    """By identity, the shapes of inputs and outputs of layers that are called inside of others, from a pass of one example."""
    inside = [layer for layer in layers if not _has_output(layer)]
    inputs = keras.tree.flatten(getattr(model, "inputs", None) or [])
    if not inside or not inputs or any(None in tensor.shape[1:] for tensor in inputs):
        return {}
    seen: dict[int, dict[str, tuple[int | None, ...]]] = {}

    def watched(layer, call):
        def called(x, *args, **kwargs):
            outputs = call(x, *args, **kwargs)
            first = keras.tree.flatten(outputs)[0]
            seen.setdefault(id(layer), {"input": (None, *x.shape[1:]), "output": (None, *first.shape[1:])})
            return outputs

        return called

    for layer in inside:
        layer.call = watched(layer, layer.call)
    try:
        model([keras.ops.zeros((1, *tensor.shape[1:]), dtype=tensor.dtype) for tensor in inputs])
    finally:
        for layer in inside:
            del layer.call
    return seen


def _has_output(layer):
    try:
        return layer.output is not None
    except (AttributeError, ValueError):
        return False


def _shapes_of(layer, seen):
    """Those of a layer's matrices; tables and scales, whose factors are small or diagonal, do not count."""
    kind = kind_of(layer)
    geometries = [part.geometry for part in kind.parts(layer).values()]
    geometries = [geometry for geometry in geometries if geometry.structure is Structure.MATRIX]
    if not geometries:
        return []
    last = geometries[-1]
    positions = _positions(layer, kind.rows_of, last.groups * last.output_dim, seen.get(id(layer), {}))
    return [(g.input_dim, g.output_dim, positions) for g in geometries for _ in range(g.groups)]


def _positions(layer, side, outputs, seen):
    """How many rows an example has: of the layer's output, which has so many numbers for each, or of its input."""
    try:
        shape = seen[side] if side in seen else getattr(layer, side).shape
    except (AttributeError, ValueError):
        shape = (None, None, None)
    inner = shape[2:] if getattr(layer, "data_format", None) == "channels_first" else shape[1:-1]
    if side == "output" and None not in shape[1:]:
        return math.prod(shape[1:]) // outputs
    if None in inner:
        raise ValueError(
            f"Layer {layer.path!r} has an unknown number of {side} positions. Make `model` a Functional or Sequential model "
            f"with inputs of a fixed size, or give a list of shapes. Received: {side} shape {shape}"
        )
    return math.prod(inner)


@dataclass(frozen=True)
class Job:
    """A data-parallel training: its layers, and how it is divided among the workers.

    Args:
        shapes: list of `(input_dim, output_dim, positions)`.
        workers: how many, `P`.
        batch_size: examples of one worker, `m`.
        rank: of HyLo: rows of all workers together, an int, or a fraction of the global batch, a float in (0, 1]. Default
            0.1, the paper's.
        packed: whether symmetric matrices are sent as one triangle each. Default True.
        fraction: of KFAC: the share of the workers that hold a layer's inverses; `fraction * workers`, raised to 1, must
            divide `workers`. Default 1.0: all.
        split: THOR's block size. Default 128. Bases have their own, the default of their methods.
        eigen: whether KFAC keeps eigenvectors and the products of the eigenvalues, as KAISA does, instead of inverses.
            Default False.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    shapes: Sequence[tuple[int, int, int]]
    workers: int
    batch_size: int
    rank: int | float = 0.1
    packed: bool = True
    fraction: float = 1.0
    split: int = 128
    eigen: bool = False

    def __post_init__(self):
        shapes = tuple(tuple(shape) for shape in self.shapes)
        if not shapes or not all(len(s) == 3 and all(schedules.is_count(n) for n in s) for s in shapes):
            raise ValueError(
                "`shapes` must be a list of (input_dim, output_dim, positions), ints of at least 1, as from `layer_shapes`. "
                f"Received: shapes={self.shapes!r}"
            )
        object.__setattr__(self, "shapes", shapes)
        for name in ("workers", "batch_size", "split"):
            object.__setattr__(self, name, schedules.check_count(name, getattr(self, name)))
        if not schedules.is_count(self.rank) and not (schedules.is_number(self.rank) and 0 < self.rank <= 1):
            raise ValueError(f"`rank` must be an int of at least 1 or a float in (0, 1]. Received: rank={self.rank!r}")
        if not schedules.is_number(self.fraction) or not 0 < self.fraction <= 1 or not self._divides():
            raise ValueError(
                "`fraction` must be in (0, 1] with `fraction * workers`, raised to 1, a divisor of `workers`: take 1 / workers, "
                f"1 / 2 or 1. Received: fraction={self.fraction!r} of workers={self.workers}"
            )

    def _divides(self):
        holders = max(1.0, self.fraction * self.workers)
        return abs(holders - round(holders)) < 1e-9 and self.workers % round(holders) == 0

    @property
    def examples(self):
        """The global batch, `M`."""
        return self.workers * self.batch_size

    @property
    def local_rank(self):
        """How many of its rows each worker sends, `rho`."""
        rank = self.rank / self.workers if schedules.is_count(self.rank) else self.rank * self.batch_size
        return min(self.batch_size, max(1, round(rank)))

    @property
    def global_rank(self):
        """How many rows all send, `r`."""
        return self.workers * self.local_rank

    def holders(self, method):
        """How many workers precondition one layer."""
        if method in ("kfac-mem-opt", "sp-ngd"):
            return 1
        return round(max(1.0, self.fraction * self.workers)) if method == "kfac" else self.workers

    @property
    def sides(self):
        """The sizes of all factors."""
        return [size for a, g, _ in self.shapes for size in (a, g)]

    def matrix(self, size):
        """Numbers of a symmetric matrix as it is sent."""
        return packed_size(size) if self.packed else size**2

    def split_of(self, method):
        """The largest size of a block of a factor."""
        return DEFAULT_SPLIT if method in BASIS_METHODS else self.split

    def blocks(self, method, size):
        """The sizes of the blocks on the diagonal of a factor of a method's that has blocks."""
        split = self.split_of(method)
        whole, rest = divmod(size, split)
        return [split] * whole + [rest] * bool(rest)


def check_method(name, method):
    """Returns a method's name; a `ValueError` names the argument and what there is."""
    if method not in METHODS:
        raise ValueError(f"`{name}` must be of {METHODS}. Received: {name}={method!r}")
    return method


@dataclass(frozen=True)
class Exchange:
    """Collective operations of one stage, one after another.

    Attributes:
        stage: of `STAGES`.
        collective: `"all_reduce"`, `"reduce_scatter"`, `"all_gather"` or `"broadcast"`, see `Rates`.
        sizes: of each, the numbers that are reduced, gathered (from all together) or broadcast.
        participants: how many workers take part in one.
        share: in which share of them a worker takes part.
    """

    stage: str
    collective: str
    sizes: tuple[float, ...]
    participants: int
    share: float = 1.0

    @property
    def received(self):
        """Numbers that a worker receives, the mean over all; a broadcast's source receives nothing."""
        rounds = 2 if self.collective == "all_reduce" else 1
        return rounds * self.share * (self.participants - 1) / self.participants * sum(self.sizes)


def statistics_sizes(method, job):
    """For each layer how many numbers are reduced or gathered at an update."""
    if method in FACTOR_METHODS:
        return tuple(job.matrix(a) + job.matrix(g) for a, g, _ in job.shapes)
    if method in BLOCK_METHODS:
        return tuple(sum(map(job.matrix, job.blocks(method, a) + job.blocks(method, g))) for a, g, _ in job.shapes)
    if method == "sngd":
        return tuple(job.examples * (a + g) for a, g, _ in job.shapes)
    weights = job.workers * job.matrix(job.local_rank) if method == "hylo-kid" else 0
    return tuple(job.global_rank * (a + g) + weights for a, g, _ in job.shapes)


def inverse_sizes(method, job):
    """For each layer how many numbers its owner sends after it inverted."""
    if method == "kfac" and job.eigen:
        return tuple(a**2 + g**2 + a * g for a, g, _ in job.shapes)
    if method in BASIS_METHODS:
        # EKFAC's second moments begin anew with a basis.
        begun = [a * g if method == "ekfac" else 0 for a, g, _ in job.shapes]
        bases = [sum(b**2 for size in (a, g) for b in job.blocks(method, size) if b > 1) for a, g, _ in job.shapes]
        return tuple(map(sum, zip(begun, bases, strict=True)))
    if method in ("kfac", "thor"):
        return statistics_sizes(method, job)
    if method == "skfac":
        return tuple(sum(job.matrix(min(job.examples, d)) for d in (a, g)) for a, g, _ in job.shapes)
    rows = job.examples if method == "sngd" else job.global_rank
    return (job.matrix(rows),) * len(job.shapes)


def exchanges(method, job):
    """What the workers of a job exchange: a list of `Exchange`."""
    p, kernels = job.workers, tuple(a * g for a, g, _ in job.shapes)
    if method == "sgd":
        return [Exchange("gradients", "all_reduce", (sum(kernels),), p)]
    if method == "skfac":
        return [
            Exchange("gradients", "all_reduce", (sum(kernels),), p),
            # One of the two for each factor: its rows, or, where all workers' are no fewer than its columns, itself.
            Exchange("statistics", "all_gather", tuple(job.examples * d for d in job.sides if d > job.examples), p),
            Exchange("statistics", "all_reduce", tuple(job.matrix(d) for d in job.sides if d <= job.examples), p),
            Exchange("inverses", "broadcast", inverse_sizes(method, job), p),
        ]
    statistics = statistics_sizes(method, job)
    if method == "sp-ngd":
        # All layers' segments in one operation each, which is the method's own.
        return [
            Exchange("gradients", "reduce_scatter", (sum(kernels),), p),
            Exchange("statistics", "reduce_scatter", (sum(statistics),), p),
            Exchange("preconditioned", "all_gather", (sum(kernels),), p),
        ]
    collective, holders = "all_gather" if method in ROW_METHODS else "all_reduce", job.holders(method)
    found = [
        Exchange("gradients", "all_reduce", (sum(kernels),), p),
        Exchange("statistics", collective, statistics, p),
    ]
    if holders > 1:
        found.append(Exchange("inverses", "broadcast", inverse_sizes(method, job), holders, holders / p))
    if holders < p:
        found.append(Exchange("preconditioned", "broadcast", kernels, p // holders))
    return found


def received(
    method: str,
    shapes: Sequence[tuple[int, int, int]],
    workers: int,
    batch_size: int,
    rank: int | float = 0.1,
    packed: bool = True,
    fraction: float = 1.0,
    split: int = 128,
    eigen: bool = False,
) -> dict[str, float]:
    """How many numbers a worker receives from others, by stage: the mean over the workers.

    With `k = (P - 1) / P`, `W = sum dA dG`, `D = sum (dA^2 + dG^2)` (packed: `sum (dA (dA + 1) + dG (dG + 1)) / 2`), `M` the
    global batch, `r` the global rank, `L` layers, and `w = fraction P`:

        method                gradients   statistics                        inverses         preconditioned
        sgd                   2 k W
        kfac (COMM-OPT)       2 k W       2 k D                             k D              0
        kfac (HYBRID)         2 k W       2 k D                             (w - 1) / P D    (1 - w / P) W
        kfac-mem-opt          2 k W       2 k D                             0                k W
        sp-ngd                k W         k D                               0                k W
        thor                  2 k W       2 k D, of the blocks alone        k D              0
        ekfac                 2 k W       2 k D, of the blocks alone        k D + k W        0
        eigen-adam            2 k W       2 k D, of the blocks alone        k D              0
        skfac                 2 k W       k M sum (dA + dG)                 2 k L M^2        0
        sngd                  2 k W       k M sum (dA + dG)                 k L M^2          0
        hylo-kid              2 k W       k (r sum (dA + dG) + L r^2 / P)   k L r^2          0
        hylo-kis              2 k W       k r sum (dA + dG)                 k L r^2          0

    Blocks are THOR's of `split`, of EKFAC and EigenAdam of their default split; their bases are not packed. With `eigen` KFAC's
    inverses are eigenvectors and the products of eigenvalues, `D + W` (not packed) in place of `D`.
    Packed, `r^2` and `M^2` are `r (r + 1) / 2` and `M (M + 1) / 2`. Of SKFAC's factors, those with `d <= M` columns take
    `2 k d^2` and `k d^2` (packed, as above) in place of `k M d` and `k M^2`.

    Args:
        method: of `METHODS`.
        shapes, workers, batch_size, rank, packed, fraction, split, eigen: as for `Job`.

    Returns:
        A dict: `"gradients"` at every step, `"statistics"` and `"inverses"` when these are renewed, `"preconditioned"` at
        every step.

    Raises:
        ValueError: naming the argument that is out of range.

    Reference:
        - [Pauloski et al., 2021](https://doi.org/10.1145/3458817.3476152), KAISA: COMM-OPT, MEM-OPT, HYBRID
        - [Osawa et al., 2019](https://arxiv.org/abs/1811.12019), SP-NGD
        - [Mu et al., 2022](https://doi.org/10.1109/SC41404.2022.00053), HyLo, Table I
    """
    job = Job(shapes, workers, batch_size, rank, packed, fraction, split, eigen)
    counts = dict.fromkeys(STAGES, 0.0)
    for exchange in exchanges(check_method("method", method), job):
        counts[exchange.stage] += exchange.received
    return counts
