"""How fast a worker computes and how fast workers talk to each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from keras import ops

from keras_ngd import backend, schedules
from keras_ngd.analysis.measuring import median_seconds
from keras_ngd.analysis.split_choice import inversion_seconds

if TYPE_CHECKING:
    from keras_ngd.analysis.exchanges import Exchange

BYTES = 4


@dataclass(frozen=True)
class Rates:
    """What one worker and one link do in a second.

    Of computation, with a product of `[a, b]` and `[b, c]` counted as `2 a b c` operations, and a Cholesky factorization with the
    inverse it is for as `d^3` (a third of them the factorization's):

        product         operations / product_flops
        inverse         d^3 / factorization_flops + d row_seconds

    The second term is what makes small matrices slow: rows of a factorization follow one another. Of communication, after
    the latency-bandwidth model, for `n` bytes among `P` workers:

        all-reduce (ring)               2 (P - 1) latency + 2 (P - 1) / P n / bandwidth
        reduce-scatter, all-gather      (P - 1) latency + (P - 1) / P n / bandwidth
        broadcast (tree)                ceil(log2 P) (latency + n / bandwidth)

    Args:
        product_flops: operations per second of large products.
        factorization_flops: operations per second of factorizations of large matrices.
        bandwidth: of a link, in bytes per second. Default 12.5e9: 100 Gbit/s.
        latency: of a message, in seconds. Default 5e-6.
        row_seconds: what each row of a factorization takes however short it is. Default 0.

    Raises:
        ValueError: naming the argument that is not positive (negative: `latency`, `row_seconds`).
    """

    product_flops: float
    factorization_flops: float
    bandwidth: float = 12.5e9
    latency: float = 5e-6
    row_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("product_flops", "factorization_flops", "bandwidth"):
            schedules.check_positive_number(name, getattr(self, name))
        for name in ("latency", "row_seconds"):
            value = getattr(self, name)
            if not schedules.is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be a number of seconds, 0 or more. Received: {name}={value!r}")

    def product(self, pairs: float) -> float:
        """Seconds of products of so many multiplications and additions."""
        return 2 * pairs / self.product_flops

    def inverse(self, *sizes: float, operations: float = 1) -> float:
        """Seconds of inverting symmetric matrices in one batch, with `operations` times as many operations as Cholesky's."""
        count = operations * sum(size**3 for size in sizes)
        return count / self.factorization_flops + max(sizes) * self.row_seconds

    def collective(self, kind: str, numbers: float, workers: int) -> float:
        """Seconds of one collective operation; `numbers` are those of all workers together where they are gathered."""
        seconds, others = BYTES * numbers / self.bandwidth, workers - 1
        if kind == "broadcast":
            return math.ceil(math.log2(workers)) * (self.latency + seconds)
        rounds = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}[kind]
        return rounds * (others * self.latency + others / workers * seconds)

    def exchange(self, exchange: "Exchange") -> float:
        """Seconds of an `Exchange`."""
        kind, workers = exchange.collective, exchange.participants
        return exchange.share * sum(self.collective(kind, size, workers) for size in exchange.sizes)


def product_seconds(size):
    """Median time of one product of two `size x size` matrices on the present device, compiled."""
    matrix = ops.convert_to_tensor(np.random.default_rng(size).normal(size=(1, size, size)).astype("float32"))
    return median_seconds(backend.traced_once(lambda m: backend.matmul(m, m)), matrix)


def measure_rates(bandwidth: float = 12.5e9, latency: float = 5e-6, sizes: Sequence[int] = (128, 1024)) -> Rates:
    """Measures products and inverses on the present device; the network is as given.

    Args:
        bandwidth, latency: as for `Rates`.
        sizes: two increasing ints: the smaller matrix tells `row_seconds`, the larger all else. Default (128, 1024).

    Returns:
        A `Rates`.

    Raises:
        ValueError: if `sizes` are not two increasing ints, or as `Rates` does.
    """
    sizes = tuple(schedules.check_count("sizes", size) for size in sizes)
    if len(sizes) != 2 or sizes[0] >= sizes[1]:
        raise ValueError(f"`sizes` must be two increasing ints. Received: sizes={sizes!r}")
    # Before anything is measured.
    Rates(1.0, 1.0, bandwidth, latency)
    flops, row_seconds = fit_inverse(sizes, [inversion_seconds(size) for size in sizes])
    return Rates(2 * sizes[1] ** 3 / product_seconds(sizes[1]), flops, bandwidth, latency, row_seconds)


def fit_inverse(sizes, seconds):
    """`factorization_flops` and `row_seconds` from the times of two sizes.

    Where these do not fit together, as where the larger matrix is no slower, all of its time counts as operations.
    """
    small, large = (time / size for size, time in zip(sizes, seconds, strict=True))
    slope = (large - small) / (sizes[1] ** 2 - sizes[0] ** 2)
    rows = small - slope * sizes[0] ** 2
    if slope <= 0 or rows < 0:
        return sizes[1] ** 3 / seconds[1], 0.0
    return 1 / slope, rows
