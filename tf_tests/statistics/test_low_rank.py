"""The few rows that a training step leaves behind for all rows of its batch."""

import keras
import numpy as np
import pytest

import keras_ngd
from keras_ngd.statistics.low_rank import KID, KIS
from tf_tests import paper, small
from tf_tests.reference import low_rank as reference
from tf_tests.reference.running import close, error
from tf_tests.statistics.test_kronecker import branches, convolution, dense, draw, squared_error_gradient

BATCH, RANK, DAMPING = 8, 3, 2.0**-3

CAPTURED = {
    "dense": lambda: (dense(3, activation="tanh"), (5,)),
    "grouped": lambda: (convolution(1, 4, 3, groups=2, padding="same"), (5, 4)),
}


class Observed:
    """A model that is captured for HyLo and trained by an SGD that changes nothing, and what it should see."""

    def __init__(self, batch_size=BATCH, **kwargs):
        self.model, self.layers, self.x, self.y = branches(CAPTURED)
        # Six examples by themselves: two more of each.
        self.x = [np.concatenate([t, draw(2, *t.shape[1:], seed=5)]) for t in self.x]
        self.y = [np.concatenate([t, draw(2, *t.shape[1:], seed=6)]) for t in self.y]
        arguments = {"batch_size": batch_size, "rank": RANK, "steps_per_epoch": 1}
        keras_ngd.capture(self.model, paper.HyLo(**{**arguments, **kwargs}))
        self.model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", jit_compile=small.JIT)
        for layer in self.layers:
            layer.statistics.damping.assign(DAMPING)

    def step(self, gate, draw=None):
        """What one step leaves of each layer, with gates set and the draws restarted if `draw` is given."""
        for number, layer in enumerate(self.layers):
            layer.statistics.gate.assign(gate)
            if draw is not None:
                layer.statistics.draw.assign([draw + number, 0])
        self.model.train_on_batch(self.x, self.y)
        return [[np.asarray(v, "float64") for v in layer.statistics.averages] for layer in self.layers]

    def expected_rows(self):
        """`(a, g)` of each layer, for all examples."""
        batches = zip(self.layers, self.x, self.y, strict=True)
        return [reference.example_rows(*squared_error_gradient(*batch), len(self.x[0])) for batch in batches]


@pytest.fixture(scope="module")
def observed():
    return Observed()


def check_interpolated(found, a, g, residual=True):
    """One group's rows and weights, and that nothing else is kept."""
    rows, gradients, weights, damping = found
    q = reference.kernel(a, g)
    _, chosen = reference.pivoted_cholesky(q, RANK)
    assert damping == DAMPING
    close(rows, a[chosen], 1e-5)
    close(gradients, g[chosen], 1e-5)
    close(weights, reference.row_weights(q, chosen, DAMPING, residual), 1e-3)
    assert np.linalg.eigvalsh(weights).min() >= 1 - 1e-5


def test_a_gate_of_two_interpolates(observed):
    for found, rows in zip(observed.step(KID), observed.expected_rows(), strict=True):
        for group in range(len(rows[0])):
            check_interpolated([t[group] for t in found], *(side[group] for side in rows))


def test_interpolation_follows_the_damping():
    observed = Observed(mode="kid")
    before = observed.step(KID)
    for layer in observed.layers:
        layer.statistics.damping.assign(4.0)
    for found, old, rows in zip(observed.step(KID), before, observed.expected_rows(), strict=True):
        np.testing.assert_array_equal(found[0], old[0])
        q = reference.kernel(*(side[0] for side in rows))
        _, chosen = reference.pivoted_cholesky(q, RANK)
        assert np.all(found[3] == 4.0)
        close(found[2][0], reference.row_weights(q, chosen, 4.0), 1e-4)
        assert error(found[2][0], old[2][0]) > 1e-4


def test_interpolation_without_the_residual():
    observed = Observed(mode="kid", residual=False)
    for found, rows in zip(observed.step(KID), observed.expected_rows(), strict=True):
        for group in range(len(rows[0])):
            check_interpolated([t[group] for t in found], *(side[group] for side in rows), residual=False)


def source(found, a, g):
    """Which examples the kept rows of one group are, and their weights."""
    which = [int(np.argmin(np.abs(a - row).sum(axis=1))) for row in found[0]]
    close(found[0], a[which], 1e-5)
    roots = np.sum(found[1] * g[which], axis=1) / np.sum(g[which] ** 2, axis=1)
    close(found[1], roots[:, None] * g[which], 1e-5)
    return which, roots**2


