"""The trace rule on tensors, against the same rule in plain Python."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from keras_ngd.optimizers import trace_rule
from tf_tests.reference.running import run


class Machine:
    """One layer's rule, as eq. 8 and 9 of the THOR paper read."""

    def __init__(self, omega, patience):
        self.omega, self.patience = omega, patience
        self.reference, self.hits, self.stopped = None, 0, False

    def decide(self, trace):
        if self.stopped or not math.isfinite(trace):
            return "keep"
        change = math.inf if not self.reference else abs(np.float32(trace) - self.reference) / self.reference
        self.hits = self.hits + 1 if change < np.float32(self.omega[1]) else 0
        if change > np.float32(self.omega[0]):
            self.reference = np.float32(trace)
            return "update"
        if self.hits >= self.patience and change < np.float32(self.omega[1]):
            self.stopped = True
            return "stop"
        return "keep"


# Factors of which every product with a power of ten is well away from every threshold.
factors = st.sampled_from([0.5, 0.96, 0.992, 0.9997, 1.0, 1.0003, 1.008, 1.04, 3.0])
omegas = st.sampled_from([(0.01, 0.0), (0.01, 0.001), (0.0, 0.0), (0.02, 0.02), (0.1, 0.005)])


@given(
    st.lists(st.lists(factors, min_size=3, max_size=3), min_size=12, max_size=12),
    omegas,
    st.integers(1, 3),
    st.booleans(),
)
def test_equals_a_plain_state_machine(walk, omega, patience, with_nan):
    traces = np.cumprod(np.array(walk), axis=0).astype("float32") * 7
    if with_nan:
        traces[3, 0], traces[5, 1] = np.nan, np.inf
    machines = [Machine(omega, patience) for _ in range(3)]
    state = run(lambda _: trace_rule.initial_state(3), np.zeros(1))

    def decide(state, traces):
        return trace_rule.decide(state, traces, omega, patience)

    for row in traces:
        state = run(decide, state, row)
        found = dict(zip(trace_rule.STATE, state, strict=True))
        decisions = [trace_rule.DECISIONS[int(d)] for d in found["decision"]]
        assert decisions == [machine.decide(float(t)) for machine, t in zip(machines, row, strict=True)]
        assert [bool(s) for s in found["stopped"]] == [machine.stopped for machine in machines]
        references = [-1.0 if machine.reference is None else machine.reference for machine in machines]
        np.testing.assert_array_equal(found["reference"], np.array(references, "float32"))


def test_a_slow_drift_adds_up():
    """The reference is the last accepted trace, not the last seen: half a percent a check adds up to updates."""
    state = run(lambda _: trace_rule.initial_state(1), np.zeros(1))
    updates = 0
    for i in range(40):
        state = run(lambda s, t: trace_rule.decide(s, t, (0.01, 0.0), 1), state, np.array([1.005**i], "float32"))
        updates += state[trace_rule.STATE.index("decision")][0] == trace_rule.UPDATE
    assert 13 <= updates <= 20


def test_a_trace_of_zero_is_no_reference():
    state = run(lambda _: trace_rule.initial_state(1), np.zeros(1))
    for trace in (0.0, 2.0):
        state = run(lambda s, t: trace_rule.decide(s, t, (0.01, 0.001), 1), state, np.array([trace], "float32"))
        assert state[trace_rule.STATE.index("decision")][0] == trace_rule.UPDATE
