"""What the tests run in each of several processes."""

import hashlib

import keras
import numpy as np
from keras import layers

import keras_ngd
from tf_tests.small import array, weights

BATCH, STEPS = 24, 20


def data(examples=BATCH * STEPS):
    """A small classification problem: `(x, y)`, in batches of which any sub-batch is a fair sample."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 6, 6, 2)).astype("float32")
    return x, (2 * (x[:, 0, :, 0].sum(axis=1) > 0) + (x[:, 1, :, 1].sum(axis=1) > 0)).astype("int32")


def network():
    """Layers of three kinds, two of one shape, one without bias, and one that is not captured."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 6, 2))
    h = layers.Conv2D(4, 3, activation="tanh", use_bias=False, name="convolution")(inputs)
    h = layers.LayerNormalization()(layers.Flatten()(h))
    for name in ("first", "second"):
        h = layers.Dense(8, activation="tanh", name=name)(h if name == "second" else layers.Dense(8, name="bottom")(h))
    return keras.Model(inputs, layers.Dense(4, name="logits")(h))


METHODS = {
    "skfac": lambda size, **k: keras_ngd.SKFAC(0.05, 0.03, interval=2, batch_size=BATCH // size, **k),
    "sngd": lambda size, **k: keras_ngd.SNGD(0.05, 0.1, interval=2, batch_size=BATCH // size, **k),
    "hylo-kid": lambda size, **k: keras_ngd.HyLo(
        0.05, 0.1, interval=2, batch_size=BATCH // size, rank=1.0, mode="kid", **k
    ),
    "hylo-kis": lambda size, **k: keras_ngd.HyLo(
        0.05, 0.1, interval=2, batch_size=BATCH // size, rank=1.0, mode="kis", **k
    ),
    "kfac": lambda size, **k: keras_ngd.KFAC(0.05, 0.03, factor_interval=2, inverse_interval=4, **k),
    "kfac-eigen": lambda size, **k: keras_ngd.KFAC(
        0.05, 0.03, factor_interval=1, inverse_interval=5, inverse="eigen", **k
    ),
    "thor": lambda size, **k: keras_ngd.THOR(
        0.05, 0.03, factor_interval=1, inverse_interval=2, split=4, omega=(0.02, 0.005), **k
    ),
}

# What does not equal one worker's training: each compresses its own batch.
COMPRESSING = {
    "hylo-switch": lambda size, **k: keras_ngd.HyLo(
        0.05, 0.1, interval=2, batch_size=BATCH // size, rank=0.5, steps_per_epoch=7, eta=0.1, **k
    ),
    "hylo-random": lambda size, **k: keras_ngd.HyLo(
        0.05, 0.1, interval=3, batch_size=BATCH // size, rank=0.5, mode="random", steps_per_epoch=10, **k
    ),
    "skfac-subsample": lambda size, **k: keras_ngd.SKFAC(
        0.05, 0.03, interval=2, batch_size=BATCH // size, convolution="subsample", history=2, **k
    ),
}


def prepared(method, size=1, model=None, **arguments):
    """A captured and compiled model."""
    model = network() if model is None else model
    optimizer = {**METHODS, **COMPRESSING}[method](size, **arguments)
    keras_ngd.capture(model, optimizer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    return model


def part(x, rank, size):
    """This worker's share of each batch of `BATCH`."""
    return x.reshape(-1, BATCH, *x.shape[1:])[:, rank::size].reshape(-1, *x.shape[1:])


def digest(model):
    """A number that differs where any bit of a weight, a statistic or the optimizer's state does."""
    # Row methods' own rows are each worker's own.
    mean = isinstance(model.optimizer, keras_ngd.KFAC)
    variables = [v for v in model.trainable_variables if mean or not hasattr(v, "keras_ngd_statistics")]
    variables += model.optimizer.variables
    return hashlib.sha256(b"".join(array(v).tobytes() for v in variables)).hexdigest()


def fit(model, x, y, rank=0, size=1, **arguments):
    """Trains on this worker's share, in order."""
    batch = BATCH // size
    return model.fit(part(x, rank, size), part(y, rank, size), batch_size=batch, shuffle=False, verbose=0, **arguments)


def methods(names, steps=200):
    """Of each method: the weights after 20 steps, digests after 20 and after more, and the bytes received."""
    import horovod.tensorflow as hvd

    rank, size = hvd.rank(), hvd.size()
    x, y = data()
    found = {}
    for name in names:
        model = prepared(name, size)
        fit(model, x, y, rank, size)
        found[name] = {"weights": weights(model), "digests": [digest(model)]}
        found[name]["received"] = model.optimizer.received_bytes()
        found[name]["updates"] = (model.optimizer.factor_updates, model.optimizer.inverse_updates)
        fit(model, x, y, rank, size, epochs=steps // STEPS - 1)
        found[name]["digests"].append(digest(model))
        found[name]["finite"] = bool(all(np.isfinite(v).all() for v in weights(model).values()))
    return found
