"""Factors as rows: multiplied out, they are KFAC's factors of a batch, or unbiased estimates of them."""

import keras
import numpy as np
import pytest

import keras_ngd
from keras_ngd.statistics.factor_rows import are_rows
from tf_tests import paper, small
from tf_tests.reference import kronecker
from tf_tests.reference.running import close, error
from tf_tests.statistics.test_kronecker import branches, convolution, dense, draw, squared_error_gradient

BATCH = 6

# By what is kept of the input and of the gradient: rows where a batch has fewer than the side has columns.
CAPTURED = {
    "rows and factor": lambda: (dense(4, activation="tanh"), (9,)),
    "factor and rows": lambda: (dense(8), (3,)),
    "rows of a sequence": lambda: (dense(7, activation="tanh"), (3, 8)),
    "convolution": lambda: (convolution(2, 3, 3, padding="same", activation="tanh"), (4, 5, 2)),
    "grouped": lambda: (convolution(1, 16, 2, groups=2, strides=2, use_bias=False), (7, 8)),
}


def skfac(**kwargs):
    return paper.SKFAC(**{"learning_rate": 0.0, "interval": 1, "batch_size": BATCH, **kwargs})


def observe(model, x, y, optimizer):
    """Captures `model` for `optimizer` and takes one step of SGD that changes nothing."""
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", jit_compile=small.JIT)
    model.train_on_batch(x, y)


def factors(layer):
    """`A` and `G` as the rows say."""
    sides = layer.statistics.scaled([keras.ops.convert_to_tensor(v) for v in layer.statistics.averages])
    arrays = [(np.asarray(side, "float64"), are_rows(side)) for side in sides]
    return [np.swapaxes(side, 1, 2) @ side if rows else side for side, rows in arrays]


def check_factors(layer, a, ghat, sharing, divisor=BATCH, tolerance=1e-5):
    found = factors(layer)
    close(found[0], kronecker.input_factor(a, sharing), tolerance)
    close(found[1], kronecker.output_factor(ghat, divisor, sharing), tolerance)


def sides(layer):
    return tuple(are_rows(v) for v in layer.statistics.averages[:2])


def test_rows_are_reduced_factors():
    model, layers, x, y = branches(CAPTURED)
    observe(model, x, y, skfac())
    assert [sides(layer) for layer in layers] == [
        (True, False),
        (False, True),
        (True, True),
        (True, False),
        (True, True),
    ]
    for layer, *batch in zip(layers, x, y, strict=True):
        check_factors(layer, *squared_error_gradient(layer, *batch), "reduce")


@pytest.mark.parametrize("positions", [6, 9])
def test_all_positions_are_the_expanded_factors(positions):
    """Of convolutions; what is not a convolution is reduced. Room for more positions than there are stays empty."""
    cases = {
        "convolution": lambda: (convolution(2, 3, 3, padding="same", activation="tanh"), (2, 3, 2)),
        "wide": lambda: (convolution(2, 21, 3, padding="same", use_bias=False), (2, 3, 2)),
        "sequence": CAPTURED["rows of a sequence"],
    }
    model, layers, x, y = branches(cases)
    x, y = [t[:2] for t in x], [t[:2] for t in y]
    observe(model, x, y, skfac(batch_size=2, convolution="subsample", positions=positions))
    assert [sides(layer)[0] for layer in layers] == [True, positions == 6, True]
    for layer, sharing, *batch in zip(layers, ("expand", "expand", "reduce"), x, y, strict=True):
        check_factors(layer, *squared_error_gradient(layer, *batch), sharing, divisor=2)


def test_some_positions_are_unbiased():
    """Averaged over draws, `A` and `G` approach the factors of all positions, entry by entry to five standard errors."""
    layer = convolution(2, 3, 3, padding="same", activation="tanh")
    model = keras.Sequential([keras.Input((3, 4, 2)), layer])
    x, y = draw(2, 3, 4, 2), draw(2, 3, 4, 3)
    observe(model, x, y, skfac(batch_size=2, convolution="subsample", positions=3))
    a, ghat = squared_error_gradient(layer, x, y)
    expected = kronecker.input_factor(a), kronecker.output_factor(ghat, 2)
    found = []
    for _ in range(250):
        model.train_on_batch(x, y)
        found.append(factors(layer))
    for draws, factor in zip(zip(*found, strict=True), expected, strict=True):
        draws = np.stack(draws)
        assert error(draws[0], factor) > 0.01
        spread = draws.std(axis=0) / np.sqrt(len(draws))
        assert np.all(np.abs(draws.mean(axis=0) - factor) <= 5 * spread + 1e-6 * np.abs(factor).max())
        close(draws.mean(axis=0), factor, 0.1)


