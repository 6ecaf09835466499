"""A captured model computes what the plain one does, and trains as it does."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests.capturing.models import (
    KINDS,
    everything,
)
from tf_tests.small import (
    array,
    assert_close,
    assert_same,
    captured,
    compiled,
    fit,
    gradients,
    kfac,
    mlp,
    policy,
    regression,
    statistics,
    weights,
)

pytestmark = pytest.mark.neutral

# Masks


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_mask_hides_positions(weight_sharing):
    tokens = keras.Input((5,), dtype="int32")
    embedding, dense = layers.Embedding(7, 3, mask_zero=True), layers.Dense(2, name="dense")
    model = keras.Model(tokens, layers.GlobalAveragePooling1D()(dense(embedding(tokens))))
    table = array(embedding.embeddings)
    captured(model, kfac(weight_sharing=weight_sharing))
    x = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 6, 0], [2, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    model.train_on_batch(x, np.ones((4, 2), "float32"))

    rows = np.concatenate([table[x], np.ones((4, 5, 1))], axis=-1)
    if weight_sharing == "expand":
        rows = rows[x != 0]
    else:
        rows = np.stack([example[tokens != 0].mean(axis=0) for example, tokens in zip(rows, x, strict=True)])
    expected = rows.T @ rows / len(rows)
    np.testing.assert_allclose(array(dense.statistics.input_factor)[0], expected, rtol=1e-4, atol=1e-6)


def test_masked_model_trains():
    tokens = keras.Input((6,), dtype="int32")
    h = layers.Embedding(7, 3, mask_zero=True)(tokens)
    h = layers.Dense(4, activation="tanh")(layers.Dense(4)(h))
    model = keras.Model(tokens, layers.Dense(1)(layers.GRU(3)(h)))
    rng = np.random.default_rng(0)
    x = rng.integers(1, 7, size=(32, 6)) * (np.arange(6) < rng.integers(1, 7, size=(32, 1)))
    y = (x == 3).sum(axis=1, keepdims=True).astype("float32")
    captured(model)
    history = fit(model, x, y, epochs=4)
    assert model.optimizer.factor_updates == 16
    assert history.history["loss"][-1] < history.history["loss"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_closed_gates_change_nothing(kind):
    build, inputs, outputs = KINDS[kind]
    x, y = regression(8, inputs, outputs)
    model = build()
    predicted, before = model.predict(x, verbose=0), gradients(model, x, y)
    report = keras_ngd.capture(model, kfac())
    assert len(report.captured) == len(report.layers)
    for layer in model.layers:
        if hasattr(layer, "statistics"):
            layer.statistics.gate.assign(0.0)
    recorded = statistics(model)

    after = gradients(model, x, y)

    np.testing.assert_array_equal(model.predict(x, verbose=0), predicted)
    assert_same({path: g for path, g in after.items() if path in before}, before)
    emitted = {path: g for path, g in after.items() if path not in before}
    assert all(np.array_equal(emitted[path], recorded[path]) for path in emitted if path.endswith(("factor", "gate")))


def test_open_gates_do_not_change_the_gradients():
    x, y = regression(8, 8, 2)
    model = everything()
    before = gradients(model, x, y)
    keras_ngd.capture(model, kfac())
    after = gradients(model, x, y)
    assert_close({path: g for path, g in after.items() if path in before}, before)
    assert all(np.any(g != 0) for path, g in after.items() if path.endswith("factor"))


@pytest.mark.parametrize("kind", KINDS)
def test_captured_model_trains_with_sgd_as_the_plain_one_does(kind):
    build, inputs, outputs = KINDS[kind]
    x, y = regression(32, inputs, outputs)
    plain, model = build(), build()
    model.set_weights(plain.get_weights())
    keras_ngd.capture(model, kfac())
    histories = []
    for each in (plain, model):
        compiled(each, keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True, clipnorm=1.0))
        histories.append(fit(each, x, y, epochs=3).history["loss"])
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)
    assert_close(weights(model), weights(plain))


@pytest.mark.parametrize("compute", ["mixed_bfloat16", "float64"])
def test_capture_keeps_the_layers_policy(compute):
    with policy(compute):
        model = mlp()
    keras_ngd.capture(model, kfac())
    layer = model.get_layer("hidden")
    assert layer.dtype_policy.name == compute
    assert layer.statistics.input_factor.dtype == ("float64" if compute == "float64" else "float32")
