"""What a probe emits in the backward pass."""

from keras_ngd.statistics.example_rows import RowStatistics
from keras_ngd.statistics.factor_blocks import SplitStatistics
from keras_ngd.statistics.factor_rows import WoodburyStatistics
from keras_ngd.statistics.kronecker_factors import KroneckerStatistics
from keras_ngd.statistics.low_rank import LowRankStatistics
from keras_ngd.statistics.scale_blocks import UnitWiseStatistics
from keras_ngd.statistics.second_moments import SecondMomentStatistics
from keras_ngd.statistics.statistics import Statistics

__all__ = [
    "KroneckerStatistics",
    "LowRankStatistics",
    "RowStatistics",
    "SecondMomentStatistics",
    "SplitStatistics",
    "Statistics",
    "UnitWiseStatistics",
    "WoodburyStatistics",
]
