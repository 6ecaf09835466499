"""Turning a model's layers into captured layers and back: the only package that sees layers and optimizers together."""

from keras_ngd.capturing.policy import layers_to_capture
from keras_ngd.capturing.swap import capture, release, trainable_weights

__all__ = ["capture", "layers_to_capture", "release", "trainable_weights"]
