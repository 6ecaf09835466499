"""Refreshes that are spread over the steps of an interval."""

import types

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers, ops

import keras_ngd
from keras_ngd.curvature import KroneckerCurvature
from keras_ngd.distributed import place
from keras_ngd.distributed.placement import loads
from keras_ngd.optimizers.shares import MOST_SHARES, Shares, divided, owners_in
from keras_ngd.optimizers.staggered_clock import StaggeredClock
from tf_tests import paper, small
from tf_tests.small import array

INTERVAL, BATCH = 5, 8
EVERY = {"inverse_interval": INTERVAL, "interval_growth": None}
ALL = {**EVERY, "factor_interval": 1, "stagger": True}
METHODS = {
    "kfac": lambda: paper.KFAC(0.05, 0.03, **ALL),
    "kfac-global": lambda: keras_ngd.KFAC(**ALL),
    "kfac-eigen": lambda: keras_ngd.KFAC(inverse="eigen", **ALL),
    # Every layer renews its inverses in its turn.
    "thor": lambda: keras_ngd.THOR(split=4, omega=(0.0, 0.0), **ALL),
    "ekfac": lambda: keras_ngd.EKFAC(basis_tolerance=0.0, scale="examples", **ALL),
    "eigen-adam": lambda: keras_ngd.EigenAdam(basis_tolerance=0.0, **ALL),
    "soap": lambda: keras_ngd.EigenAdam(basis="gradient", basis_tolerance=0.0, **EVERY, stagger=True),
}


