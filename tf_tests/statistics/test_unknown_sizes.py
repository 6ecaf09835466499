"""Images of sizes that are not known beforehand: the steps are those of a model that knows them."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests.small import captured, fit, relative_distance, weights

METHODS = {
    "kfac": lambda: keras_ngd.KFAC(factor_interval=1, inverse_interval=1),
    "thor": lambda: keras_ngd.THOR(split=4, factor_interval=1, inverse_interval=1),
    "skfac": lambda: keras_ngd.SKFAC(batch_size=4, interval=1),
    "some": lambda: keras_ngd.SKFAC(batch_size=4, interval=1, convolution="subsample", positions=3),
    # More than the last convolution has.
    "all": lambda: keras_ngd.SKFAC(batch_size=4, interval=1, convolution="subsample", positions=30),
    "sngd": lambda: keras_ngd.SNGD(batch_size=4, interval=1),
    "hylo": lambda: keras_ngd.HyLo(batch_size=4, interval=1, mode="kid"),
}
SUBSAMPLING = ["some", "all"]


def network(*sizes):
    inputs = keras.Input((*sizes, 2))
    h = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(inputs)
    h = layers.Conv2D(4, 2, groups=2, activation="relu")(h)
    h = layers.Conv2D(4, 1)(h)
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(h)))


@pytest.mark.parametrize(
    "method", [*SUBSAMPLING, *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m not in SUBSAMPLING)]
)
def test_equals_known_sizes(method):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 8, 9, 2)).astype("float32")
    y = rng.normal(size=(6, 2)).astype("float32")
    trained = []
    for sizes in ((8, 9), (None, None)):
        keras.utils.set_random_seed(0)
        model = captured(network(*sizes), METHODS[method]())
        before = weights(model)
        # The last batch is short.
        fit(model, x, y, batch_size=4, epochs=2)
        trained.append(weights(model))
    assert relative_distance(trained[0], before) > 1e-3
    assert relative_distance(*trained[::-1]) < 1e-5
    assert model.optimizer.skipped_statistics == 0


@pytest.mark.parametrize("method", SUBSAMPLING)
@pytest.mark.slow
def test_sizes_change_from_batch_to_batch(method):
    rng = np.random.default_rng(0)
    model = captured(network(None, None), METHODS[method]())
    for sizes in ((8, 9), (5, 12), (8, 9)):
        x = rng.normal(size=(4, *sizes, 2)).astype("float32")
        assert np.isfinite(model.train_on_batch(x, np.ones((4, 2), "float32")))
    assert model.optimizer.factor_updates == 3
