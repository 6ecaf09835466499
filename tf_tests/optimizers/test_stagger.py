"""Refreshes that are spread over the steps of an interval."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from keras_ngd.curvature import KroneckerCurvature
from tf_tests import paper, small
from tf_tests.small import array

pytestmark = pytest.mark.neutral

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
