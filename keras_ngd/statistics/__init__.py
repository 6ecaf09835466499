"""What a probe emits in the backward pass."""

from keras_ngd.statistics.kronecker import KroneckerStatistics
from keras_ngd.statistics.split import SplitStatistics
from keras_ngd.statistics.statistics import Statistics

__all__ = ["KroneckerStatistics", "SplitStatistics", "Statistics"]
