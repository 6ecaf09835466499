"""Values that may change during training: what they are at a step, and schedules of our own."""

import fractions
import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_ngd.schedules.checking import check_count, is_number
from keras_ngd.typing import Config, IntervalLike, RateLike, Tensor


def value_at(value: RateLike, step: Tensor) -> Tensor:
    """A float or schedule at a step, as a float32 tensor."""
    if isinstance(value, LearningRateSchedule):
        value = value(step)
    return ops.cast(value, "float32")


def interval_at(value: IntervalLike, step: Tensor, growth: float | None = None) -> Tensor:
    """An int or schedule at a step, as an integer tensor of the step's dtype, at least 1.

    With `growth` an int is at most this share of the steps so far.
    """
    step = ops.convert_to_tensor(step)
    if isinstance(value, LearningRateSchedule):
        value = ops.maximum(ops.round(value(step)), 1)
    elif growth is not None:
        value = ops.clip(ops.floor(growth * ops.cast(step, "float32")), 1, value)
    return ops.cast(value, step.dtype)


def serialize(value: Any) -> Any:
    """A number as it is, a schedule as its config."""
    return keras.saving.serialize_keras_object(value) if isinstance(value, LearningRateSchedule) else value


def deserialize(value: Any) -> Any:
    """The inverse of `serialize`."""
    return keras.saving.deserialize_keras_object(value) if isinstance(value, dict) else value


@keras.saving.register_keras_serializable("keras_ngd")
class GrowingInterval(LearningRateSchedule):
    """An update interval that grows: the Fisher matrix settles during training (THOR, "Update with Trace Constraint").

    Geometric, from one update to the next, `interval <- min(maximum, ceil(growth * interval))`, or piecewise constant in
    the step. Give one of them.

    ```python
    keras_ngd.THOR(factor_interval=GrowingInterval(5, growth=1.2, maximum=100), ...)
    keras_ngd.THOR(inverse_interval=GrowingInterval(boundaries=[1000, 5000], values=[50, 200, 800]), ...)
    ```

    Args:
        initial: int of at least 1, the first interval, in steps.
        growth: float of at least 1. Default 1.1.
        maximum: int, no less than `initial`.
        boundaries: increasing ints; the interval changes at these steps.
        values: ints of at least 1, one more than `boundaries`.
        name: optional.
    """

    def __init__(
        self,
        initial: int | None = None,
        growth: float = 1.1,
        maximum: int | None = None,
        boundaries: Sequence[int] | None = None,
        values: Sequence[int] | None = None,
        name: str = "growing_interval",
    ) -> None:
        super().__init__()
        if (initial is None) == (values is None):
            raise ValueError(
                "Give either `initial`, `growth` and `maximum`, or `boundaries` and `values`. "
                f"Received: initial={initial!r}, values={values!r}"
            )
        self.initial, self.growth, self.maximum = initial, growth, maximum
        self.boundaries, self.values, self.name = boundaries, values, name
        self._starts, self._intervals = self._geometric() if values is None else self._piecewise()

    def _geometric(self) -> tuple[list[int], list[int]]:
        interval, maximum = check_count("initial", self.initial), check_count("maximum", self.maximum)
        if maximum < interval:
            raise ValueError(f"`maximum` must be no less than `initial`. Received: {maximum} and {interval}")
        if not is_number(self.growth) or not 1 <= self.growth < float("inf"):
            raise ValueError(f"`growth` must be a number of at least 1. Received: growth={self.growth!r}")
        starts, intervals = [0], [interval]
        # Exactly, so that 1.1 * 10 is 11 and not a little more.
        growth = fractions.Fraction(str(float(self.growth)))
        while interval < maximum and growth > 1:
            starts.append(starts[-1] + interval)
            interval = min(maximum, math.ceil(growth * interval))
            intervals.append(interval)
        return starts, intervals

    def _piecewise(self) -> tuple[list[int], list[int]]:
        boundaries = [check_count("boundaries", b) for b in self.boundaries or ()]
        values = [check_count("values", v) for v in self.values or ()]
        if len(values) != len(boundaries) + 1 or boundaries != sorted(set(boundaries)):
            raise ValueError(
                "`boundaries` must increase and `values` have one entry more. Received: "
                f"boundaries={self.boundaries!r}, values={self.values!r}"
            )
        return [0, *boundaries], values

    def __call__(self, step: Tensor) -> Tensor:
        step = ops.cast(step, "int32")
        reached = ops.sum(
            ops.cast(ops.expand_dims(step, -1) >= ops.convert_to_tensor(self._starts, "int32"), "int32"), -1
        )
        return ops.cast(ops.take(ops.convert_to_tensor(self._intervals, "int32"), reached - 1), "float32")

    def get_config(self) -> Config:
        return {
            "initial": self.initial,
            "growth": self.growth,
            "maximum": self.maximum,
            "boundaries": self.boundaries,
            "values": self.values,
            "name": self.name,
        }


@keras.saving.register_keras_serializable("keras_ngd")
class WarmupPolynomialDecay(LearningRateSchedule):
    """A linear rise, then a polynomial decay to zero (THOR, eq. 15).

        rate = initial + (target - initial) step / warmup_steps                     up to warmup_steps
        rate = target max(0, 1 - (step - warmup_steps) / decay_steps) ^ power       after it

    Args:
        initial: float, the rate at step 0.
        target: float, the rate at the end of the warm-up.
        warmup_steps: int of at least 1.
        decay_steps: int of at least 1, counted from the end of the warm-up.
        power: positive float.
        name: optional.
    """

    def __init__(
        self,
        initial: float,
        target: float,
        warmup_steps: int,
        decay_steps: int,
        power: float,
        name: str = "warmup_polynomial_decay",
    ) -> None:
        super().__init__()
        self.initial, self.target = initial, target
        self.warmup_steps = check_count("warmup_steps", warmup_steps)
        self.decay_steps = check_count("decay_steps", decay_steps)
        if not is_number(power) or not power > 0:
            raise ValueError(f"`power` must be a positive number. Received: power={power!r}")
        self.power, self.name = power, name

    def __call__(self, step: Tensor) -> Tensor:
        step = ops.cast(step, "float32")
        rising = self.initial + (self.target - self.initial) * step / self.warmup_steps
        left = ops.maximum(0.0, 1 - (step - self.warmup_steps) / self.decay_steps)
        falling = self.target * ops.power(ops.minimum(left, 1.0), self.power)
        return ops.where(step <= self.warmup_steps, rising, falling)

    def get_config(self) -> Config:
        return {
            "initial": self.initial,
            "target": self.target,
            "warmup_steps": self.warmup_steps,
            "decay_steps": self.decay_steps,
            "power": self.power,
            "name": self.name,
        }
