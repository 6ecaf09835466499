"""What a probe emits in the backward pass."""

from keras_ngd.statistics.kronecker import KroneckerStatistics
from keras_ngd.statistics.low_rank import LowRankStatistics
from keras_ngd.statistics.rows import RowStatistics
from keras_ngd.statistics.split import SplitStatistics
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.statistics.woodbury import WoodburyStatistics

__all__ = [
    "KroneckerStatistics",
    "LowRankStatistics",
    "RowStatistics",
    "SplitStatistics",
    "Statistics",
    "WoodburyStatistics",
]
