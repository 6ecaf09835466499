"""Pieces of work divided among workers."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_ngd.distributed import gradient_workers, holders_of, place, row_of
from keras_ngd.distributed.placement import loads

COSTS = st.lists(st.integers(0, 1000), max_size=7)


@given(COSTS, st.integers(1, 3))
def test_longest_load_is_within_a_third_of_the_best(costs, workers):
    owners = place(costs, workers)
    assert all(0 <= owner < workers for owner in owners)
    assert sum(loads(costs, owners, workers)) == sum(costs)
    best = min(
        (max(loads(costs, choice, workers)) for choice in itertools.product(range(workers), repeat=len(costs))),
        default=0,
    )
    assert max(loads(costs, owners, workers)) <= (4 / 3 - 1 / (3 * workers)) * best + 1e-9


@given(COSTS, st.integers(1, 20))
def test_nothing_better_is_left_at_the_end(costs, workers):
    """No worker could hand any piece to another and both be no more loaded than it was."""
    owners = place(costs, workers)
    totals = loads(costs, owners, workers)
    busiest = max(range(workers), key=totals.__getitem__)
    smallest = min((c for c, owner in zip(costs, owners, strict=True) if owner == busiest), default=0)
    assert totals[busiest] - smallest <= min(totals)


def test_equal_pieces_are_spread_evenly_and_in_order():
    assert place([5, 5, 5, 5, 5], 2) == [0, 1, 0, 1, 0]
    assert place([1, 100, 1, 1], 3) == [1, 0, 2, 1]
    assert place([], 4) == []


@pytest.mark.parametrize("workers", [0, -1, 1.5, "2"])
def test_bad_workers(workers):
    with pytest.raises(ValueError, match="workers"):
        place([1.0], workers)


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf"), "3"])
def test_bad_costs(cost):
    with pytest.raises(ValueError, match=r"costs\[1\]"):
        place([1.0, cost], 2)


@given(st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2), (6, 3), (8, 8), (12, 4)]))
def test_every_row_of_workers_has_one_holder_of_each_layer(sizes):
    workers, count = sizes
    for owner in range(workers):
        holders = holders_of(owner, count, workers)
        assert len(set(holders)) == count
        assert owner in holders
        for rank in range(workers):
            row = row_of(rank, count, workers)
            assert rank in row
            assert len(set(row) & set(holders)) == 1


def test_fractions_are_numbers_of_workers():
    assert [gradient_workers(fraction, 4) for fraction in (0.25, 0.5, 1.0)] == [1, 2, 4]
    assert gradient_workers(1 / 3, 3) == 1
    assert gradient_workers(0.1, 1) == gradient_workers(0, 5) == 1
    for fraction in (0.1, 0.3, 0.75):
        with pytest.raises(ValueError, match=r"one of 0, 0.25, 0.5, 1. Received: gradient_worker_fraction"):
            gradient_workers(fraction, 4)
