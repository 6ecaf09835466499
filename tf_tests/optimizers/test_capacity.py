"""Methods on rows where nobody says how large a batch is: `fit` on arrays, generators, loops of one's own."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ngd
from keras_ngd.optimizers.capacity import DEFAULT_CAPACITY
from tf_tests import small

TENSORFLOW = keras.backend.backend() == "tensorflow"
METHODS = {
    "SKFAC": lambda **a: keras_ngd.SKFAC(**{"interval": 1, "damping": 0.1, **a}),
    "SNGD": lambda **a: keras_ngd.SNGD(**a),
    "HyLo": lambda **a: keras_ngd.HyLo(**{"interval": 1, "rank": 0.5, "mode": "kid", **a}),
}


# HyLo takes long to compile.
@pytest.fixture(params=[name if name != "HyLo" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS])
def method(request):
    return METHODS[request.param]


def network(seed=0):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,), name="inputs")
    hidden = keras.layers.Dense(24, activation="tanh", name="hidden")(inputs)
    return keras.Model(inputs, keras.layers.Dense(4, name="outputs")(hidden))


def room_of(model):
    """The room of all layers' statistics."""
    [room] = {layer.statistics.batch_size for layer in model.layers if getattr(layer, "statistics", None)}
    return room


def test_the_first_trace_tells(method):
    """Training is that of the same optimizer which was told."""
    x, y = small.regression(32)
    told = small.captured(network(), method(batch_size=16))
    small.fit(told, x, y, batch_size=16, epochs=2)
    model = small.captured(network(), method())
    assert room_of(model) == DEFAULT_CAPACITY
    small.fit(model, x, y, batch_size=16, epochs=2)
    assert model.optimizer.capacity == room_of(model) == 16
    assert model.optimizer.factor_updates == 4
    small.assert_same(small.weights(model), small.weights(told))
    small.assert_same(small.statistics(model), small.statistics(told))


def test_a_larger_batch_than_the_data_had(method):
    x, y = small.regression(32)
    model, optimizer = network(), method()
    keras_ngd.capture(model, optimizer, data=x[:8])
    assert room_of(model) == 8
    small.fit(small.compiled(model, optimizer), x, y, batch_size=16)
    assert optimizer.capacity == room_of(model) == 16


def test_a_batch_of_unknown_size():
    """TensorFlow does not know it where it does not divide the data: there is room for 128, which is exact up to these."""
    x, y = small.regression(40)
    told, model = (
        small.captured(network(), METHODS["SNGD"](batch_size=16)),
        small.captured(network(), METHODS["SNGD"]()),
    )
    for each in (told, model):
        small.fit(each, x, y, batch_size=16)
    assert room_of(model) == (DEFAULT_CAPACITY if TENSORFLOW else 16)
    small.assert_close(small.weights(model), small.weights(told))


def test_a_generator():
    x, y = small.regression(32)
    model = small.captured(network(), METHODS["HyLo"]())
    model.fit((batch for batch in [(x[:16], y[:16]), (x[16:], y[16:])] * 2), epochs=1, verbose=0)
    assert model.optimizer.factor_updates == 4
    assert room_of(model) in (16, DEFAULT_CAPACITY)


def test_rows_of_a_batch_that_there_is_no_room_for(method):
    """The leading examples, with the weight of all: a batch of equal halves is recorded as one of them."""
    x, y = small.regression(8)
    model = small.captured(network(), method(momentum=0.0))
    # The optimizer is built, so its room is for good.
    model.train_on_batch(x, y)
    model.optimizer.learning_rate = 0.0
    model.train_on_batch(np.concatenate([x, x]), np.concatenate([y, y]))
    found = [rows_squared(layer.statistics) for layer in model.layers[1:]]
    model.train_on_batch(x, y)
    expected = [rows_squared(layer.statistics) for layer in model.layers[1:]]
    assert room_of(model) == 8
    assert model.optimizer.factor_updates == 3
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def rows_squared(statistics):
    """What a layer's sides sum up to: Kronecker factors, or the Fisher matrix."""
    a, g = (small.array(v).astype("float64")[0] for v in statistics.averages[:2])
    if statistics.__class__.__name__ == "WoodburyStatistics":
        # Sides are kept as rows, or as factors.
        return [side if side.shape[0] == side.shape[1] else side.T @ side for side in (a, g)]
    u = np.einsum("ni,nj->nij", a, g).reshape(len(a), -1)
    return [u.T @ u]


def test_a_named_batch_size_is_a_limit(method):
    x, y = small.regression(16)
    with pytest.raises(ValueError, match="sees 16 examples in a batch, but was captured for 8"):
        small.fit(small.captured(network(), method(batch_size=8)), x, y, batch_size=16)


def test_a_whole_array_is_no_batch(method):
    data = np.zeros((1797, 4), "float32")
    keras_ngd.capture(model := network(), optimizer := method(), data=data)
    assert optimizer.capacity == room_of(model) == DEFAULT_CAPACITY
    keras_ngd.capture(model, optimizer := method(), data=data[:1024])
    assert optimizer.capacity == room_of(model) == 1024


def test_thor_measures_on_the_first_examples_of_an_array(monkeypatch):
    seen = []
    monkeypatch.setattr(keras_ngd.analysis, "split_dimension", lambda model, x: seen.append(len(x)) or split_of(8))

    def split_of(split):
        return type("Choice", (), {"split": split})

    keras_ngd.capture(network(), optimizer := keras_ngd.THOR(split="auto"), data=np.zeros((1797, 4), "float32"))
    assert (seen, optimizer.split) == ([256], 8)


def test_training_goes_on_from_saved_weights(method, tmp_path):
    """In a script that is run again, which says nothing of the batch size either."""
    x, y = small.regression(32)
    models = []
    for again in (False, True):
        model = small.captured(network(), method())
        if again:
            model.load_weights(tmp_path / "half.weights.h5")
            assert room_of(model) == 16
            small.fit(model, x, y, batch_size=16)
        else:
            small.fit(model, x, y, batch_size=16)
            model.save_weights(tmp_path / "half.weights.h5")
            small.fit(model, x, y, batch_size=16)
        models.append(model)
    small.assert_close(*(small.weights(model) for model in models), tolerance=1e-6)


def test_a_saved_model_goes_on(tmp_path):
    x, y = small.regression(32)
    model = small.captured(network(), METHODS["HyLo"]())
    small.fit(model, x, y, batch_size=16)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.optimizer.capacity == room_of(again) == 16
    for each in (model, again):
        small.fit(each, x, y, batch_size=16)
    small.assert_close(small.weights(again), small.weights(model), tolerance=1e-6)


def test_a_loop_of_ones_own(method):
    x, y = small.regression(16)
    keras_ngd.capture(model := network(), optimizer := method())
    if TENSORFLOW:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(model(x, training=True) - y))
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    else:
        optimizer.build(model.trainable_variables)
        gradients = [ops.convert_to_tensor(g) for g in small.gradients(model, x, y).values()]
    optimizer.apply(gradients, model.trainable_variables)
    assert optimizer.factor_updates == 1
    assert room_of(model) == (16 if TENSORFLOW else DEFAULT_CAPACITY)


@pytest.mark.slow
def test_a_switch_without_epochs_decides_every_hundred_steps():
    optimizer = METHODS["HyLo"](mode="switch", interval=200)
    model = small.captured(network(), optimizer)
    x, y = small.regression(8 * 99)
    small.fit(model, x, y)
    assert optimizer.switch_report()["epochs"] == 0
    small.fit(model, x[:8], y[:8])
    assert optimizer.switch_report()["epochs"] == 1
