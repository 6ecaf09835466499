"""Recurrent layers and wrappers against networks that compute the same in other words, and what of them is left alone."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ngd
from tf_tests import small
from tf_tests.layers.test_recurrent import EXAMPLES, normal, sequential
from tf_tests.layers.test_second_derivatives import PhysicsInformed
from tf_tests.reference.running import close
from tf_tests.small import JIT, array, assert_close, assert_same, captured, fit, kfac, weights

# In other words


class Unrolled(keras.Model):
    """A `SimpleRNN` as one dense layer that is called again and again."""

    def __init__(self, units):
        super().__init__()
        self.dense, self.head = layers.Dense(units, activation="tanh", name="dense"), layers.Dense(2, name="head")

    def call(self, x):
        h = ops.zeros_like(x[:, 0, :1]) * ops.zeros((1, self.dense.units))
        for t in range(x.shape[1]):
            h = self.dense(ops.concatenate([x[:, t], h], axis=1))
        return self.head(h)


def trained(model, x=None, steps=3, optimizer=None):
    """A model after some steps of KFAC."""
    x = normal(EXAMPLES, 3, 2) if x is None else x
    model(x)
    captured(model, optimizer or kfac())
    for seed in range(steps):
        model.train_on_batch(x, normal(EXAMPLES, *model(x).shape[1:], seed=seed))
    assert model.optimizer.factor_updates == steps
    return model


def test_it_takes_the_steps_of_the_unrolled_network():
    unrolled, model = Unrolled(3), sequential(layers.SimpleRNN(3, name="rnn"))
    unrolled(normal(EXAMPLES, 3, 2))
    cell = model.get_layer("rnn").cell
    stacked = np.concatenate([array(cell.kernel), array(cell.recurrent_kernel)])
    unrolled.dense.kernel.assign(stacked)
    unrolled.head.set_weights(model.get_layer("head").get_weights())
    trained(model), trained(unrolled)
    assert np.abs(array(unrolled.dense.kernel) - stacked).max() > 1e-3
    close(np.concatenate([array(cell.kernel), array(cell.recurrent_kernel)]), array(unrolled.dense.kernel), 1e-4)
    close(array(cell.bias), array(unrolled.dense.bias), 1e-4)
    close(array(model.get_layer("head").kernel), array(unrolled.head.kernel), 1e-4)


class Looping(layers.Layer):
    """A cell that is called by a layer which knows nothing of `RNN`."""

    def __init__(self, cell, **kwargs):
        super().__init__(**kwargs)
        self.cell = cell

    def build(self, shape):
        self.cell.build((shape[0], shape[2]))

    def call(self, x):
        states = self.cell.get_initial_state(batch_size=x.shape[0])
        for t in range(x.shape[1]):
            output, states = self.cell(x[:, t], states)
        return output


def same_weights(*models):
    for model in models[1:]:
        model.set_weights(models[0].get_weights())


def assert_same_training(first, second, **kwargs):
    same_weights(first, second)
    start = weights(first)
    first, second = trained(first, **kwargs), trained(second, **kwargs)
    assert all(np.any(start[path] != value) for path, value in weights(first).items())
    found = [{str(i): v for i, v in enumerate(weights(model).values())} for model in (first, second)]
    assert_close(*found, 2e-4)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "SimpleRNN"])
def test_a_cell_that_another_layer_calls_takes_the_same_steps(kind):
    cell = getattr(layers, f"{kind}Cell")(3)
    first, second = sequential(Looping(cell)), sequential(getattr(layers, kind)(3))
    assert_same_training(first, second)
    assert float(array(cell.statistics.tallied("calls"))) == 3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
def test_an_unrolled_loop_takes_the_same_steps(kind, masked):
    x = normal(EXAMPLES, 3, 2)
    x[1:, 1] = 0
    parts = [layers.Masking()] if masked else []
    models = [sequential(*parts, kind(3, unroll=unroll, go_backwards=True)) for unroll in (False, True)]
    assert_same_training(*models, x=x)


def test_both_ways_are_two_layers():
    both = sequential(layers.Bidirectional(layers.LSTM(3, return_sequences=True)))
    x = keras.Input((3, 2), batch_size=EXAMPLES)
    parts = [layers.LSTM(3, return_sequences=True, go_backwards=backwards) for backwards in (False, True)]
    h = layers.Concatenate()([parts[0](x), ops.flip(parts[1](x), axis=1)])
    parts.append(layers.Dense(2))
    apart = keras.Model(x, parts[2](h))
    within = [both.layers[0].forward_layer, both.layers[0].backward_layer, both.layers[1]]
    for one, other in zip(within, parts, strict=True):
        other.set_weights(one.get_weights())
    trained(both), trained(apart)
    assert all(type(layer) is keras_ngd.layers.LSTM for layer in within[:2])
    for one, other in zip(within, parts, strict=True):
        assert_close(*({str(i): v for i, v in enumerate(weights(layer).values())} for layer in (one, other)), 2e-4)


def test_stacked_cells_are_layers_on_top_of_each_other():
    stacked = sequential(layers.RNN([layers.LSTMCell(3), layers.GRUCell(2), layers.SimpleRNNCell(2)], name="layer"))
    apart = sequential(layers.LSTM(3, return_sequences=True), layers.GRU(2, return_sequences=True), layers.SimpleRNN(2))
    assert_same_training(stacked, apart)
    assert list(stacked.get_layer("layer").all_statistics()) == [
        "statistics",
        "cell_1_statistics",
        "cell_1_recurrent_statistics",
        "cell_2_statistics",
    ]


ROWS = {
    "sngd": lambda: keras_ngd.SNGD(batch_size=EXAMPLES, interval=1),
    "skfac": lambda: keras_ngd.SKFAC(batch_size=EXAMPLES, interval=1),
    "kfac-reduce": lambda: kfac(weight_sharing="reduce"),
}


@pytest.mark.parametrize("method", ROWS)
def test_steps_are_positions_to_methods_on_rows(method):
    """An affine cell whose recurrent kernel is zero is a dense layer on the sequence, which sees no state."""
    cell = layers.SimpleRNN(3, activation=None, use_bias=False, return_sequences=True, name="layer")
    model, dense = sequential(cell), sequential(layers.Dense(3, use_bias=False, name="layer"))
    model.get_layer("layer").cell.recurrent_kernel.assign(np.zeros((3, 3)))
    dense.get_layer("layer").kernel.assign(model.get_layer("layer").cell.kernel)
    dense.get_layer("head").set_weights(model.get_layer("head").get_weights())
    found = []
    for each in (model, dense):
        captured(each, ROWS[method]())
        gradients = small.gradients(each, normal(EXAMPLES, 3, 2), normal(EXAMPLES, 3, 2, seed=1))
        averages = [gradients[v.path] for v in each.get_layer("layer").statistics.averages]
        # A side may be kept as rows, of which there are as many as examples, or as their second moment.
        moments = [m if m.shape[1] == m.shape[2] else np.einsum("kni,knj->kij", m, m) for m in averages]
        found.append([moments[0][:, :2, :2], moments[1]])
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-5)


def test_a_dense_layer_distributed_over_time_is_one_on_the_sequence():
    distributed = sequential(layers.TimeDistributed(layers.Dense(3, activation="tanh")))
    assert_same_training(distributed, sequential(layers.Dense(3, activation="tanh")))


def test_a_model_distributed_over_time():
    inner = keras.Sequential([layers.Conv1D(2, 2, activation="tanh", name="inner"), layers.Flatten()])
    model = sequential(layers.TimeDistributed(inner), shape=(3, 4, 2))
    trained(model, normal(EXAMPLES, 3, 4, 2))
    assert float(array(inner.layers[0].statistics.tallied("calls"))) == 3
    assert float(array(inner.layers[0].statistics.tallied("examples"))) == 3 * EXAMPLES


# What is left alone, and what is not


def reasons(*parts, shape=(3, 2), **kwargs):
    """Why layers between the inputs and a dense layer are not captured, by path."""
    return keras_ngd.capture(sequential(*parts, shape=shape), kfac(), **kwargs).not_captured


@keras.saving.register_keras_serializable("keras_ngd_tests")
class Own(layers.RNN):
    """A user's own recurrent layer."""