def test_positions_are_distinct_and_drawn_for_each_example():
    """Told by a channel that says which position it is."""
    layer = convolution(1, 2, 1, use_bias=False)
    model = keras.Sequential([keras.Input((5, 40)), layer])
    x = np.zeros((BATCH, 5, 40), "float32")
    x[:, np.arange(5), np.arange(5)] = 1
    observe(model, x, draw(BATCH, 5, 2), skfac(convolution="subsample", positions=3))
    first = np.asarray(layer.statistics.averages[0])[0].reshape(BATCH, 3, 40).argmax(axis=2)
    assert all(len(set(positions)) == 3 for positions in first.tolist())
    assert len({tuple(sorted(positions)) for positions in first.tolist()}) > 1


def test_draws_differ_from_batch_to_batch_and_repeat():
    layer = convolution(1, 3, 2)
    model = keras.Sequential([keras.Input((9, 10)), layer])
    x, y = draw(BATCH, 9, 10), draw(BATCH, 8, 3)
    observe(model, x, y, skfac(convolution="subsample", positions=2))

    def another(first=None, open_gate=1.0):
        if first is not None:
            layer.statistics.draw.assign(first)
        layer.statistics.gate.assign(open_gate)
        model.train_on_batch(x, y)
        return np.asarray(layer.statistics.averages[0])

    one, two = another([7.0, 0.0]), another()
    assert error(one, two) > 0.01
    np.testing.assert_array_equal(np.asarray(layer.statistics.draw), [7, 2])
    np.testing.assert_array_equal(another(open_gate=0.0), two)
    np.testing.assert_array_equal(np.asarray(layer.statistics.draw), [7, 2])
    np.testing.assert_array_equal(another([7.0, 0.0]), one)
    np.testing.assert_array_equal(another(), two)
    assert error(another([8.0, 0.0]), one) > 0.01


def test_history():
    """Rows of the last batches, by age, and before there are as many, of those; a factor is an average of all."""
    layer, decay = dense(4), 0.5
    model = keras.Sequential([keras.Input((19,)), layer])
    optimizer = skfac(history=3, factor_decay=decay)
    small.captured(model, optimizer)
    assert sides(layer) == (True, False)
    history = []
    for i in range(5):
        x, y = draw(BATCH, 19, seed=i), draw(BATCH, 4, seed=10 + i)
        model.train_on_batch(x, y)
        a, ghat = squared_error_gradient(layer, x, y)
        history.append((kronecker.input_factor(a), kronecker.output_factor(ghat, BATCH)))
        a, g = (list(side) for side in zip(*history, strict=True))
        found = factors(layer)
        close(found[0], kronecker.running_average(a[-3:], decay), 1e-5)
        close(found[1], kronecker.running_average(g, decay), 1e-5)


def test_a_smaller_last_batch_is_exact():
    model, layers, x, y = branches({name: CAPTURED[name] for name in ("rows of a sequence", "grouped")})
    keras_ngd.capture(model, skfac(convolution="subsample", positions=3))
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", jit_compile=small.JIT)
    small.fit(model, [np.concatenate([t, t[:4]]) for t in x], [np.concatenate([t, t[:4]]) for t in y], batch_size=BATCH)
    for layer, sharing, *batch in zip(layers, ("reduce", "expand"), x, y, strict=True):
        a, ghat = squared_error_gradient(layer, *(t[:4] for t in batch))
        check_factors(layer, a, ghat, sharing, divisor=4)


def test_float64(float64):
    layer, batch = convolution(1, 4, 3), 8
    model = keras.Sequential([keras.Input((4, 3)), layer])
    # Keras on JAX rounds the loss's divisor in float32, so it is a power of two here.
    x, y = draw(batch, 4, 3).astype("float64"), draw(batch, 2, 4).astype("float64")
    observe(model, x, y, skfac(batch_size=batch))
    assert sides(layer) == (True, False)
    check_factors(layer, *squared_error_gradient(layer, x, y), "reduce", divisor=batch, tolerance=1e-12)
