"""What is left of an optimizer without its method."""

from typing import TYPE_CHECKING

import keras
from keras import ops

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient


def plain_sgd(optimizer: "NaturalGradient") -> keras.optimizers.SGD:
    """A new `keras.optimizers.SGD` at this optimizer's step, with those of its arguments that SGD has."""
    rate = optimizer._learning_rate
    known_to_keras = isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)
    if not known_to_keras or type(rate).__module__.startswith("keras_ngd"):
        rate = float(ops.convert_to_numpy(optimizer.learning_rate))
    known = keras.optimizers.SGD().get_config()
    config = {name: value for name, value in keras.optimizers.SGD.get_config(optimizer).items() if name in known}
    sgd = keras.optimizers.SGD(**{**config, "learning_rate": rate, "name": known["name"]})
    sgd.iterations.assign(optimizer.iterations)
    return sgd
