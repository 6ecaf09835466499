"""Keras callbacks: what the second-order part of a training is doing, and what workers share outside their steps."""

from keras_ngd.callbacks.curvature_monitor import CurvatureMonitor, plot_change_rate
from keras_ngd.callbacks.step_monitor import StepMonitor
from keras_ngd.callbacks.synchronization import BroadcastInitialState, GatherStatistics, MetricAverage

__all__ = [
    "BroadcastInitialState",
    "CurvatureMonitor",
    "GatherStatistics",
    "MetricAverage",
    "StepMonitor",
    "plot_change_rate",
]
