"""Which worker inverts what."""

import math

from keras_ngd import schedules


def place(costs, workers):
    """Owners of pieces of work, balanced: the longest first, each to the worker that has least so far.

    A worker's load is at most `4/3 - 1/(3 workers)` times that of the best placement (Graham, 1969), and no better
    placement helps where one piece takes longer than the average load. The same on every worker that asks.

    Args:
        costs: for each piece what it takes: non-negative numbers, in any unit.
        workers: how many there are, at least 1.

    Returns:
        For each piece its owner's rank.
    """
    workers = schedules.check_count("workers", workers)
    for i, cost in enumerate(costs):
        if not schedules.is_number(cost) or not 0 <= cost < math.inf:
            raise ValueError(f"`costs` must be finite and not negative. Received: costs[{i}]={cost!r}")
    loads, owners = [0] * workers, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(workers), key=lambda rank: (loads[rank], rank))
        owners[i] = owner
        loads[owner] += costs[i]
    return owners


def loads(costs, owners, workers):
    """What each worker has to do under a placement."""
    totals = [0] * workers
    for cost, owner in zip(costs, owners, strict=True):
        totals[owner] += cost
    return totals
