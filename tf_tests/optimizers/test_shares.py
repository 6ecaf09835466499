"""How refreshes are divided among steps and workers."""

import types

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from keras_ngd.distributed import place
from keras_ngd.distributed.placement import loads
from keras_ngd.optimizers.shares import MOST_SHARES, divided, owners_in
from keras_ngd.schedules import GrowingInterval

COSTS = st.lists(st.integers(0, 1000), max_size=12)


@given(COSTS, st.integers(1, 40))
def test_shares_are_balanced_and_no_more_than_are_of_use(costs, interval):
    shares = divided(costs, interval)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    assert len(shares) <= max(min(interval, len(costs)), 1)
    longest = max(sum(costs[i] for i in share) for share in shares)
    for count in range(1, min(interval, len(costs)) + 1):
        other = max(loads(costs, place(costs, count), count))
        assert longest < other if count < len(shares) else longest <= other


def test_one_long_piece_needs_few_shares_and_equal_ones_many():
    assert divided([100, 1, 1, 1, 1], 10) == [[0], [1, 2, 3, 4]]
    assert len(divided([5] * 7, 10)) == 7
    assert len(divided([5] * 7, 3)) == 3
    assert len(divided([5] * 2 * MOST_SHARES, GrowingInterval(5, maximum=50))) == MOST_SHARES
    assert divided([], 10) == [[]]


@given(COSTS, st.integers(1, 10), st.integers(1, 4))
def test_each_share_is_balanced_among_workers_and_so_are_all_together(costs, interval, workers):
    def of(block):
        return types.SimpleNamespace(refresh_cost=costs[block.blocks[0]])

    parts = [types.SimpleNamespace(blocks=share) for share in divided(costs, interval)]
    owners = owners_in(parts, of, workers)
    assert sorted(owners) == list(range(len(costs)))
    largest = max(costs, default=0)
    totals = np.zeros(workers)
    for part in parts:
        of_part = [costs[i] for i in part.blocks]
        found = loads(of_part, [owners[i] for i in part.blocks], workers)
        # No better than for this share alone.
        assert sorted(found) == sorted(loads(of_part, place(of_part, workers), workers))
        totals += found
    if all(len(part.blocks) == 1 for part in parts):
        assert totals.max() - totals.min() <= largest
