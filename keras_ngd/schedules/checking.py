"""What arguments must be: numbers, counts, and schedules of them. Each check returns the argument as it is kept."""

import numbers
from typing import Any, TypeGuard

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_ngd.typing import DampingLike, IntervalLike


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number, of Python or of NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer of at least 1, of Python or of NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def check_positive(name: str, value: Any) -> DampingLike:
    """Returns a damping as a float or a `LearningRateSchedule`; a `ValueError` names what is wrong."""
    if isinstance(value, LearningRateSchedule):
        return value
    if not is_number(value) or not 0 < value < float("inf"):
        raise ValueError(
            f"`{name}` must be a positive float or a `keras.optimizers.schedules.LearningRateSchedule`. "
            f"Received: {name}={value!r}"
        )
    return float(value)


def check_interval(name: str, value: Any) -> IntervalLike:
    """Returns an interval as an int or a `LearningRateSchedule`; a `ValueError` names what is wrong."""
    if isinstance(value, LearningRateSchedule):
        for step in (0, 1, *(10**k for k in range(1, 7))):
            interval = float(ops.convert_to_numpy(value(step)))
            if not interval >= 0.5:
                raise ValueError(
                    f"`{name}` must be a schedule of intervals of at least 1 step. Received: {name}={value!r}, which is "
                    f"{interval} at step {step}"
                )
        return value
    if not is_count(value):
        raise ValueError(
            f"`{name}` must be an int of at least 1, in training steps, or a "
            f"`keras.optimizers.schedules.LearningRateSchedule` of such values. Received: {name}={value!r}"
        )
    return int(value)


def check_positive_number(name: str, value: Any) -> float:
    """Returns a float above 0; a `ValueError` names what is wrong."""
    if not is_number(value) or not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be a number above 0. Received: {name}={value!r}")
    return float(value)


def check_count(name: str, value: Any) -> int:
    """Returns an int of at least 1; a `ValueError` names what is wrong."""
    if not is_count(value):
        raise ValueError(f"`{name}` must be an int of at least 1. Received: {name}={value!r}")
    return int(value)


def check_seed(name: str, value: Any) -> int:
    """Returns an int in [0, 2**12); a `ValueError` names what is wrong."""
    # With a layer's number of 12 bits beside it, it must be exact as a float32.
    if not (is_count(value) or (isinstance(value, numbers.Integral) and value == 0)) or int(value) >= 2**12:
        raise ValueError(f"`{name}` must be an int in [0, 2**12). Received: {name}={value!r}")
    return int(value)


def check_split(name: str, value: Any) -> int | None:
    """Returns a block size as an int, or None; a `ValueError` names what is wrong."""
    if value is None:
        return None
    if not is_count(value):
        raise ValueError(
            f"`{name}` must be an int of at least 1, the size of the blocks, or None. Received: {name}={value!r}"
        )
    return int(value)
