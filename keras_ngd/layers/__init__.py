"""Captured layers: Keras layers with a probe on their pre-activation."""

from keras_ngd.layers.convolution import Conv1D, Conv2D, Conv3D
from keras_ngd.layers.dense import Dense

# What `capture` makes of which of Keras's layers.
CAPTURED_KINDS = {kind.plain: kind for kind in (Dense, Conv1D, Conv2D, Conv3D)}

__all__ = ["CAPTURED_KINDS", "Conv1D", "Conv2D", "Conv3D", "Dense"]
