"""Natural-gradient training for any Keras model, through plain `compile` and `fit`."""

from keras_ngd import analysis, callbacks, distributed, fisher, layers, schedules
from keras_ngd.capture import capture
from keras_ngd.capturing import release, trainable_weights
from keras_ngd.optimizers import EKFAC, KFAC, PAPER_SETTINGS, SKFAC, SNGD, THOR, EigenAdam, HyLo
from keras_ngd.report import CaptureReport, LayerReport

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "KFAC",
    "PAPER_SETTINGS",
    "SKFAC",
    "SNGD",
    "THOR",
    "CaptureReport",
    "EigenAdam",
    "HyLo",
    "LayerReport",
    "analysis",
    "callbacks",
    "capture",
    "distributed",
    "fisher",
    "layers",
    "release",
    "schedules",
    "trainable_weights",
]
