"""Keras optimizers that precondition the gradient with the captured layers' curvature."""

from keras_ngd.optimizers.kfac import KFAC
from keras_ngd.optimizers.natural_gradient import NaturalGradient
from keras_ngd.optimizers.thor import THOR

__all__ = ["KFAC", "THOR", "NaturalGradient"]
