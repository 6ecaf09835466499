"""Keras optimizers that precondition the gradient with the captured layers' curvature."""

from keras_ngd.optimizers.eigen_adam import EigenAdam
from keras_ngd.optimizers.ekfac import EKFAC
from keras_ngd.optimizers.hylo import HyLo
from keras_ngd.optimizers.kfac import KFAC
from keras_ngd.optimizers.natural_gradient import NaturalGradient
from keras_ngd.optimizers.settings import PAPER_SETTINGS
from keras_ngd.optimizers.skfac import SKFAC
from keras_ngd.optimizers.sngd import SNGD
from keras_ngd.optimizers.thor import THOR

__all__ = ["EKFAC", "KFAC", "PAPER_SETTINGS", "SKFAC", "SNGD", "THOR", "EigenAdam", "HyLo", "NaturalGradient"]
