"""Approximations of a layer's Fisher block: what is kept of it, and how a gradient is preconditioned with it."""

from keras_ngd.curvature.kronecker import KroneckerCurvature
from keras_ngd.curvature.split import SplitCurvature

__all__ = ["KroneckerCurvature", "SplitCurvature"]
