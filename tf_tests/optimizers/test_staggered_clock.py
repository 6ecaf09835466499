"""When which share of the layers is refreshed."""

import types

import keras
from keras import ops

from keras_ngd.optimizers.shares import Shares
from keras_ngd.optimizers.staggered_clock import StaggeredClock
from keras_ngd.schedules import GrowingInterval


def clock(interval, growth=None, count=4):
    optimizer = types.SimpleNamespace(
        shares=Shares(range(count)),
        inverse_interval=interval,
        interval_growth=growth,
        assign=lambda variable, value: variable.assign(value),
    )
    return StaggeredClock(optimizer, lambda shape, start, dtype, name: keras.Variable(start, shape, dtype, name=name))


def turns(of, steps, first=0, missed=()):
    """`(step, "all" or the share)` of each turn, and at which steps rounds began."""
    found, begun = [], []
    for number in range(first, first + steps):
        step = ops.convert_to_tensor(number, of.next_inverses.dtype)
        due = of.refresh_due(step, ops.ones((), "bool"), ops.ones((), "bool")) & (number not in missed)
        [what] = of.renewed(step, due, lambda s: [ops.convert_to_tensor(s)], -1, [ops.convert_to_tensor(-2)])
        if int(what) != -2:
            found.append((number, "all" if int(what) == -1 else int(what)))
        if bool(of.refreshed(step, due)):
            begun.append(number)
    return found, begun


def test_everything_comes_first_and_then_each_share_once_in_each_interval():
    expected = [(2, "all"), (4, 1), (7, 2), (9, 3), (12, 0), (14, 1), (17, 2), (19, 3), (22, 0)]
    assert turns(clock(10), 22, first=2) == (expected, [2, 12, 22])


def test_intervals_shorter_than_there_are_shares_refresh_everything():
    grown, begun = turns(clock(6, growth=0.5), 22)
    # At steps 1, 2, 3, 4, 6: intervals of 1, 1, 1, 2, 3; then 4 at step 9 and 6 at step 13.
    assert [step for step, what in grown if what == "all"] == [0, 1, 2, 3, 4, 6]
    assert grown[6:] == [(9, 0), (10, 1), (11, 2), (12, 3), (13, 0), (14, 1), (16, 2), (17, 3), (19, 0), (20, 1)]
    assert begun == [0, 1, 2, 3, 4, 6, 9, 13, 19]


def test_a_round_has_the_interval_that_a_schedule_has_where_it_begins():
    schedule = GrowingInterval(boundaries=[9], values=[8, 4])
    assert turns(clock(schedule), 22)[0] == [
        *((0, "all"), (2, 1), (4, 2), (6, 3)),
        *((8, 0), (10, 1), (12, 2), (14, 3)),
        *((16, 0), (17, 1), (18, 2), (19, 3)),
        *((20, 0), (21, 1)),
    ]


def test_a_missed_turn_is_made_up_for_and_no_step_has_two():
    found, begun = turns(clock(4), 14, missed=(1, 2, 6))
    assert found == [
        *((0, "all"), (3, 1), (4, 2), (5, 3)),
        *((7, 0), (8, 1), (9, 2), (10, 3)),
        *((11, 0), (12, 1), (13, 2)),
    ]
    assert begun == [0, 7, 11]


def test_to_refresh_at_once_is_to_refresh_everything():
    of = clock(10)
    turns(of, 5)
    of.refresh_at_once()
    assert turns(of, 8, first=5)[0] == [(5, "all"), (7, 1), (10, 2), (12, 3)]


def test_one_share_is_as_without_shares():
    assert turns(clock(3, count=1), 7) == ([(0, "all"), (3, 0), (6, 0)], [0, 3, 6])
