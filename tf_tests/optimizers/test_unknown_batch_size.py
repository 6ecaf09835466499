"""Training where the batch size is not static, as it is not wherever it does not divide the data."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests import small

METHODS = {
    "KFAC": lambda: keras_ngd.KFAC(factor_interval=2, inverse_interval=2),
    "THOR": lambda: keras_ngd.THOR(factor_interval=2, inverse_interval=2),
    "SKFAC": lambda: keras_ngd.SKFAC(batch_size=8),
    "SNGD": lambda: keras_ngd.SNGD(batch_size=8),
    "HyLo": lambda: keras_ngd.HyLo(batch_size=8, steps_per_epoch=3),
}


@keras.saving.register_keras_serializable("keras_ngd_tests")
class OwnDense(layers.Dense):
    """A layer that is not captured."""


def sequences(examples):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 3, 4)).astype("float32")
    return x, np.tanh(x @ rng.normal(size=(4, 2))).astype("float32")


def sequence_model():
    inputs = keras.Input((3, 4))
    hidden = layers.Dense(4, activation="tanh")(inputs)
    return keras.Model(inputs, layers.Dense(2)(OwnDense(4, activation="tanh")(hidden)))


@pytest.mark.parametrize("method", METHODS)
def test_kernels_used_at_several_positions_train_where_batches_do_not_divide_the_data(method):
    x, y = sequences(20)
    model = small.captured(sequence_model(), METHODS[method]())
    losses = small.fit(model, x, y, epochs=4).history["loss"]
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]


def test_steps_do_not_depend_on_whether_the_batch_size_is_known():
    # 20 examples are batches of 8, 8 and 4, of unknown size; 16 are two of them, of known size.
    x, y = sequences(20)
    models = [sequence_model() for _ in range(2)]
    models[1].set_weights(models[0].get_weights())
    for model in models:
        small.captured(model)
    models[0].fit(x, y, batch_size=8, steps_per_epoch=2, shuffle=False, verbose=0)
    small.fit(models[1], x[:16], y[:16])
    small.assert_close(small.weights(models[0]), small.weights(models[1]))