def test_a_gate_of_one_samples(observed):
    for found, rows in zip(observed.step(KIS), observed.expected_rows(), strict=True):
        for group in range(len(rows[0])):
            of_group = [t[group] for t in found]
            which, weights = source(of_group, *(side[group] for side in rows))
            assert len(set(which)) == RANK
            assert weights.min() >= 1 - 1e-5
            np.testing.assert_array_equal(of_group[2], np.eye(RANK))


@pytest.mark.parametrize("sampling", ["priority", "replacement"])
def test_samples_are_unbiased(sampling, observed):
    """Averaged over draws, the block is that of all rows."""
    if sampling != "priority":
        observed = Observed(mode="kis", sampling=sampling)
    steps = [observed.step(KIS) for _ in range(250)]
    for number, (a, g) in enumerate(observed.expected_rows()):
        terms = [reference.terms(*(t[0] for t in step[number][:2])) for step in steps]
        blocks = np.stack([u.T @ u for u in terms])
        u = reference.terms(a[0], g[0])
        spread = np.linalg.norm(blocks.std(axis=0)) / np.sqrt(len(blocks))
        assert np.linalg.norm(blocks.mean(axis=0) - u.T @ u) <= 2 * spread
        assert spread < 0.1 * np.linalg.norm(u.T @ u)


def test_draws_differ_and_repeat(observed):
    first, second = observed.step(KIS, draw=40), observed.step(KIS)
    assert any(error(a[0], b[0]) > 0.01 for a, b in zip(first, second, strict=True))
    # An interpolation uses up a draw as well, so that switching shifts nothing.
    observed.step(KID)
    third = observed.step(KIS)
    for kind in (first, second, None, third):
        again = observed.step(KIS, *([40] if kind is first else []))
        if kind is not None:
            for found, expected in zip(again, kind, strict=True):
                for value, old in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(value, old)
    np.testing.assert_array_equal(np.asarray(observed.layers[0].statistics.draw), [40, 4])
    other = observed.step(KIS, draw=41)
    assert any(error(a[0], b[0]) > 0.01 for a, b in zip(first, other, strict=True))


def test_a_closed_gate_keeps_everything(observed):
    before = observed.step(KID, draw=3)
    after = observed.step(0.0)
    for found, old in zip(after, before, strict=True):
        for value, expected in zip(found, old, strict=True):
            np.testing.assert_array_equal(value, expected)
    for number, layer in enumerate(observed.layers):
        statistics = layer.statistics
        np.testing.assert_array_equal(np.asarray(statistics.draw), [3 + number, 1])
        assert float(statistics.damping) == DAMPING
        assert float(statistics.gate) == float(statistics.tallied("accepted")) == 0.0


@pytest.mark.parametrize("gate", [KIS, KID])
def test_as_many_examples_as_rank_are_all_kept(gate, observed):
    """Of a batch smaller than there is room for: rows of zeros are not drawn."""
    x, y = observed.x, observed.y
    try:
        observed.x, observed.y = [t[:RANK] for t in x], [t[:RANK] for t in y]
        for found, rows in zip(observed.step(gate), observed.expected_rows(), strict=True):
            which, weights = source([t[0] for t in found], *(side[0] for side in rows))
            assert set(which) == set(range(RANK))
            np.testing.assert_allclose(weights, 1, rtol=1e-5)
            np.testing.assert_allclose(found[2][0], np.eye(RANK), atol=1e-4)
    finally:
        observed.x, observed.y = x, y


def test_a_batch_that_is_not_finite_leaves_what_is_there(observed):
    before = observed.step(KID)
    x = observed.x
    try:
        observed.x = [np.where(np.arange(BATCH).reshape(-1, *(1,) * (t.ndim - 1)) == 2, np.nan, t) for t in x]
        for gate in (KID, KIS):
            for found, old in zip(observed.step(gate), before, strict=True):
                for value, expected in zip(found, old, strict=True):
                    np.testing.assert_array_equal(value, expected)
            assert all(float(layer.statistics.tallied("accepted")) == 0 for layer in observed.layers)
    finally:
        observed.x = x


def test_gradients_of_zero():
    """Nothing to choose by: indices are arbitrary, and all numbers finite."""
    layer = dense(2, use_bias=False)
    model = keras.Sequential([keras.Input((3,)), layer])
    keras_ngd.capture(model, paper.HyLo(batch_size=4, rank=2, steps_per_epoch=1))
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", jit_compile=small.JIT)
    x = draw(4, 3)
    y = x @ np.asarray(layer.kernel)
    for gate in (KID, KIS):
        layer.statistics.gate.assign(gate)
        model.train_on_batch(0 * x, 0 * y)
        a, g, weights, _ = (np.asarray(v)[0] for v in layer.statistics.averages)
        assert not a.any()
        assert not g.any()
        np.testing.assert_array_equal(weights, np.eye(2))
