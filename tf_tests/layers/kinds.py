"""Small models with a layer of each captured kind. A new kind is a line of `KINDS`."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from keras import layers

EXAMPLES = 16


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model with a layer of some kind, which is named `layer`.

    Attributes:
        model: function of no arguments that makes it; its outputs are to be of 3 numbers for each example.
        shape: of one example of its inputs.
        tokens: how many there are, where inputs are integers below that; None for numbers.
        include: the argument of `capture`.
        parts: the names of the captured layers in it, where it consists of such.
        rows: whether the methods on rows take it; where not, its name in the message that refuses it.
    """

    model: Callable
    shape: tuple
    tokens: int | None = None
    include: str | None = None
    rows: bool = True
    parts: tuple = ()

    def data(self, seed=0):
        """`(x, y)`."""
        rng = np.random.default_rng(seed)
        if self.tokens is None:
            x = rng.normal(size=(EXAMPLES, *self.shape)).astype("float32")
        else:
            x = rng.integers(0, self.tokens, size=(EXAMPLES, *self.shape)).astype("int32")
        return x, rng.normal(size=(EXAMPLES, 3)).astype("float32")


def alone(layer, shape, **kwargs):
    """The kind of a layer that `layer()` makes, between inputs of this shape and a dense layer."""

    def model():
        inputs = keras.Input(shape, dtype="int32" if "tokens" in kwargs else None)
        return keras.Model(inputs, layers.Dense(3, name="outputs")(layers.Flatten()(layer()(inputs))))

    return Kind(model, shape, **kwargs)


def between_two(layer):
    """The kind of an attention layer that `layer()` makes, of a sequence to itself."""

    def model():
        inputs = keras.Input((4, 6))
        return keras.Model(inputs, layers.Dense(3, name="outputs")(layers.Flatten()(layer()(inputs, inputs))))

    return Kind(model, (4, 6), parts=("query", "key", "value", "attention_output"))


def there_and_back(**kwargs):
    """The kind of a table that tokens are looked up in and what becomes of them is projected on."""

    def model():
        inputs, layer = keras.Input((4,), dtype="int32"), layers.ReversibleEmbedding(7, 3, name="layer", **kwargs)
        return keras.Model(
            inputs, layers.Dense(3, name="outputs")(layers.Flatten()(layer(layer(inputs), reverse=True)))
        )

    return Kind(model, (4,), tokens=7)


