"""HyLo's switch: as a function of what it is told, and through `fit`."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_ngd
from keras_ngd.optimizers import gradient_switch
from keras_ngd.statistics.low_rank import KID, KIS
from tf_tests import paper, small
from tf_tests.reference import gradient_switch as reference
from tf_tests.reference.running import close, run
from tf_tests.small import array, captured, fit, mlp, regression

pytestmark = pytest.mark.neutral

STEPS = 3
NAMES = {KID: "kid", KIS: "kis"}


def at_first_step(state, rate, ratio):
    return gradient_switch.at_first_step(state, rate, ratio)


def after_epoch(state, norm, rate, eta, ratio):
    return gradient_switch.after_epoch(state, norm, rate, eta, ratio)


# Neighbours a quarter, an eighth and a half apart, and what a sum of gradients should not be.
NORMS = st.sampled_from([1.0, 1.125, 1.25, 1.5, 2.0, 3.0, 0.0, float("inf"), float("nan")])
RATES = st.sampled_from([1.0, 0.5, 0.25])


@given(
    st.lists(st.tuples(NORMS, RATES, RATES), max_size=8),
    st.sampled_from([0.125, 0.25, 1e9]),
    st.sampled_from([0.9, 0.5]),
)
def test_the_switch_is_the_plain_state_machine(epochs, eta, ratio):
    state = np.asarray(run(gradient_switch.initial_state))
    found = []
    for epoch, (norm, announced, rate) in enumerate(epochs):
        state = run(at_first_step, state, *np.float32([rate, ratio]))
        found.append(NAMES[float(state[0])])
        assert state[1] == epoch
        state = run(after_epoch, state, *np.float32([norm, announced, eta, ratio]))
    norms, announced, rates = ([epoch[i] for epoch in epochs] for i in range(3))
    assert [*found, NAMES[float(state[0])]] == reference.modes(norms, announced, rates, eta, ratio)
    known = dict(zip(gradient_switch.STATE, state, strict=True))
    assert known["epochs"] == len(epochs)
    if epochs:
        np.testing.assert_array_equal(known["norm"], np.float32(norms[-1]))
    if len(epochs) > 1:
        np.testing.assert_array_equal(known["previous_norm"], np.float32(norms[-2]))


class Modes(keras.callbacks.Callback):
    """What was recorded in every epoch: the gates that its steps found open, and what the report said at its start."""

    def __init__(self):
        super().__init__()
        self.gates, self.reported, self.norms = [], [], []

    def sync(self):
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()

    def on_epoch_begin(self, epoch, logs=None):
        self.gates.append([])
        if epoch:
            self.reported.append(self.model.optimizer.switch_report()["mode"])
            self.norms.append(self.model.optimizer.switch_report()["norm"])

    def on_train_batch_begin(self, batch, logs=None):
        self.sync()
        gates = {float(array(layer.statistics.gate)) for layer in self.model.layers[1:]}
        assert len(gates) == 1
        self.gates[-1].append(gates.pop())

    @property
    def modes(self):
        """By epoch; every open gate of one has the same."""
        found = []
        for gates in self.gates:
            opened = {gate for gate in gates if gate > 0}
            found.append(NAMES[opened.pop()] if len(opened) == 1 else sorted(opened))
        return found


def hylo(**kwargs):
    """A `HyLo` that settles at once, so that nothing but the learning rate or `eta` calls for KID."""
    defaults = {"interval": 1, "batch_size": 8, "rank": 3, "steps_per_epoch": STEPS, "eta": 1e9}
    return paper.HyLo(**{**defaults, "damping": 0.1, "learning_rate": 0.01, **kwargs})


def record(optimizer, epochs, callbacks=()):
    """The modes of training, epoch by epoch."""
    keras.utils.set_random_seed(0)
    modes = Modes()
    model = captured(mlp(), optimizer)
    # TensorFlow would do so in the first step, whose gate is read before.
    optimizer.build(model.trainable_variables)
    fit(model, *regression(8 * STEPS), epochs=epochs, callbacks=[modes, *callbacks])
    return modes


def test_an_eta_in_between_decides_by_the_norms():
    """What the report says of the sums' lengths is what decided."""
    modes = record(hylo(eta=0.3, learning_rate=0.05), 7)
    rates = [0.05] * 6
    assert modes.modes == reference.modes(modes.norms, rates, rates, 0.3, 0.9)
    assert {"kid", "kis"} <= set(modes.modes[2:])


