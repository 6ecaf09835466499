"""The networks that costs are measured on, with the batches that they take."""

import keras
import numpy as np
from keras import layers, ops

from examples.networks import (
    Positions,
    attention_block,
    cnn_3c1f,
    digits_cnn,
    digits_mlp,
    residual_network,
    resnet18,
    resnet32,
    resnet50,
    unet,
)


def transformer(tokens=64, vocabulary=256, width=128, heads=4, depth=2, classes=10):
    """A classifier of sequences; its projections are `Dense` layers, one for queries, keys and values."""
    inputs = keras.Input((tokens,), dtype="int32")
    x = Positions(tokens, width)(layers.Embedding(vocabulary, width)(inputs))
    for _ in range(depth):
        q, k, v = ops.split(
            layers.Reshape((tokens, 3 * heads, width // heads))(
                layers.Dense(3 * width)(layers.LayerNormalization()(x))
            ),
            3,
            axis=2,
        )
        attended = ops.dot_product_attention(q, k, v)
        x = x + layers.Dense(width)(layers.Reshape((tokens, width))(attended))
        hidden = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(width)(hidden)
    pooled = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(classes)(pooled), name="transformer")


def autoencoder():
    """64-48-32-16-8-16-32-48-64 with tanh hidden layers, ending in logits: the classical test of second-order methods."""
    hidden = [layers.Dense(n, activation="tanh") for n in (48, 32, 16)]
    hidden += [layers.Dense(8), *(layers.Dense(n, activation="tanh") for n in (16, 32, 48))]
    return keras.Sequential([keras.Input((64,)), *hidden, layers.Dense(64)])


def deep_autoencoder():
    """784-400-200-100-25-100-200-400-784 with tanh hidden layers and a linear code, ending in logits."""
    outer = (400, 200, 100)
    hidden = [layers.Dense(n, activation="tanh") for n in outer]
    hidden += [layers.Dense(25), *(layers.Dense(n, activation="tanh") for n in reversed(outer))]
    return keras.Sequential([keras.Input((784,)), *hidden, layers.Dense(784, name="logits")])


def language_model(vocabulary, length=64, width=64, heads=4, depth=2):
    """The next token after each of a sequence: logits `[length, vocabulary]`."""
    inputs = keras.Input((length,), dtype="int32")
    x = Positions(length, width)(layers.Embedding(vocabulary, width)(inputs))
    for _ in range(depth):
        x = attention_block(x, width, heads, use_causal_mask=True)
    return keras.Model(inputs, layers.Dense(vocabulary, name="logits")(layers.LayerNormalization()(x)))


# A loss that is a mean over pixels or positions has as many values for each example.
NETWORKS = {
    "3c1f": {"make": cnn_3c1f, "shape": (28, 28, 1), "batch": 64, "split": 16},
    "resnet8": {
        "make": lambda: residual_network("resnet8", 32, 10, [16, 32, 64], 1),
        "shape": (32, 32, 3),
        "batch": 64,
        "split": 16,
    },
    "resnet18": {"make": resnet18, "shape": (32, 32, 3), "batch": 32, "split": 128},
    "resnet32": {"make": resnet32, "shape": (32, 32, 3), "batch": 128, "split": 16},
    "resnet50": {"make": lambda: resnet50(64, 10), "shape": (64, 64, 3), "batch": 16, "split": 128},
    "resnet50-224": {"make": lambda: resnet50(224, 1000), "shape": (224, 224, 3), "batch": 64, "split": 128},
    "unet": {"make": unet, "shape": (64, 64, 3), "batch": 16, "split": 64, "pixels": 64 * 64},
    "transformer": {"make": transformer, "shape": (64,), "batch": 32, "split": 64, "vocabulary": 256},
    "language-model": {
        "make": lambda: language_model(96),
        "shape": (64,),
        "batch": 64,
        "split": 64,
        "vocabulary": 96,
        "positions": 64,
    },
    "digits-cnn": {"make": digits_cnn, "shape": (8, 8, 1), "batch": 250, "split": 128},
    "digits-mlp": {"make": digits_mlp, "shape": (8, 8, 1), "batch": 250, "split": 128},
    "autoencoder": {"make": autoencoder, "shape": (64,), "batch": 250, "split": 128, "pixels": 64},
}


def batch(name):
    """A network's inputs and targets, random, and its loss."""
    rng, settings = np.random.default_rng(0), NETWORKS[name]
    shape = (settings["batch"], *settings["shape"])
    if "pixels" in settings:
        targets = rng.integers(0, 2, (*shape[:3], 1) if len(shape) > 2 else shape).astype("float32")
        return rng.normal(size=shape).astype("float32"), targets, keras.losses.BinaryCrossentropy(from_logits=True)
    words = settings.get("vocabulary")
    x = rng.integers(0, words, shape) if words else rng.normal(size=shape).astype("float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return x, rng.integers(0, 10, shape if "positions" in settings else settings["batch"]), loss
