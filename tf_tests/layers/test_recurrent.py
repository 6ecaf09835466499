"""Recurrent layers: their factors, gradients and steps against back-propagation through time in float64."""

import keras
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from keras import layers, ops

import keras_ngd
from tf_tests import paper, small
from tf_tests.reference import kronecker, recurrent, rows
from tf_tests.reference.running import close, drawn
from tf_tests.reference.training import NaturalGradientTraining
from tf_tests.small import JIT, array, captured, kfac

pytestmark = pytest.mark.neutral

EXAMPLES = 4
STEP = {"learning_rate": 0.1, "damping": 0.03, "momentum": 0.0, "kl_clip": None, "damping_mode": "pi"}


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype("float32")


def sequential(*parts, shape=(3, 2)):
    return keras.Sequential([keras.Input(shape, batch_size=EXAMPLES), *parts, layers.Dense(2, name="head")])


# Against the reference

KINDS = {
    "simple_rnn": (layers.SimpleRNN, {}, recurrent.SimpleRNN()),
    "lstm": (layers.LSTM, {}, recurrent.LSTM()),
    "gru": (layers.GRU, {}, recurrent.GRUAfter()),
    "gru_reset_before": (layers.GRU, {"reset_after": False}, recurrent.GRUBefore()),
}


@st.composite
def cases(draw):
    return {
        "steps": draw(st.integers(1, 4)),
        "inputs": draw(st.integers(1, 3)),
        "units": draw(st.integers(1, 3)),
        "masked": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
        "use_bias": draw(st.booleans()),
        "return_sequences": draw(st.booleans()),
        "go_backwards": draw(st.booleans()),
        "unroll": draw(st.booleans()),
    }


def case(**arguments):
    shape = {"steps": 4, "inputs": 2, "units": 3, "masked": False, "seed": 0, "use_bias": True}
    return {**shape, "return_sequences": False, "go_backwards": False, "unroll": False, **arguments}


def network(kind, case):
    """A Keras model of one recurrent layer, `layer`, and of nothing else."""
    layer, arguments, _ = KINDS[kind]
    options = {name: case[name] for name in ("use_bias", "return_sequences", "go_backwards", "unroll")}
    x, mask = keras.Input((case["steps"], case["inputs"])), keras.Input((case["steps"],), dtype="bool")
    layer = layer(case["units"], name="layer", bias_initializer=drawn, **arguments, **options)
    return keras.Model([x, mask], layer(x, mask=mask if case["masked"] else None))


