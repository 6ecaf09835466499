"""Layers that are called inside of loops and maps: the right statistics, or an error that says what to do."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ngd
from keras_ngd.backend import surroundings
from tf_tests.optimizers.test_custom_steps import METHODS, OPTIMIZERS
from tf_tests.reference import kronecker, rows
from tf_tests.reference.running import close
from tf_tests.small import JIT, array, captured, kfac

BATCH, TIME, WIDTH = 6, 5, 4


class Inside(layers.Layer):
    """A dense layer called by `how(layer, x)`."""

    def __init__(self, how, **kwargs):
        super().__init__(**kwargs)
        self.how, self.dense = how, layers.Dense(WIDTH, name="dense")

    def build(self, shape):
        self.dense.build((None, WIDTH))

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        return self.how(self.dense, x)


def by_scan(layer, x):
    """Over time, each step on the whole batch."""
    # Keras's own for TensorFlow takes results of the carry's shape alone.
    _, y = ops.scan(lambda carry, x: (carry, layer(x)), ops.zeros_like(x[:, 0]), ops.transpose(x, (1, 0, 2)))
    return ops.transpose(y, (1, 0, 2))


def by_fori_loop(layer, x):
    """The same with a number of steps, the outputs added."""

    def body(i, total):
        return total + layer(ops.take(x, i, axis=1))

    total = ops.fori_loop(0, TIME, body, ops.zeros_like(x[:, 0]))
    return ops.repeat(total[:, None] / TIME, TIME, axis=1)


def by_map(layer, x):
    """Each example for itself."""
    return ops.map(lambda example: layer(example), x)


def by_vectorized_map(layer, x):
    return ops.vectorized_map(lambda example: layer(example), x)


def network(how):
    inputs = keras.Input((TIME, WIDTH), batch_size=BATCH)
    return keras.Model(inputs, layers.Dense(WIDTH, name="outputs")(Inside(how, name="inside")(inputs)))


def data():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(BATCH, TIME, WIDTH)).astype("float32") for _ in range(2)]


def train(how, optimizer, steps=1, **kwargs):
    model = captured(network(how), optimizer, **kwargs)
    x, y = data()
    for _ in range(steps):
        model.train_on_batch(x, y)
    return model


def test_a_loop_over_time_counts_like_positions():
    model = train(by_scan, kfac(learning_rate=0.0, losses_per_example=1), steps=2)
    layer = model.get_layer("inside").dense
    x, y = data()
    w1, b1, w2, b2 = (array(v).astype("float64") for v in keras_ngd.trainable_weights(model))
    upstream = (2 * ((x @ w1 + b1) @ w2 + b2 - y) / y.size) @ w2.T
    a, ghat = rows.append_ones(rows.dense_rows(x.astype("float64"))), rows.dense_rows(upstream)
    calls = layer.statistics.tallied("calls")
    assert float(calls) == TIME
    averages = [keras.ops.convert_to_tensor(v) for v in layer.statistics.averages]
    found = model.optimizer.curvature_input(layer.statistics, averages, calls)
    close(found[0], kronecker.input_factor(a), 1e-5)
    close(found[1], kronecker.output_factor(ghat, BATCH), 1e-5)


LOOPS = [by_scan] if not JIT else [by_scan, by_fori_loop]


@pytest.mark.parametrize("how", LOOPS)
@pytest.mark.parametrize("method", ["skfac", "hylo"])
def test_loops_are_refused_where_calls_cannot_be_put_together(method, how):
    with pytest.raises(ValueError, match=r"'inside/dense' is called several times .* skip=\['inside/dense'\]"):
        train(how, OPTIMIZERS[method](), jit_compile=JIT)


@pytest.mark.parametrize("how", [by_map, by_vectorized_map])
@pytest.mark.parametrize("method", METHODS)
def test_maps_over_examples_are_refused(method, how):
    with pytest.raises(ValueError, match=r"'inside/dense'.*(ops.map|ops.vectorized_map).*skip=\['inside/dense'\]"):
        train(how, OPTIMIZERS[method]())
    train(how, OPTIMIZERS[method](), skip="inside/dense")


@pytest.mark.parametrize("how", [by_map, by_vectorized_map])
def test_maps_are_for_predicting(how):
    model = network(how)
    x, _ = data()
    expected = model.predict(x, verbose=0)
    keras_ngd.capture(model, kfac())
    close(model.predict(x, verbose=0), expected, 1e-6)


def test_what_is_around_a_call():
    """Read from the functions that run, which belong to the backends: this is to fail where they are renamed."""
    x = ops.ones((3, 2))
    found = {}

    def look(name, result):
        found.setdefault(name, surroundings.around())
        return result

    def run():
        ops.scan(lambda carry, x: (carry, look("scan", x)), ops.zeros((2,)), x)
        ops.map(lambda x: look("map", x) if surroundings.around() else x, x)
        ops.fori_loop(0, 3, lambda i, total: look("fori", total + 1), ops.zeros(()))
        ops.while_loop(lambda i: i < 3, lambda i: look("while", i + 1), 0)
        ops.vectorized_map(lambda x: look("vectorized", x), x)
        ops.cond(ops.sum(x) > 0, lambda: look("cond", x), lambda: x)
        return x

    if keras.backend.backend() == "jax":
        import jax

        jax.jit(run)()
    else:
        import tensorflow as tf

        tf.function(run)()
        assert surroundings.VECTORIZED in found["vectorized"]
    assert all(surroundings.LOOPS in found[name] for name in ("scan", "fori", "while"))
    assert surroundings.MAPS in found["map"]
    assert surroundings.MAPS not in found["scan"]
    assert found["cond"] == surroundings.around() == []