def network():
    """Seven layers of three shapes."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6,))
    h = layers.Dense(9, activation="tanh")(inputs)
    for _ in range(4):
        h = layers.Dense(9, activation="tanh")(h)
    return keras.Model(inputs, layers.Dense(3)(layers.Dense(3)(h)))


def data(steps):
    rng = np.random.default_rng(0)
    return [
        (rng.normal(size=(BATCH, 6)).astype("float32"), rng.normal(size=(BATCH, 3)).astype("float32"))
        for _ in range(steps)
    ]


def made(method, **arguments):
    optimizer = METHODS[method]() if isinstance(method, str) else method
    model = network()
    if getattr(optimizer, "basis", None) == "gradient":
        return small.compiled(model, optimizer, **arguments)
    return small.captured(model, optimizer, **arguments)


def matrices(optimizer):
    """What refreshes renew, of each matrix of each shape: a dict from shape's and matrix's number to a list of arrays."""
    groups = optimizer.layout.groups if optimizer.layout.blocks else optimizer.gradient_blocks.groups
    found = {}
    for i, group in enumerate(groups):
        # Bases alone of what steps renew, too.
        slots = zip(group.curvature.slots, group.curvature.variables, strict=True)
        values = [array(v) for slot, v in slots if slot.refreshed and not slot.stepped]
        for j in range(len(values[0])):
            found[i, j] = [value[j] for value in values]
    return found


def shares_of(optimizer):
    """The same numbers by share."""
    if not optimizer.layout.blocks:
        return [set(share) for share in optimizer.shares.parts]
    numbers = {b: (i, j) for i, group in enumerate(optimizer.layout.groups) for j, b in enumerate(group.blocks)}
    return [{numbers[block] for block in part.blocks} for part in optimizer.shares.parts]


def changed(before, after):
    """Which matrices are not what they were."""
    return {key for key in after if any(not np.array_equal(b, a) for b, a in zip(before[key], after[key], strict=True))}


# How work is divided

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
    assert len(divided([5] * 2 * MOST_SHARES, keras_ngd.schedules.GrowingInterval(5, maximum=50))) == MOST_SHARES
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


# Whose turn it is


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
        if bool(of.begun(step, due)):
            begun.append(number)
        of.refreshed(step, due)
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
    schedule = keras_ngd.schedules.GrowingInterval(boundaries=[9], values=[8, 4])
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


# What it does to a training


@pytest.mark.parametrize("method", METHODS)
def test_every_layer_is_refreshed_once_in_each_interval_in_its_turn(method):
    model, seen = made(method), []
    optimizer, steps = model.optimizer, 3 * INTERVAL
    for x, y in data(steps):
        before = matrices(optimizer) if optimizer.built else {}
        model.train_on_batch(x, y)
        seen.append(changed(before, matrices(optimizer)) if before else set())
    shares, everything = shares_of(optimizer), set(matrices(optimizer))
    count = len(shares)
    assert count > 2
    assert sum(map(len, shares)) == len(everything)
    assert set().union(*shares) == everything
    for round in range(3):
        for step in range(INTERVAL):
            due = [s for s in range(count) if s * INTERVAL // count == step]
            # All at the first step, of which nothing is seen.
            expected = shares[due[0]] if due and (round or step) else set()
            assert seen[round * INTERVAL + step] == expected
    assert optimizer.inverse_updates == 3


@pytest.mark.parametrize("method", ["kfac", "kfac-eigen", "thor", "eigen-adam", "soap"])
def test_what_a_turn_makes_is_what_a_refresh_of_everything_would_make(method):
    """An optimizer without turns, with the same state, that refreshes at that step."""
    model, batches = made(method), data(INTERVAL + 2)
    for x, y in batches[:-1]:
        model.train_on_batch(x, y)
    before = matrices(model.optimizer)
    own = ("refresh_round", "mean_curvature", "curvature_by_block")
    state = [array(v) for v in model.weights + [v for v in model.optimizer.variables if v.name not in own]]
    model.train_on_batch(*batches[-1])

    config = {**model.optimizer.get_config(), "stagger": False}
    if "damping_mode" in config:
        # An optimizer without turns would measure all layers' traces at this step.
        unit = [float(array(v)) for v in model.optimizer.damping_unit.variables[:1]]
        config |= {"damping_mode": "pi", "damping": float(np.prod([config["damping"], *unit]))}
    twin = made(type(model.optimizer).from_config(config))
    twin.optimizer.build(twin.trainable_variables)
    for variable, value in zip(twin.weights + twin.optimizer.variables, state, strict=True):
        variable.assign(value)
    twin.optimizer.clock.refresh_at_once()
    twin.train_on_batch(*batches[-1])
    after, expected = matrices(model.optimizer), matrices(twin.optimizer)
    share = changed(before, after)
    assert share in shares_of(model.optimizer)
    assert changed(before, expected) == set(expected)
    for key in share:
        for found, value in zip(after[key], expected[key], strict=True):
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)


def test_the_unit_of_the_damping_is_of_each_layer_as_of_its_turn():
    model = made(paper.KFAC(0.05, 0.5, damping_mode="global", **ALL))
    optimizer, known = model.optimizer, {}
    for step, (x, y) in enumerate(data(2 * INTERVAL)):
        before = matrices(optimizer) if step else {}
        model.train_on_batch(x, y)
        now = matrices(optimizer)
        for key in changed(before, now) if step else now:
            i, j = key
            a, g = (array(v)[0] for v in optimizer.layout.groups[i].blocks[j].statistics.averages)
            known[key] = np.trace(a) * np.trace(g), len(a) * len(g)
        traces, parameters = np.sum(list(known.values()), axis=0)
        np.testing.assert_allclose(array(optimizer.damping_unit.variables[0]), traces / parameters, rtol=1e-5)


def test_each_step_is_given_its_share_alone(monkeypatch):
    """The matrices that the branches of a step invert, counted where it is traced."""
    traced, refresh = [], KroneckerCurvature.refresh_all.__func__

    def counting(cls, curvatures, inputs, *rest):
        traced.append(sum(2 * factors[0].shape[0] for factors in inputs))
        return refresh(cls, curvatures, inputs, *rest)

    monkeypatch.setattr(KroneckerCurvature, "refresh_all", classmethod(counting))
    model = made("kfac")
    model.train_on_batch(*data(1)[0])
    counts = [2 * len(share) for share in shares_of(model.optimizer)]
    # A step may be traced more than once.
    assert traced[: len(counts) + 1] == [sum(counts), *counts]
    assert traced == traced[: len(counts) + 1] * (len(traced) // (len(counts) + 1))


def test_layers_decide_in_their_turn():
    """THOR's rule is asked of the layers of a share alone, which may keep what they have."""
    model = made(keras_ngd.THOR(split=4, omega=(0.2, 0.0), **ALL))
    optimizer = model.optimizer
    decided = []
    for step, (x, y) in enumerate(data(3 * INTERVAL)):
        rule, before = (array(optimizer._rule), matrices(optimizer)) if step else (None, {})
        model.train_on_batch(x, y)
        if not step:
            continue
        new, shares = array(optimizer._rule), [{b.layer for b in p.blocks} for p in optimizer.shares.parts]
        asked = {b.layer for i, b in enumerate(optimizer.layout.blocks) if not np.array_equal(rule[:, i], new[:, i])}
        assert not asked or any(asked <= share for share in shares)
        report = optimizer.trace_report()
        numbers = {b.layer: (i, j) for i, g in enumerate(optimizer.layout.groups) for j, b in enumerate(g.blocks)}
        updated = {numbers[layer] for layer in asked if report[layer]["decision"] == "update"}
        assert changed(before, matrices(optimizer)) == updated
        decided += [report[layer]["decision"] for layer in asked]
    assert {"update", "keep"} <= set(decided)


