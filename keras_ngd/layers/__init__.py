"""Captured layers: Keras layers with a probe on their pre-activation."""

from keras_ngd.layers.convolution import Conv1D, Conv2D, Conv3D
from keras_ngd.layers.dense import Dense

__all__ = ["Conv1D", "Conv2D", "Conv3D", "Dense"]