def test_the_norm_is_that_of_the_sum_of_an_epochs_gradients():
    """Which a learning rate of zero leaves to be computed from the weights; a batch that is not finite adds nothing."""
    optimizer = hylo(learning_rate=0.0, momentum=0.0)
    model = captured(mlp(), optimizer)
    x, y = regression(8 * STEPS)
    assert optimizer.switch_report() == {"mode": "kid", "epochs": 0, "norm": 0.0, "previous_norm": 0.0}
    fit(model, x, y)
    spoiled = x.copy()
    spoiled[8:16] = np.nan
    fit(model, spoiled, y)
    report = optimizer.switch_report()
    # Plain again, it has room for all examples at once.
    keras_ngd.release(model)
    lengths = []
    for kept in (np.ones(8 * STEPS, bool), np.arange(8 * STEPS) // 8 != 1):
        # The sum over an epoch's steps is as many times the mean over all examples.
        mean = small.gradients(model, x[kept], y[kept]).values()
        lengths.append(np.sqrt(sum(np.sum(np.square(g, dtype="float64")) for g in mean)) * sum(kept) / 8)
    assert (report["mode"], report["epochs"]) == ("kis", 2)
    close(report["previous_norm"], lengths[0], 1e-5)
    close(report["norm"], lengths[1], 1e-5)


def test_interpolates_in_the_first_two_epochs_and_where_a_schedule_drops_the_learning_rate():
    """At the start of the fourth epoch, for one epoch."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([3 * STEPS - 1], [0.01, 0.001])
    modes = record(hylo(learning_rate=schedule), 5)
    assert modes.modes == ["kid", "kid", "kis", "kid", "kis"]
    # The report at the start of an epoch is of the last step of the one before, which has decided.
    assert modes.reported == modes.modes[1:]


def test_interpolates_where_a_callback_drops_the_learning_rate_by_much():
    """Which the first step of an epoch sees, when its own gate is set already."""
    rates = [0.01, 0.0095, 0.009, 0.0085, 0.001, 0.001]
    modes = record(hylo(), 6, [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rates[epoch])])
    assert modes.modes[:4] == ["kid", "kid", "kis", "kis"]
    assert modes.gates[4] == [KIS, KID, KID]
    assert modes.modes[5] == "kis"


def test_one_mode_for_good():
    modes = record(hylo(mode="kis", steps_per_epoch=None, interval=2), 2)
    assert sum(modes.gates, []) == [KIS, 0, KIS, 0, KIS, 0]
    assert modes.reported == ["kis"]


@pytest.mark.slow
def test_random_epochs_are_whole_and_follow_the_seed():
    first, again = (record(hylo(mode="random", seed=5), 7) for _ in range(2))
    assert first.gates == again.gates
    assert set(first.modes) == {"kid", "kis"}
    assert first.reported == first.modes[1:]


def test_random_first_epochs_follow_the_seed_and_are_as_often_the_one_as_the_other():
    found = []
    for seed in [*range(16), *range(16)]:
        model = captured(mlp(), hylo(mode="random", seed=seed))
        model.optimizer.build(model.trainable_variables)
        found.append(model.optimizer.switch_report()["mode"])
        assert {NAMES[float(array(layer.statistics.gate))] for layer in model.layers[1:]} == {found[-1]}
    assert found[:16] == found[16:]
    assert 4 <= found[:16].count("kid") <= 12


def test_the_first_step_interpolates():
    """Though it may be the one that builds the optimizer. Only an interpolation weights rows with each other."""
    model = captured(mlp(), hylo())
    model.train_on_batch(*regression(8))
    weights = array(model.layers[1].statistics.averages[2])[0]
    assert np.abs(weights - np.eye(3)).max() > 1e-3
