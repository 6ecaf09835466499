"""The update rule of the variables that no curvature describes."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras

from keras_ngd import schedules
from keras_ngd.typing import DampingLike, Tensor, Variable

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient

RESTS = ("adam", "sgd")


def checked_rest(rest: str, rest_learning_rate: DampingLike | None) -> tuple[str, DampingLike | None]:
    """The arguments `rest` and `rest_learning_rate`; a `ValueError` names what is wrong."""
    if rest not in RESTS:
        raise ValueError(f"`rest` must be one of {RESTS}. Received: rest={rest!r}")
    if rest_learning_rate is not None:
        rest_learning_rate = schedules.deserialize(rest_learning_rate)
        rest_learning_rate = schedules.check_positive("rest_learning_rate", rest_learning_rate)
    return rest, rest_learning_rate


class _Adam:
    """What `keras.optimizers.Adam.update_step` asks of an optimizer: Adam's constants and moments, all else from `optimizer`."""

    beta_1, beta_2, epsilon, amsgrad = 0.9, 0.999, 1e-7, False

    def __init__(
        self, optimizer: "NaturalGradient", momentums: Sequence[Variable | None], velocities: Sequence[Variable | None]
    ) -> None:
        self._optimizer, self._momentums, self._velocities = optimizer, momentums, velocities

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class RestRule:
    """The rule of variables outside of all blocks: Adam's, or the same as the blocks'.

    A preconditioned gradient is a step of a size of its own, as Adam's is; a plain gradient is not, and at the rate that suits
    the first it moves embeddings and normalizations too little or too far.

    Args:
        optimizer: whose arguments `rest` and `rest_learning_rate` are looked at.
        variables: all of its variables, in order.
        captured: for each whether it is one of a block, or overwritten.
    """

    def __init__(self, optimizer: "NaturalGradient", variables: Sequence[Variable], captured: Sequence[bool]) -> None:
        self._optimizer, self._captured = optimizer, captured
        self._adam = None
        if optimizer.rest != "adam":
            return

        def moments(name: str) -> list[Variable | None]:
            return [
                None if of_block else optimizer.add_variable_from_reference(v, name)
                for v, of_block in zip(variables, captured, strict=True)
            ]

        # Where there are momenta, those of the rest are free to be Adam's first moments.
        first = optimizer.momentums if optimizer.momentum else moments("rest_momentum")
        self._adam = _Adam(optimizer, first, moments("rest_velocity"))

    def follows(self, index: int) -> bool:
        """Whether the variable of this index does."""
        return not self._captured[index]

    def update_step(
        self,
        gradient: Tensor,
        variable: Variable,
        learning_rate: Tensor,
        otherwise: Callable[[Tensor, Variable, Tensor], None],
    ) -> None:
        """Updates a variable that follows the rule, by `otherwise(gradient, variable, learning_rate)` if that is the blocks'."""
        optimizer = self._optimizer
        if optimizer.rest_learning_rate is not None:
            learning_rate = schedules.value_at(optimizer.rest_learning_rate, optimizer.iterations)
        elif optimizer.rest == "adam":
            learning_rate = optimizer.rest_share * learning_rate
        if self._adam is None:
            otherwise(gradient, variable, learning_rate)
        else:
            keras.optimizers.Adam.update_step(self._adam, gradient, variable, learning_rate)
