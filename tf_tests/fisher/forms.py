"""Networks with every form of output, and losses on them whose likelihoods are known."""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import layers, ops

import keras_ngd
from tf_tests.fisher.stepping import BATCH

TIME, CLASSES = 3, 3
RNG = np.random.default_rng(7)


def network(*behind, shape=(4,), units=CLASSES, activation=None, name="outputs"):
    """Two dense layers, and what is behind them."""

    def make():
        h = x = keras.Input(shape, name="inputs")
        h = layers.Dense(5, "tanh", name="hidden")(h)
        h = layers.Dense(units, activation, name=name)(h)
        for layer in behind:
            h = layer()(h)
        return keras.Model(x, h)

    return make


def tokens():
    """A sequence with a mask, which padding makes."""
    x = keras.Input((TIME,), dtype="int32")
    h = layers.Embedding(6, 4, mask_zero=True, name="embedding")(x)
    h = layers.Dense(5, "tanh", name="hidden")(h)
    return keras.Model(x, layers.Dense(CLASSES, name="outputs")(h))


def two_outputs():
    x = keras.Input((4,), name="inputs")
    h = layers.Dense(5, "tanh", name="hidden")(x)
    return keras.Model(x, {"a": layers.Dense(CLASSES, "softmax", name="a")(h), "b": layers.Dense(2, name="b")(h)})


class Own(keras.Model):
    """A subclassed model, whose graph nobody sees."""

    def __init__(self):
        super().__init__()
        self.hidden, self.outer = layers.Dense(5, "tanh", name="hidden"), layers.Dense(CLASSES, name="outputs")

    def call(self, x):
        return ops.softmax(self.outer(self.hidden(x)))


def own():
    model = Own()
    model(np.zeros((BATCH, 4), "float32"))
    return model


@keras.saving.register_keras_serializable("tests")
def squares(y_true, y_pred):
    """A loss of one's own: half of the sum of the squared errors."""
    return ops.sum(ops.square(y_true - y_pred), axis=-1) / 2


@dataclasses.dataclass(frozen=True)
class Form:
    """A network, its loss and labels.

    Attributes:
        make: function that makes the network.
        loss: as `compile` takes it.
        y: labels.
        x: inputs.
        weights: sample weights.
        compiling: further arguments of `compile`.
        optimizer: further arguments of the optimizer.
    """

    make: Any
    loss: Any
    y: Any
    x: Any = None
    weights: Any = None
    compiling: dict = dataclasses.field(default_factory=dict)
    optimizer: dict = dataclasses.field(default_factory=dict)

    def inputs(self):
        return INPUTS if self.x is None else self.x


INPUTS = RNG.normal(size=(BATCH, 4)).astype("float32")
SEQUENCES = RNG.normal(size=(BATCH, TIME, 4)).astype("float32")
WORDS = RNG.integers(1, 6, (BATCH, TIME))
WORDS[::2, 1:] = 0
CLASS = RNG.integers(0, CLASSES, BATCH)
CLASS_OF_EACH = RNG.integers(0, CLASSES, (BATCH, TIME))
ONE_HOT = np.eye(CLASSES, dtype="float32")[CLASS]
NUMBERS = RNG.normal(size=(BATCH, CLASSES)).astype("float32")
NUMBERS_OF_EACH = RNG.normal(size=(BATCH, TIME, 2)).astype("float32")
BITS = RNG.integers(0, 2, (BATCH, CLASSES)).astype("float32")
WEIGHTS = RNG.uniform(0.2, 2.0, BATCH).astype("float32")
IGNORED = np.where(RNG.uniform(size=(BATCH, TIME)) < 0.3, 1, CLASS_OF_EACH)

L = keras.losses
FORMS = {
    "sparse logits": Form(network(), L.SparseCategoricalCrossentropy(from_logits=True), CLASS),
    "sparse softmax": Form(network(activation="softmax"), "sparse_categorical_crossentropy", CLASS),
    "softmax layer": Form(network(layers.Softmax), L.SparseCategoricalCrossentropy(), CLASS[:, None]),
    "activation layer": Form(
        network(lambda: layers.Activation("softmax")), L.CategoricalCrossentropy(label_smoothing=0.2), ONE_HOT
    ),
    "reshaped": Form(
        network(lambda: layers.Reshape((TIME, CLASSES)), lambda: layers.Activation("softmax"), units=TIME * CLASSES),
        "sparse_categorical_crossentropy",
        CLASS_OF_EACH,
    ),
    "not captured behind": Form(
        network(lambda: layers.Lambda(ops.tanh), lambda: layers.UnitNormalization()),
        L.SparseCategoricalCrossentropy(from_logits=True),
        CLASS,
    ),
    "one hot logits": Form(network(), L.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1), ONE_HOT),
    "weights of examples": Form(network(), L.SparseCategoricalCrossentropy(from_logits=True), CLASS, weights=WEIGHTS),
    "mean of weights": Form(
        network(),
        L.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
        CLASS,
        weights=WEIGHTS,
    ),
    "binary logits": Form(network(), L.BinaryCrossentropy(from_logits=True, label_smoothing=0.1), BITS),
    "binary sigmoid": Form(network(activation="sigmoid"), "binary_crossentropy", BITS),
    "one bit": Form(network(units=1, activation="sigmoid"), "binary_crossentropy", BITS[:, 0]),
    "squares": Form(network(), "mse", NUMBERS),
    "squares of an activation": Form(network(activation="tanh"), L.MeanSquaredError(), NUMBERS),
    "squares at positions": Form(network(shape=(TIME, 4), units=2), "mse", NUMBERS_OF_EACH, x=SEQUENCES),
    "weights of positions": Form(
        network(shape=(TIME, 4), units=2), "mse", NUMBERS_OF_EACH, x=SEQUENCES, weights=RNG.uniform(size=(BATCH, TIME))
    ),
    "mask": Form(tokens, L.SparseCategoricalCrossentropy(from_logits=True), CLASS_OF_EACH, x=WORDS),
    "ignored class": Form(
        network(shape=(TIME, 4)),
        L.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1),
        IGNORED,
        x=SEQUENCES,
    ),
    "weight of the loss": Form(network(), "mse", NUMBERS, compiling={"loss_weights": [5.0]}),
    "two outputs": Form(
        two_outputs,
        {"a": "sparse_categorical_crossentropy", "b": "mse"},
        {"a": CLASS, "b": NUMBERS_OF_EACH[:, 0]},
        compiling={"loss_weights": {"a": 0.5, "b": 2.0}},
    ),
    "subclassed": Form(own, "sparse_categorical_crossentropy", CLASS),
    "loss of one's own": Form(
        network(), squares, NUMBERS, optimizer={"likelihood": keras_ngd.fisher.Gaussian(curvature=1)}
    ),
}