@keras.saving.register_keras_serializable("keras_ngd_tests")
class OwnCell(layers.LSTMCell):
    """A user's own cell."""


def test_what_is_not_captured_says_why():
    def only(found):
        (reason,) = found.values()
        return reason

    convolutional = layers.ConvLSTM1D(2, 2)
    assert "convolutional LSTM" in only(reasons(convolutional, layers.Flatten(), shape=(3, 4, 2)))
    assert only(reasons(Own(layers.LSTMCell(2), name="own"))) == "inside Own 'own', which calls it in its own way"
    assert "a subclass of LSTMCell, which may compute something else" in only(reasons(layers.RNN(OwnCell(2))))
    assert only(reasons(layers.LSTM(2, name="skipped"), skip="skipped")) == "left out by `skip`"
    assert "maps it over steps of no fixed number" in only(
        reasons(layers.TimeDistributed(layers.Dense(2)), shape=(None, 2))
    )
    wrapped = reasons(layers.SpectralNormalization(layers.Dense(3, name="inside"), name="normal"))
    inside = next(reason for path, reason in wrapped.items() if path.endswith("inside"))
    assert inside == "inside SpectralNormalization 'normal', which calls it in its own way"
    shared = layers.LSTMCell(2)
    x = keras.Input((3, 2))
    h = layers.Concatenate()([layers.RNN(shared, name="one")(x), layers.RNN(shared, name="two")(x)])
    report = keras_ngd.capture(keras.Model(x, layers.Dense(2)(h)), kfac())
    assert report.not_captured == {"one": "shares its kernel with 'two'", "two": "shares its kernel with 'one'"}