KINDS = {
    "dense": alone(lambda: layers.Dense(4, "tanh", name="layer"), (5,)),
    "dense-positions": alone(lambda: layers.Dense(4, name="layer"), (3, 5)),
    "conv1d": alone(lambda: layers.Conv1D(4, 3, padding="causal", name="layer"), (6, 2)),
    "conv2d": alone(lambda: layers.Conv2D(4, 3, strides=2, activation="relu", name="layer"), (6, 5, 2)),
    "conv2d-grouped": alone(lambda: layers.Conv2D(4, 3, groups=2, use_bias=False, name="layer"), (5, 5, 4)),
    "einsum": alone(
        lambda: layers.EinsumDense("abc,cde->abde", (4, 2, 3), bias_axes="de", activation="tanh", name="layer"),
        (4, 3),
    ),
    "einsum-groups": alone(
        lambda: layers.EinsumDense("atgi,gio->atgo", (4, 2, 3), bias_axes="go", name="layer"), (4, 2, 3)
    ),
    "einsum-plain-bias": alone(lambda: layers.EinsumDense("...x,xy->...y", 3, bias_axes="y", name="layer"), (2, 4, 5)),
    "embedding": alone(lambda: layers.Embedding(7, 3, name="layer"), (4,), tokens=7),
    "embedding-mask": alone(lambda: layers.Embedding(7, 3, mask_zero=True, name="layer"), (4,), tokens=7),
    "attention": between_two(lambda: layers.MultiHeadAttention(2, 3, name="layer")),
    "group-query": between_two(lambda: layers.GroupQueryAttention(3, 2, 1, name="layer")),
    "tied": there_and_back(),
    "untied": there_and_back(tie_weights=False),
    "depthwise1d": alone(lambda: layers.DepthwiseConv1D(3, padding="same", name="layer"), (5, 2)),
    "depthwise2d": alone(lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, name="layer"), (4, 5, 2)),
    "separable1d": alone(lambda: layers.SeparableConv1D(4, 3, use_bias=False, name="layer"), (6, 2)),
    "separable2d": alone(lambda: layers.SeparableConv2D(4, 3, strides=2, activation="relu", name="layer"), (5, 5, 2)),
    "conv1d-transpose": alone(lambda: layers.Conv1DTranspose(2, 3, padding="same", name="layer"), (4, 3)),
    "conv2d-transpose": alone(lambda: layers.Conv2DTranspose(2, 3, strides=2, name="layer"), (3, 2, 3)),
    "conv3d-transpose": alone(lambda: layers.Conv3DTranspose(2, 2, use_bias=False, name="layer"), (2, 2, 2, 2)),
    "conv3d": alone(lambda: layers.Conv3D(2, 2, name="layer"), (3, 3, 3, 2)),
    "batchnorm": alone(lambda: layers.BatchNormalization(1, name="layer"), (2, 3), include="layer"),
    "layernorm": alone(lambda: layers.LayerNormalization([1, 2], name="layer"), (2, 3), include="layer"),
    "groupnorm": alone(lambda: layers.GroupNormalization(2, scale=False, name="layer"), (2, 4), include="layer"),
    "rmsnorm": alone(lambda: layers.RMSNormalization(name="layer"), (5,), include="layer"),
    "simple-rnn": alone(lambda: layers.SimpleRNN(3, return_sequences=True, unroll=True, name="layer"), (3, 2)),
    "lstm": alone(lambda: layers.LSTM(3, go_backwards=True, name="layer"), (4, 2)),
    "gru": alone(lambda: layers.GRU(3, return_sequences=True, name="layer"), (3, 2)),
    "gru-reset-before": alone(lambda: layers.GRU(3, reset_after=False, name="layer"), (3, 2)),
    "stacked-cells": alone(lambda: layers.RNN([layers.LSTMCell(2), layers.GRUCell(3)], name="layer"), (3, 2)),
    "bidirectional": alone(
        lambda: layers.Bidirectional(layers.LSTM(2, name="lstm"), name="layer"),
        (3, 2),
        parts=("forward_lstm", "backward_lstm"),
    ),
    "time-distributed": alone(
        lambda: layers.TimeDistributed(layers.Conv1D(2, 2, name="inside"), name="layer"),
        (3, 4, 2),
        rows=False,
        parts=("inside",),
    ),
}

# Kinds that are trained in one model: what is compiled for each takes most of a test's time.
GROUPS = {
    "matrices": [
        "dense",
        "dense-positions",
        "einsum",
        "einsum-groups",
        "einsum-plain-bias",
        "attention",
        "group-query",
    ],
    "convolutions": ["conv1d", "conv2d", "conv2d-grouped", "conv3d", "depthwise1d", "depthwise2d"],
    "further convolutions": ["separable1d", "separable2d", "conv1d-transpose", "conv2d-transpose", "conv3d-transpose"],
    "tables": ["embedding", "embedding-mask", "tied", "untied"],
    "scales": ["batchnorm", "layernorm", "groupnorm", "rmsnorm"],
    "loops": ["simple-rnn", "lstm", "gru", "gru-reset-before", "stacked-cells", "bidirectional"],
    "called often": ["time-distributed"],
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Kinds in one model.

    Attributes:
        model: function of no arguments that makes it.
        kinds: dict from names to each `Kind`.
    """

    model: Callable
    kinds: dict

    @property
    def rows(self):
        return all(kind.rows for kind in self.kinds.values())

    def data(self):
        """`(x, y)`, `x` a list."""
        found = [kind.data(seed) for seed, kind in enumerate(self.kinds.values())]
        return [x for x, _ in found], found[0][1]

    def include(self, layer):
        """The argument of `capture`."""
        return any(kind.include is not None and layer.name == kind.include for kind in self.kinds.values())


def group(name):
    """A kind whose model has those of a group side by side, under their names."""
    kinds = {kind: KINDS[kind] for kind in GROUPS[name]}

    def model():
        inputs, outputs = [], []
        for kind, of_kind in kinds.items():
            with keras.name_scope(kind):
                part = of_kind.model()
            part = keras.Model(part.input, part.output, name=kind)
            inputs.append(keras.Input(of_kind.shape, dtype=part.input.dtype, name=f"{kind}-inputs"))
            outputs.append(part(inputs[-1]))
        return keras.Model(inputs, layers.Average()(outputs) if len(outputs) > 1 else outputs[0])

    return Group(model, kinds)
