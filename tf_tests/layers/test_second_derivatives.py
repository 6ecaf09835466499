"""A derivative of a captured network inside of the loss is refused; what takes first derivatives alone is not."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ngd
from tf_tests import small

TENSORFLOW = keras.backend.backend() == "tensorflow"

METHODS = {
    "KFAC": lambda: small.kfac(learning_rate=0.01),
    "THOR": lambda: keras_ngd.THOR(0.01, 0.03),
    "EKFAC": lambda: keras_ngd.EKFAC(0.01, 0.03),
    "EigenAdam": lambda: keras_ngd.EigenAdam(0.01),
    "SKFAC": lambda: keras_ngd.SKFAC(0.01, 0.03, batch_size=16),
    "SNGD": lambda: keras_ngd.SNGD(0.01, 0.03, batch_size=16),
    "HyLo": lambda: keras_ngd.HyLo(0.01, 0.03, batch_size=16, steps_per_epoch=2),
}


def input_gradient(network, x):
    """The network's results on `x`, and their derivatives."""
    if TENSORFLOW:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            results = network(x)
        return results, tape.gradient(results, x)
    import jax

    return network(x), jax.grad(lambda x: ops.sum(network(x)))(x)


class PhysicsInformed(keras.Model):
    """The residual of `du/dx = -u` is a part of the loss."""

    def __init__(self, network, head=None):
        super().__init__()
        self.network, self.head = network, head

    def call(self, x):
        u, slope = input_gradient(self.network, x)
        self.add_loss(ops.mean(ops.square(ops.sum(slope, axis=1, keepdims=True) + u)))
        return u if self.head is None else self.head(u)


class Penalized(PhysicsInformed):
    """The length of the critic's derivative at points between examples is to be one."""

    def call(self, x):
        values = self.network(x)
        _, slope = input_gradient(self.network, 0.5 * (x + ops.flip(x, axis=0)))
        self.add_loss(10.0 * ops.mean(ops.square(ops.sqrt(ops.sum(ops.square(slope), axis=1) + 1e-6) - 1.0)))
        return values if self.head is None else self.head(values)


def network(activation="tanh"):
    inputs = keras.Input((4,))
    hidden = layers.Dense(4, activation=activation, name="hidden")(inputs)
    return keras.Model(inputs, layers.Dense(1, name="result")(hidden), name="network")


def built(kind, *args):
    model = kind(*args)
    model(np.zeros((16, 4), "float32"))
    return model


X, Y = small.regression(32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [PhysicsInformed, Penalized])
def test_a_derivative_in_the_loss_is_refused_by_the_name_of_the_layer(kind, method):
    model = small.captured(built(kind, network()), METHODS[method]())
    with pytest.raises(ValueError, match=r"Layer '.*hidden' was captured, and the loss contains a derivative .* skip="):
        small.fit(model, X, Y[:, :1], batch_size=16)


@pytest.mark.skipif(not TENSORFLOW, reason="JAX's steps are always compiled in these tests")
def test_it_is_refused_in_an_eager_step():
    model = small.captured(built(Penalized, network()), run_eagerly=True)
    with pytest.raises(ValueError, match="hidden' was captured, and the loss contains a derivative"):
        small.fit(model, X, Y[:, :1], batch_size=16)


def test_it_is_refused_where_the_derivative_of_the_result_is_constant():
    """The derivative by a linear layer's result is one, but what comes of it depends on the layer's kernel."""
    model = small.captured(built(PhysicsInformed, network()), skip="hidden")
    with pytest.raises(ValueError, match="result' was captured"):
        small.fit(model, X, Y[:, :1], batch_size=16)


@pytest.mark.parametrize("kind", [PhysicsInformed, Penalized])
def test_without_the_layers_that_are_differentiated_it_trains(kind):
    model = small.captured(built(kind, network(), layers.Dense(4, name="head")), skip=["hidden", "result"])
    losses = small.fit(model, X, Y, batch_size=16, epochs=8).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    averages = model.head.statistics.averages
    assert all(np.trace(small.array(average)[0]) > 0 for average in averages)


def test_derivatives_by_the_inputs_are_the_plain_networks():
    plain = network()
    captured = keras.models.clone_model(plain)
    captured.set_weights(plain.get_weights())
    small.captured(captured)
    expected, found = (ops.convert_to_numpy(input_gradient(m, ops.convert_to_tensor(X))[1]) for m in (plain, captured))
    np.testing.assert_array_equal(found, expected)


class Watching(PhysicsInformed):
    """The derivative is computed, but is no part of the loss."""

    def call(self, x):
        u, slope = input_gradient(self.network, x)
        self.add_loss(0.0 * ops.sum(ops.stop_gradient(slope)))
        return u


def test_a_derivative_that_the_loss_does_not_depend_on_is_not_refused():
    model, alone = built(Watching, network()), network()
    alone.set_weights(model.network.get_weights())
    for each in (small.captured(model), small.captured(alone)):
        small.fit(each, X, Y[:, :1], batch_size=16, epochs=2)
    small.assert_close(small.weights(model), small.weights(alone))
    small.assert_close(small.statistics(model), small.statistics(alone))


@pytest.mark.skipif(not TENSORFLOW, reason="tapes are TensorFlow's")
def test_a_persistent_tape_takes_several_first_derivatives():
    import tensorflow as tf

    model = small.captured(network())
    with tf.GradientTape(persistent=True) as tape:
        result = model(X)
        losses = [tf.reduce_mean((result - Y[:, :1]) ** 2), tf.reduce_mean(result**2)]
        inside = tape.gradient(losses[0], model.trainable_variables)
    outside = [tape.gradient(loss, model.trainable_variables) for loss in losses]
    for a, b in zip(inside, outside[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(gradient is not None for gradient in outside[1])


@pytest.mark.skipif(TENSORFLOW, reason="Keras's RematScope does not work in graphs of TensorFlow")
def test_layers_computed_again_in_the_backward_pass_are_not_refused():
    with keras.RematScope(mode="full"):
        model = network()
    small.captured(model)
    small.fit(model, X, Y[:, :1], batch_size=16)
    averages = [value for value in small.statistics(model).values() if value.ndim == 3]
    assert len(averages) == 4
    assert all(np.trace(average[0]) > 0 for average in averages)


@pytest.mark.skipif(not TENSORFLOW, reason="SavedModel is TensorFlow's")
def test_the_derivative_of_an_exported_model_is_the_captured_ones(tmp_path):
    import tensorflow as tf

    model = small.captured(network())
    small.fit(model, X, Y[:, :1], batch_size=16)
    model.export(str(tmp_path), verbose=False)
    loaded = tf.saved_model.load(str(tmp_path))
    found, expected = (input_gradient(f, tf.constant(X))[1] for f in (loaded.serve, model))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
