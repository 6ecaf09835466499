"""What the tasks of `benchmarks.tasks` train: data, losses and networks."""

import dataclasses
import functools
from typing import Any

from examples import datasets  # isort: skip  (before keras: it imports TensorFlow without its greetings)
import keras
import numpy as np

from benchmarks import texts
from benchmarks.networks import autoencoder, deep_autoencoder, language_model
from examples.networks import digits_cnn, digits_mlp, residual_network, unet, vision_transformer

# The first million characters of the standard library are for training, what follows is for validation.
TRAINING_CHARACTERS, CONTEXT, WINDOWS = 1_000_000, 64, 460 * 64
_VALIDATION_WINDOWS, _APART = 400, 500


@dataclasses.dataclass
class Problem:
    """What a task trains on and what it is measured by.

    Attributes:
        training: inputs and targets.
        loss: a Keras loss.
        validation: inputs and targets. None: those of the training.
        accuracy: whether the share of right answers is measured, too.
    """

    training: tuple[Any, Any]
    loss: keras.losses.Loss
    validation: tuple[Any, Any] | None = None
    accuracy: bool = False


@functools.cache
def characters():
    """The standard library's source, for training and for validation, and how many different characters it has."""
    found, length = "", TRAINING_CHARACTERS + _VALIDATION_WINDOWS * _APART
    for text in texts.sources():
        if len(found) >= length:
            break
        # What is beyond ASCII is rare and a vocabulary of its own.
        found += "".join(c for c in text if c.isascii())
    (codes,), alphabet = texts.codes([found[:length]])
    return codes[:TRAINING_CHARACTERS], codes[TRAINING_CHARACTERS:], alphabet


def _text():
    training, other, _ = characters()
    starts = np.random.default_rng(0).integers(0, len(training) - CONTEXT, WINDOWS)
    return (
        texts.windows(training, starts, CONTEXT),
        texts.windows(other, _APART * np.arange(_VALIDATION_WINDOWS), CONTEXT),
    )


def _fashion(split, count):
    images, labels = datasets.arrays("fashion_mnist", f"{split}[:{count}]", scale=255.0)
    return images, labels.astype("int32")


def problem(task):
    """The `Problem` of a task."""
    labels_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    pixels_loss = keras.losses.BinaryCrossentropy(from_logits=True)
    if task == "text":
        training, validation = _text()
        return Problem(training, labels_loss, validation)
    if task == "vit":
        return Problem(_fashion("train", 10_000), labels_loss, _fashion("test", 2_000), accuracy=True)
    if task == "deep_autoencoder":
        flat = _fashion("train", 20_000)[0].reshape(-1, 784)
        return Problem((flat, flat), pixels_loss)
    if task == "resnet":
        images, labels = datasets.arrays("shapes32", "train", scale=64.0)
        return Problem((images[:512] - 2, labels[:512]), labels_loss)
    if task == "unet":
        images, masks = datasets.arrays("masks64", "train", scale=64.0, keys=("image", "segmentation_mask"))
        return Problem((images[:128] - 2, masks[:128].astype("float32")), pixels_loss)
    images, labels = datasets.arrays("digits", "train")
    if task == "autoencoder":
        flat = images.reshape(len(images), -1)
        return Problem((flat, flat), pixels_loss)
    return Problem((images, labels), labels_loss)


MODELS = {
    "cnn": digits_cnn,
    "mlp": digits_mlp,
    "autoencoder": autoencoder,
    "resnet": lambda: residual_network("resnet8", 32, 10, [8, 16, 32], 1),
    "unet": lambda: unet(64, 3, width=8, depth=2),
    "text": lambda: language_model(characters()[2]),
    "vit": vision_transformer,
    "deep_autoencoder": deep_autoencoder,
}
