"""Values that may change during training: dampings and update intervals."""

import numbers

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule


def is_number(value):
    """Whether a value is a real number, of Python or of NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_positive(name, value):
    """Returns a damping as a float or a `LearningRateSchedule`; a `ValueError` names what is wrong."""
    if isinstance(value, LearningRateSchedule):
        return value
    if not is_number(value) or not 0 < value < float("inf"):
        raise ValueError(
            f"`{name}` must be a positive float or a `keras.optimizers.schedules.LearningRateSchedule`. "
            f"Received: {name}={value!r}"
        )
    return float(value)


def check_interval(name, value):
    """Returns an interval as an int or a `LearningRateSchedule`; a `ValueError` names what is wrong."""
    if isinstance(value, LearningRateSchedule):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(
            f"`{name}` must be an int of at least 1, in training steps, or a "
            f"`keras.optimizers.schedules.LearningRateSchedule` of such values. Received: {name}={value!r}"
        )
    return int(value)


def value_at(value, step):
    """A float or schedule at a step, as a float32 tensor."""
    if isinstance(value, LearningRateSchedule):
        value = value(step)
    return ops.cast(value, "float32")


def interval_at(value, step):
    """An int or schedule at a step, as an integer tensor of the step's dtype, at least 1."""
    step = ops.convert_to_tensor(step)
    if isinstance(value, LearningRateSchedule):
        value = ops.maximum(ops.round(value(step)), 1)
    return ops.cast(value, step.dtype)


def serialize(value):
    """A number as it is, a schedule as its config."""
    return keras.saving.serialize_keras_object(value) if isinstance(value, LearningRateSchedule) else value


def deserialize(value):
    """The inverse of `serialize`."""
    return keras.saving.deserialize_keras_object(value) if isinstance(value, dict) else value