def data(case):
    """`[x, mask]` and targets."""
    shape = (EXAMPLES, case["steps"])
    mask = normal(*shape, seed=case["seed"]) > 0
    # One example with no step that is seen, where there are several.
    mask[1:, case["steps"] // 2] = True
    y = normal(*shape, case["units"], seed=case["seed"] + 1)
    return [normal(*shape, case["inputs"], seed=case["seed"]), mask], (y if case["return_sequences"] else y[:, 0])


def expected(kind, case, weights, batch):
    """Rows of each matrix by the reference: of `(x, mask)` and targets, for the mean squared error."""
    (x, mask), y = batch
    x, mask, reference = x.astype("float64"), mask if case["masked"] else None, KINDS[kind][2]
    if case["go_backwards"]:
        x, mask = x[:, ::-1], None if mask is None else mask[:, ::-1]
    states, kept = recurrent.forward(reference, weights, x, mask=mask)
    outputs = np.stack([state["h"] for state in states], axis=1)
    upstream = np.zeros_like(outputs)
    if case["return_sequences"]:
        upstream[:] = 2 * (outputs - y) / y.size
    else:
        upstream[:, -1] = 2 * (outputs[:, -1] - y) / y.size
    found, _ = recurrent.back(reference, weights, kept, upstream)
    if case["use_bias"] and kind != "gru":
        found = {name: (rows.append_ones(a), ghat) for name, (a, ghat) in found.items()}
    return found, mask


def float64_weights(layer):
    """A recurrent layer's weights as the reference takes them."""
    cell = layer.cell
    two = getattr(cell, "reset_after", False)
    columns = cell.kernel.shape[1]
    bias = np.zeros((2, columns) if two else (columns,)) if cell.bias is None else array(cell.bias)
    found = {"kernel": array(cell.kernel), "recurrent_kernel": array(cell.recurrent_kernel), "bias": bias}
    return {name: value.astype("float64") for name, value in found.items()}


def matrices(layer):
    """The matrices that a layer's weights are, by part."""
    return {
        name: array(s.geometry.to_matrix([ops.convert_to_tensor(v) for v in s.parameters()])).astype("float64")
        for name, s in layer.all_statistics().items()
    }


def prepared(kind, case):
    """A captured model of a case, its batch, its rows by the reference with a mask or None, and its optimizer."""
    keras.utils.set_random_seed(case["seed"])
    model, batch = network(kind, case), data(case)
    optimizer = paper.KFAC(factor_interval=1, inverse_interval=1, **STEP)
    keras_ngd.capture(model, optimizer)
    return model, batch, *expected(kind, case, float64_weights(model.get_layer("layer")), batch), optimizer


def check(kind, case):
    """Factors and gradients."""
    model, batch, by_matrix, mask, _ = prepared(kind, case)
    found = small.gradients(model, *batch)
    parts = model.get_layer("layer").all_statistics()
    assert set(by_matrix) == set(parts)
    for name, (a, ghat) in by_matrix.items():
        # With an open gate, what arrives is what this batch says.
        found_a, found_g = (found[average.path] for average in parts[name].averages)
        close(found_a, kronecker.input_factor(a, mask=mask), 1e-5)
        close(found_g, kronecker.output_factor(ghat, EXAMPLES), 1e-5)
        of_parameters = [ops.convert_to_tensor(found[p.path]) for p in parts[name].parameters()]
        v = array(parts[name].geometry.to_matrix(of_parameters))
        close(v, np.einsum("knti,knto->kio", a, ghat), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_kfac(kind):
    model, batch, by_matrix, mask, optimizer = prepared(kind, case(masked=True))
    layer = model.get_layer("layer")
    before = matrices(layer)
    small.compiled(model, optimizer).train_on_batch(*batch)
    # Rows that are hidden are zero, and the mean is over those that are not.
    shown, share = mask[None, :, :, None], np.sqrt(mask.size / mask.sum())
    observed = {name: (a * shown * share, ghat) for name, (a, ghat) in by_matrix.items()}
    v = {name: np.einsum("knti,knto->kio", a, ghat) for name, (a, ghat) in by_matrix.items()}
    after = dict(before)
    NaturalGradientTraining(**STEP).apply(after, v, observed, EXAMPLES)
    for name, matrix in matrices(layer).items():
        assert np.abs(matrix - before[name]).max() > 1e-3
        close(matrix, after[name], 1e-5)


few = settings(max_examples=4 if keras.backend.backend() == "tensorflow" else 3)


@few
@given(cases())
@example(case(masked=True, return_sequences=True))
def test_lstm(case):
    check("lstm", case)


@few
@given(cases())
@example(case(masked=True, go_backwards=True))
def test_gru(case):
    check("gru", case)


@few
@given(cases())
@example(case(masked=True, unroll=True))
def test_gru_that_resets_before(case):
    check("gru_reset_before", case)


@few
@given(cases())
@example(case(masked=True))
def test_simple_rnn(case):
    check("simple_rnn", case)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_what_keras_computes(kind):
    layer, arguments, reference = KINDS[kind]
    layer = layer(3, return_sequences=True, bias_initializer=drawn, **arguments)
    x, mask = normal(EXAMPLES, 5, 2), normal(EXAMPLES, 5, seed=1) > 0
    found = ops.convert_to_numpy(layer(x, mask=mask))
    states, _ = recurrent.forward(reference, float64_weights(layer), x.astype("float64"), mask=mask)
    close(found, np.stack([state["h"] for state in states], axis=1), 1e-5)


def test_states_that_stay_are_the_rows_of_the_next_batch():
    model = sequential(layers.LSTM(3, stateful=True, name="layer"))
    layer, x = model.get_layer("layer"), normal(EXAMPLES, 3, 2)
    captured(model, kfac(learning_rate=0.0, factor_decay=0.0))
    w, kind = float64_weights(layer), recurrent.LSTM()
    for step in range(2):
        # Not what the reference has left: on JAX, Keras's compiled steps lose the states.
        start = {name: array(v).astype("float64") for name, v in zip("hc", layer.states, strict=True)}
        if step and not JIT:
            assert np.abs(start["h"]).min() > 0
        model.train_on_batch(x, normal(EXAMPLES, 2))
        _, kept = recurrent.forward(kind, w, x.astype("float64"), start)
        a, _ = recurrent.back(kind, w, kept, np.zeros((EXAMPLES, 3, 3)))[0]["statistics"]
        close(array(layer.statistics.averages[0]), kronecker.input_factor(rows.append_ones(a)), 1e-5)


# Dropout


DROPPING = {
    "simple_rnn": lambda **kwargs: layers.SimpleRNN(3, dropout=0.5, recurrent_dropout=0.5, **kwargs),
    "lstm": lambda **kwargs: layers.LSTM(3, dropout=0.5, **kwargs),
    "lstm-gates": lambda **kwargs: layers.LSTM(3, dropout=0.5, recurrent_dropout=0.5, **kwargs),
    "gru": lambda **kwargs: layers.GRU(3, dropout=0.5, **kwargs),
    "gru-gates": lambda **kwargs: layers.GRU(3, dropout=0.5, recurrent_dropout=0.5, **kwargs),
    "gru-before": lambda **kwargs: layers.GRU(3, dropout=0.5, recurrent_dropout=0.5, reset_after=False, **kwargs),
}


@pytest.mark.parametrize("kind", DROPPING)
def test_rows_are_what_is_left_after_dropout(kind):
    """Of one example and one step, `V V^T = A |g|^2` for each gate that sees inputs of its own, with the dropped entries zero."""
    x, start = keras.Input((1, 6), batch_size=1), keras.Input((3,), batch_size=1)
    layer = DROPPING[kind](seed=1)
    states = [start, start] if "lstm" in kind else [start]
    model = keras.Model([x, start], layer(x, initial_state=states, training=True))
    batch = [normal(1, 1, 6), normal(1, 3)]
    generators = [v for v in layer.cell.variables if "seed" in v.path]
    for variable in generators:
        variable.assign(ops.convert_to_tensor([1, 0], variable.dtype))
    plain = array(model(batch, training=True))
    keras_ngd.capture(model, kfac())
    for variable in generators:
        variable.assign(ops.convert_to_tensor([1, 0], variable.dtype))
    close(array(model(batch, training=True)), plain, 1e-5)
    gradients, dropped = small.gradients(model, batch, normal(1, 3, seed=2)), 0
    for statistics in layer.all_statistics().values():
        of_parameters = [ops.convert_to_tensor(gradients[p.path]) for p in statistics.parameters()]
        v = array(statistics.geometry.to_matrix(of_parameters)).astype("float64")
        a, g = (gradients[average.path].astype("float64") for average in statistics.averages)
        close(np.einsum("kio,kjo->kij", v, v), a * np.trace(g, axis1=1, axis2=2)[:, None, None], 1e-5)
        dropped += np.sum(np.diagonal(a, axis1=1, axis2=2) == 0)
        assert statistics.geometry.groups == {"lstm-gates": 4, "gru-gates": 3, "gru-before": 3}.get(kind, 1)
    assert dropped > 0
