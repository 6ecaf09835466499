"""Learning rates, dampings and intervals that may change during training, and what such arguments must be."""

from keras_ngd.schedules.changing import (
    GrowingInterval,
    WarmupPolynomialDecay,
    deserialize,
    interval_at,
    serialize,
    value_at,
)
from keras_ngd.schedules.checking import (
    check_count,
    check_interval,
    check_positive,
    check_positive_number,
    check_seed,
    check_split,
    is_count,
    is_number,
)
from keras_ngd.schedules.thor_paper import THOR_PRESETS, thor_schedules

__all__ = [
    "THOR_PRESETS",
    "GrowingInterval",
    "WarmupPolynomialDecay",
    "check_count",
    "check_interval",
    "check_positive",
    "check_positive_number",
    "check_seed",
    "check_split",
    "deserialize",
    "interval_at",
    "is_count",
    "is_number",
    "serialize",
    "thor_schedules",
    "value_at",
]
