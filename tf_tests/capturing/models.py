"""Models of every build, to be captured."""

import keras
import numpy as np
from keras import layers

from tf_tests.small import (
    mlp,
)

STEPS = 4


def sequential():
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, "tanh", name="hidden"), layers.Dense(4, name="outputs")]
    )


@keras.saving.register_keras_serializable("keras_ngd_tests")
class Subclassed(keras.Model):
    """Layers in an attribute, a list and a dictionary."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(4, activation="tanh", name="first")
        self.middle = [layers.Dense(4, name="one"), layers.Dense(4, name="two")]
        self.last = {"outputs": layers.Dense(4, name="last")}

    def call(self, inputs):
        x = self.first(inputs)
        for layer in self.middle:
            x = layer(x)
        return self.last["outputs"](x)


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 4), "float32"))
    return model


def nested():
    """A Functional model in a Sequential one in a Functional one."""
    x = keras.Input((4,))
    inner = keras.Model(x, layers.Dense(4, name="innermost")(x), name="inner")
    middle = keras.Sequential([keras.Input((4,)), inner, layers.Dense(4, name="middling")], name="middle")
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(4, name="outermost")(middle(x)))


@keras.saving.register_keras_serializable("keras_ngd_tests")
class Gated(layers.Layer):
    """A layer with weights of its own and two sub-layers, one of them deeper."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.value = layers.Dense(units, name="value")
        self.gate = keras.Sequential([layers.Dense(units, "sigmoid", name="amount")], name="gate")

    def build(self, input_shape):
        self.value.build(input_shape)
        self.gate.build(input_shape)
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, inputs):
        return self.scale * self.value(inputs) * self.gate(inputs)


def with_sub_layers():
    return keras.Sequential([keras.Input((4,)), Gated(4, name="gated"), layers.Dense(4, name="outputs")])


BUILDERS = {
    "sequential": (sequential, {"hidden", "outputs"}),
    "functional": (mlp, {"hidden", "outputs"}),
    "subclassed": (subclassed, {"first", "one", "two", "last"}),
    "nested": (nested, {"innermost", "middling", "outermost"}),
    "sub-layers": (with_sub_layers, {"value", "amount", "outputs"}),
}


def named(model, name):
    """The layer of that name, at any depth."""
    return next(layer for layer in model._flatten_layers() if layer.name == name)


# A captured model is the plain model


def everything():
    """One layer of every captured kind, in one model."""
    x = keras.Input((8,))
    h = layers.Reshape((8, 1))(x)
    h = layers.Conv1D(4, 3, padding="causal", dilation_rate=2, activation="relu", name="causal")(h)
    h = layers.Conv1D(4, 2, groups=2, use_bias=False, name="grouped")(h)
    h = layers.Conv1D(8, 3, padding="same", strides=2, name="strided")(h)
    h = layers.Reshape((4, 4, 2))(h)
    h = layers.Conv2D(4, 3, padding="same", activation="relu", name="same")(h)
    h = layers.Conv2D(4, (2, 1), dilation_rate=(1, 2), name="valid")(h)
    h = layers.Reshape((3, 4, 2, 2))(h)
    h = layers.Conv3D(3, 2, padding="same", name="solid")(h)
    h = layers.Dense(4, activation="tanh", name="positions")(h)
    return keras.Model(x, layers.Dense(2, use_bias=False, name="outputs")(layers.Flatten()(h)))


KINDS = {"mlp": (mlp, 4, 4), "every kind of layer": (everything, 8, 2)}