@pytest.mark.parametrize("method", ["kfac", "eigen-adam", "soap"])
def test_a_batch_that_is_not_finite_in_the_turn_of_a_layer(method):
    """Inverses are made of the statistics as they were; what follows from the last basis is tried again at the next step."""
    model, batches, seen = made(method), data(2 * INTERVAL + 1), []
    for step, (x, y) in enumerate(batches):
        x = np.full_like(x, np.nan) if step == INTERVAL else x
        before = matrices(model.optimizer) if step else {}
        model.train_on_batch(x, y)
        seen.append(changed(before, matrices(model.optimizer)) if step else set())
    shares = shares_of(model.optimizer)
    tried_again = method != "kfac"
    assert seen[INTERVAL] == (set() if tried_again else shares[0])
    if tried_again:
        assert seen[INTERVAL + 1] == shares[0]
    assert model.optimizer.skipped_steps == 1
    assert set().union(*seen[INTERVAL:]) == set(matrices(model.optimizer))
    assert all(np.isfinite(v).all() for values in matrices(model.optimizer).values() for v in values)


def test_a_layer_that_has_recorded_nothing_waits_for_its_next_turn():
    model, batches = made(paper.KFAC(0.05, 0.03, **{**ALL, "factor_interval": 2 * INTERVAL})), data(2 * INTERVAL + 1)
    seen = []
    for step, (x, y) in enumerate(batches):
        updates = model.optimizer.arrivals.updates if step else None
        if step == INTERVAL:
            updates.assign(0 * array(updates))
        if step == INTERVAL + 1:
            updates.assign(0 * array(updates) + 1)
        before = matrices(model.optimizer) if step else {}
        model.train_on_batch(x, y)
        seen.append(changed(before, matrices(model.optimizer)) if step else set())
    shares = shares_of(model.optimizer)
    assert seen[INTERVAL] == set()
    # Not one of the other turns makes up for it.
    assert not any(shares[0] & found for found in seen[INTERVAL + 1 : 2 * INTERVAL])
    assert seen[2 * INTERVAL] == shares[0]


@pytest.mark.parametrize("method", ["kfac-global", "soap"])
def test_a_training_that_is_stopped_in_a_round_goes_on_with_the_same_bits(method, tmp_path):
    batches = data(3 * INTERVAL)
    straight, model = made(method), made(method)
    for x, y in batches:
        straight.train_on_batch(x, y)
    for x, y in batches[: INTERVAL + 2]:
        model.train_on_batch(x, y)
    model.save(tmp_path / "saved.keras")
    resumed = keras.models.load_model(tmp_path / "saved.keras")
    assert resumed.optimizer.stagger
    for x, y in batches[INTERVAL + 2 :]:
        resumed.train_on_batch(x, y)

    def everything(model):
        variables = model.weights + model.optimizer.variables
        return {f"{i} {v.path}": array(v) for i, v in enumerate(variables)}

    small.assert_same(everything(resumed), everything(straight))


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX compiles every step")
@pytest.mark.parametrize("method", ["kfac-global", "soap"])
def test_a_step_that_xla_compiles(method, monkeypatch):
    # Of directions that have no gradient, rounding would else decide.
    monkeypatch.setitem(
        METHODS, "soap", lambda: keras_ngd.EigenAdam(epsilon=1.0, basis="gradient", stagger=True, **EVERY)
    )
    found = []
    for compiled in (False, True):
        model = made(method, jit_compile=compiled)
        for x, y in data(2 * INTERVAL):
            model.train_on_batch(x, y)
        found.append(small.weights(model))
    assert small.relative_distance(*found) < 1e-4


# The argument


@pytest.mark.parametrize("method", [keras_ngd.KFAC, keras_ngd.THOR, keras_ngd.EKFAC, keras_ngd.EigenAdam])
def test_it_is_an_argument(method):
    optimizer = method(stagger=True)
    assert optimizer.get_config()["stagger"] is True
    assert method.from_config(optimizer.get_config()).stagger is True
    assert "stagger" not in method().get_config()
    assert method.from_config(method().get_config()).stagger is False
    for value in (1, "yes", None):
        with pytest.raises(ValueError, match="`stagger` must be True, .* or False. Received: stagger="):
            method(stagger=value)


@pytest.mark.parametrize("method", [keras_ngd.SKFAC, keras_ngd.SNGD, keras_ngd.HyLo])
def test_methods_on_rows_refuse_it(method):
    with pytest.raises(ValueError, match=f"{method.__name__} refreshes each layer with the batch .* stagger=True"):
        method(stagger=True)
    assert "stagger:" not in method.__doc__
