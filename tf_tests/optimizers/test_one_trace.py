"""The training step is traced once, whatever makes its variables in the first step."""

import keras
import numpy as np
import pytest
from keras import layers

from tf_tests import small


class Traced(layers.Layer):
    """Counts how often it is called from Python."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def call(self, x):
        self.calls += 1
        return x


def model_and_layer(method, **kwargs):
    inputs = keras.Input((6,))
    h = layers.Dense(5, activation="tanh")(inputs)
    layer = Traced()
    model = keras.Model(inputs, layers.Dense(3, activation="softmax")(layer(h)))
    model = small.captured(model, small.METHODS[method](), loss="sparse_categorical_crossentropy", **kwargs)
    layer.calls = 0
    return model, layer


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="on JAX nothing is made while a step is traced")
@pytest.mark.parametrize("metrics", [None, ["accuracy"], ["accuracy", keras.metrics.SparseCategoricalCrossentropy()]])
@pytest.mark.parametrize("method", ["kfac", "sngd"])
def test_the_first_step(method, metrics):
    model, layer = model_and_layer(method, metrics=metrics)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 6)).astype("float32"), rng.integers(0, 3, 32)
    history = model.fit(x, y, batch_size=8, epochs=2, verbose=0).history
    assert layer.calls == 1
    if metrics is not None:
        assert set(history) >= {"loss", "accuracy"}
