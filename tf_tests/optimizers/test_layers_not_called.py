"""Steps that do not reach a layer: a branch not taken, an expert that is off."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ngd
from tf_tests.optimizers.test_custom_steps import METHODS, OPTIMIZERS
from tf_tests.reference import kronecker, rows
from tf_tests.reference.running import close
from tf_tests.small import array, captured, compiled, kfac, regression

BATCH, DECAY = 8, 0.8


class Branch(layers.Layer):
    """A dense layer that is called where the flag says so."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4, name="dense")

    def build(self, *shapes):
        self.dense.build((None, 4))

    def call(self, x, flag):
        return ops.cond(ops.any(flag > 0), lambda: self.dense(x), lambda: x)


def network():
    inputs, flag = keras.Input((4,)), keras.Input((1,))
    hidden = Branch(name="branch")(inputs, flag)
    return keras.Model([inputs, flag], layers.Dense(4, name="outputs")(hidden))


def train(model, step, on):
    x, y = regression(BATCH * 8)
    batch = slice(BATCH * (step % 8), BATCH * (step % 8 + 1))
    model.train_on_batch([x[batch] * (1 + step / 10), np.full((BATCH, 1), float(on), "float32")], y[batch])
    return x[batch] * (1 + step / 10), y[batch]


def state(layer):
    return [array(v) for v in layer.statistics.weights if v.name != "gate"]


def factors(model, x, y):
    """`A` and `G` of the branch's layer and of the other, in float64."""
    w1, b1, w2, b2 = (array(v).astype("float64") for v in keras_ngd.trainable_weights(model))
    x = x.astype("float64")
    hidden = x @ w1 + b1
    outputs = 2 * (hidden @ w2 + b2 - y) / y.size
    rows_of = rows.dense_rows
    sides = [(rows.append_ones(rows_of(x)), outputs @ w2.T), (rows.append_ones(rows_of(hidden)), outputs)]
    return [(kronecker.input_factor(a), kronecker.output_factor(rows_of(g), BATCH)) for a, g in sides]


def test_averages_are_those_of_the_steps_that_called_the_layer():
    model = captured(network(), kfac(learning_rate=0.0, factor_decay=DECAY))
    branch, outputs = model.get_layer("branch").dense, model.get_layer("outputs")
    taken = np.random.default_rng(1).integers(0, 2, 14)
    assert taken[0] == 0  # the first opportunity is missed
    seen = []
    for step, on in enumerate(taken):
        before = state(branch)
        batch = train(model, step, on)
        if on:
            seen.append(factors(model, *batch)[0])
        else:
            for found, old in zip(state(branch), before, strict=True):
                np.testing.assert_array_equal(found, old)
    weights = DECAY ** np.arange(len(seen) - 1, -1, -1)
    weights /= weights.sum()
    for i, average in enumerate(branch.statistics.averages):
        close(average, sum(w * sides[i] for w, sides in zip(weights, seen, strict=True)), 1e-5)
    assert model.optimizer.factor_updates == len(taken)
    assert model.optimizer.skipped_statistics == model.optimizer.distorted_statistics == 0
    # The layer that is always called goes by all steps.
    assert array(model.optimizer.arrivals.updates).tolist() == [sum(taken), len(taken)]
    assert float(outputs.statistics.gate) < float(branch.statistics.gate) < 1


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_a_layer_changes_that_is_not_called(method):
    model = captured(network(), OPTIMIZERS[method](learning_rate=0.01))
    branch, optimizer = model.get_layer("branch").dense, model.optimizer
    untouched, kernel = state(branch), array(branch.kernel)
    for step in range(3):
        train(model, step, False)
    # Refreshes went by that knew nothing of it: its gradient is left as it is.
    assert optimizer.inverse_updates == 3
    [group] = optimizer.layout.groups
    number = [block.layer for block in group.blocks].index(branch.path)
    initial = keras_ngd.optimizers.blocks.Group(group.blocks)
    curvature = optimizer.make_curvature(initial)
    curvature.build(lambda shape, initializer, dtype, name: keras.Variable(initializer, shape, dtype))
    for found, first in zip(group.curvature.variables, curvature.variables, strict=True):
        np.testing.assert_array_equal(array(found)[number], array(first)[number])
        assert not np.array_equal(array(found)[1 - number], array(first)[1 - number])
    for found, old in zip(state(branch), untouched, strict=True):
        np.testing.assert_array_equal(found, old)
    np.testing.assert_array_equal(array(branch.kernel), kernel)

    train(model, 3, True)
    known = state(branch)
    assert not np.array_equal(known[0], untouched[0])
    for found, first in zip(group.curvature.variables, curvature.variables, strict=True):
        assert not np.array_equal(array(found)[number], array(first)[number])
    for step in range(4, 6):
        train(model, step, False)
    for found, old in zip(state(branch), known, strict=True):
        np.testing.assert_array_equal(found, old)
    assert optimizer.skipped_statistics == optimizer.skipped_steps == optimizer.distorted_statistics == 0
    assert float(branch.statistics.gate) > 0


def test_a_plain_optimizer_trains_a_captured_model_with_a_branch():
    losses = []
    for capture in (False, True):
        keras.utils.set_random_seed(0)
        model = network()
        if capture:
            keras_ngd.capture(model, kfac())
        compiled(model, keras.optimizers.SGD(0.1))
        for step in range(6):
            train(model, step, step % 2)
        losses.append([array(v) for v in keras_ngd.trainable_weights(model)])
    for plain, found in zip(*losses, strict=True):
        close(found, plain, 1e-6)
