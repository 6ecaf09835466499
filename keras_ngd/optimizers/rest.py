"""The update rule of the variables that no curvature describes."""

import keras

from keras_ngd import schedules

RESTS = ("adam", "sgd")

# Adam's share of the optimizer's learning rate, unless `rest_learning_rate` says otherwise.
ADAM_SHARE = 0.1


class _Adam:
    """What `keras.optimizers.Adam.update_step` asks of an optimizer: Adam's constants and moments, all else from `optimizer`."""

    beta_1, beta_2, epsilon, amsgrad = 0.9, 0.999, 1e-7, False

    def __init__(self, optimizer, momentums, velocities):
        self._optimizer, self._momentums, self._velocities = optimizer, momentums, velocities

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class RestRule:
    """Mixin: variables outside of all blocks follow Adam's rule, or the same rule as the blocks.

    A preconditioned gradient is a step of a size of its own, as Adam's is; a plain gradient is not, and at the rate that suits
    the first it moves embeddings and normalizations too little or too far.
    """

    _rest = None

    @staticmethod
    def _checked_rest(rest, rest_learning_rate):
        """The arguments `rest` and `rest_learning_rate`; a `ValueError` names what is wrong."""
        if rest not in RESTS:
            raise ValueError(f"`rest` must be one of {RESTS}. Received: rest={rest!r}")
        if rest_learning_rate is not None:
            rest_learning_rate = schedules.deserialize(rest_learning_rate)
            rest_learning_rate = schedules.check_positive("rest_learning_rate", rest_learning_rate)
        return rest, rest_learning_rate

    def build_rest(self, variables, blocks):
        """Finds those of `variables` that belong to none of `blocks`, and creates Adam's moments for them."""
        own = {self._var_key(v) for block in blocks for v in (block.kernel, block.bias) if v is not None}
        plain = [not (self._var_key(v) in own or self._overwrite_variable_with_gradient(v)) for v in variables]
        # All tables out of sight of Keras, which would track the variables in them once more.
        object.__setattr__(self, "_is_rest", plain)
        if self.rest != "adam":
            return

        def moments(name):
            return [
                self.add_variable_from_reference(v, name) if is_plain else None
                for v, is_plain in zip(variables, plain, strict=True)
            ]

        # Where there are momenta, those of the rest are free to be Adam's first moments.
        adam = _Adam(self, self.momentums if self.momentum else moments("rest_momentum"), moments("rest_velocity"))
        object.__setattr__(self, "_rest", adam)

    def update_step(self, gradient, variable, learning_rate):
        if not self._is_rest[self._get_variable_index(variable)]:
            super().update_step(gradient, variable, learning_rate)
            return
        if self.rest_learning_rate is not None:
            learning_rate = schedules.value_at(self.rest_learning_rate, self.iterations)
        elif self.rest == "adam":
            learning_rate = ADAM_SHARE * learning_rate
        if self.rest == "adam":
            keras.optimizers.Adam.update_step(self._rest, gradient, variable, learning_rate)
        else:
            super().update_step(gradient, variable, learning_rate)
