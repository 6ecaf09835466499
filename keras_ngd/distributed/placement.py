"""Which worker inverts what."""

import math
from collections.abc import Sequence

from keras_ngd import schedules


def place(costs: Sequence[float], workers: int, before: Sequence[float] | None = None) -> list[int]:
    """Owners of pieces of work, balanced: the longest first, each to the worker that has least so far.

    A worker's load is at most `4/3 - 1/(3 workers)` times that of the best placement (Graham, 1969), and no better
    placement helps where one piece takes longer than the average load. The same on every worker that asks.

    Args:
        costs: for each piece what it takes: non-negative numbers, in any unit.
        workers: how many there are, at least 1.
        before: for each worker what it has to do besides, at other times: of those that have least so far, the one that has least
            of this too gets a piece. Default None: the same for all.

    Returns:
        For each piece its owner's rank.
    """
    workers = schedules.check_count("workers", workers)
    for i, cost in enumerate(costs):
        if not schedules.is_number(cost) or not 0 <= cost < math.inf:
            raise ValueError(f"`costs` must be finite and not negative. Received: costs[{i}]={cost!r}")
    loads: list[float] = [0] * workers
    before = loads[:] if before is None else before
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(workers), key=lambda rank: (loads[rank], before[rank], rank))
        owners[i] = owner
        loads[owner] += costs[i]
    return owners


def holders_of(owner: int, count: int, workers: int) -> list[int]:
    """The workers that hold a layer's inverse and precondition its gradient: `count` of them, its owner among them.

    Workers are a grid of `count` rows; a column's workers hold the same layers, so that every row has one holder of each layer,
    which sends the preconditioned gradient to the others of its row (KAISA, Pauloski et al., 2021).

    Args:
        owner: rank of the worker that inverts.
        count: how many hold what one has inverted; a divisor of `workers`.
        workers: how many workers there are.

    Returns:
        Ranks in ascending order.
    """
    width = workers // count
    return [row * width + owner % width for row in range(count)]


def row_of(rank: int, count: int, workers: int) -> list[int]:
    """The ranks of the workers in one's row of the grid, oneself included; see `holders_of`."""
    width = workers // count
    start = rank // width * width
    return list(range(start, start + width))


def gradient_workers(fraction: float, workers: int) -> int:
    """How many workers hold each layer's inverse: `fraction * workers`, for one worker, and for the fraction 0, one.

    Raises:
        ValueError: if that is not an int that divides `workers`.
    """
    count = fraction * workers
    if workers == 1 or fraction == 0:
        return 1
    if round(count) < 1 or abs(count - round(count)) > 1e-6 or workers % round(count):
        possible = [d / workers for d in range(1, workers + 1) if workers % d == 0]
        raise ValueError(
            f"`gradient_worker_fraction` times the number of workers, {workers}, must divide it: one of 0, "
            f"{', '.join(f'{p:.6g}' for p in possible)}. Received: gradient_worker_fraction={fraction}"
        )
    return round(count)


def loads(costs: Sequence[float], owners: Sequence[int], workers: int) -> list[float]:
    """What each worker has to do under a placement."""
    totals: list[float] = [0] * workers
    for cost, owner in zip(costs, owners, strict=True):
        totals[owner] += cost
    return totals