def test_cells_of_a_user_follow_the_rule_of_the_rest_beside_captured_ones():
    model = sequential(layers.RNN([OwnCell(3), layers.GRUCell(2)], name="layer"))
    start = weights(model)
    trained(model)
    layer = model.get_layer("layer")
    assert list(layer.all_statistics()) == ["statistics", "recurrent_statistics"]
    assert all(np.any(start[path] != value) for path, value in weights(model).items())


def test_steps_of_no_fixed_number():
    model = sequential(layers.LSTM(3), shape=(None, 2))
    x = normal(EXAMPLES, 3, 2)
    assert_same_training(model, sequential(layers.LSTM(3)), x=x)


def test_a_captured_layer_takes_no_fused_loop_and_a_released_one_does():
    model = sequential(layers.GRU(3, name="layer"))
    layer = model.get_layer("layer")
    captured(model)
    assert layer.use_cudnn is False
    assert type(layer.cell) is keras_ngd.layers.GRUCell
    layer.use_cudnn = True
    assert layer.use_cudnn is False
    keras_ngd.release(model)
    assert layer.use_cudnn is True
    assert (type(layer), type(layer.cell)) == (layers.GRU, layers.GRUCell)


def test_a_derivative_in_the_loss_is_refused():
    inputs = keras.Input((4,))
    h = layers.LSTM(3, name="recurrent")(layers.Reshape((2, 2))(inputs))
    model = PhysicsInformed(keras.Model(inputs, layers.Dense(1, name="result")(h)))
    model(np.zeros((16, 4), "float32"))
    x, y = small.regression(16)
    with pytest.raises(ValueError, match=r"Layer '.*recurrent' was captured, and the loss contains a derivative"):
        fit(captured(model, skip="*result"), x, y[:, :1], batch_size=16)


def test_a_step_without_a_trace():
    if JIT:
        pytest.skip("JAX without jit is very slow, and TensorFlow's tapes are what is asked for")
    models = [sequential(layers.LSTM(3)) for _ in range(2)]
    same_weights(*models)
    for model, eager in zip(models, (False, True), strict=True):
        captured(model, run_eagerly=eager)
        model.train_on_batch(normal(EXAMPLES, 3, 2), normal(EXAMPLES, 2))
    assert_close(weights(models[1]), weights(models[0]), 1e-5)


def test_what_a_layer_computes_is_saved_where_its_factors_depend_on_it(tmp_path):
    model = sequential(layers.LSTM(3, dropout=0.5, implementation=1, name="layer"))
    x, y = normal(8, 3, 2), normal(8, 2)
    captured(model)
    fit(model, x, y, batch_size=EXAMPLES)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("layer").statistics.geometry.groups == 4
    # Keras does not save what a cell draws its dropout from.
    seeds = [[v for v in each.get_layer("layer").cell.variables if "seed" in v.path] for each in (loaded, model)]
    for variable, value in zip(*seeds, strict=True):
        variable.assign(array(value))
    for each in (loaded, model):
        fit(each, x, y, batch_size=EXAMPLES)
    assert_same(weights(loaded), weights(model))
