"""The update rule of the variables that no curvature describes."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from keras import ops

from keras_ngd import backend, schedules
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


# Keras's defaults of Adam.
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-7


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
        self._shared: dict[str, list[Tensor]] = {}
        if optimizer.rest != "adam":
            return

        def moments(name: str) -> list[Variable | None]:
            return [
                None if of_block else optimizer.add_variable_from_reference(v, name)
                for v, of_block in zip(variables, captured, strict=True)
            ]

        # Where there are momenta, those of the rest are free to be Adam's first moments.
        self._momentums = optimizer.momentums if optimizer.momentum else moments("rest_momentum")
        self._velocities = moments("rest_velocity")

    def follows(self, index: int) -> bool:
        """Whether the variable of this index does."""
        return not self._captured[index]

    @contextlib.contextmanager
    def one_step(self) -> Iterator[None]:
        """Within it `update_step` is called for the variables of one step, all with one learning rate."""
        self._shared.clear()
        try:
            yield
        finally:
            # No tensor of a trace outlives it.
            self._shared.clear()

    def update_step(
        self,
        gradient: Tensor,
        variable: Variable,
        learning_rate: Tensor,
        otherwise: Callable[[Tensor, Variable, Tensor], None],
    ) -> None:
        """Updates a variable that follows the rule, by `otherwise(gradient, variable, learning_rate)` if that is the blocks'."""
        if self._optimizer.rest == "adam":
            self._adam(gradient, variable, learning_rate)
        else:
            otherwise(gradient, variable, self._rate(learning_rate))

    def _rate(self, learning_rate: Tensor) -> Tensor:
        """The rate of the rest where that of the blocks is `learning_rate`."""
        optimizer = self._optimizer
        if optimizer.rest_learning_rate is not None:
            return schedules.value_at(optimizer.rest_learning_rate, optimizer.iterations)
        return optimizer.rest_share * learning_rate if optimizer.rest == "adam" else learning_rate

    def _adam(self, gradient: Tensor, variable: Variable, learning_rate: Tensor) -> None:
        """`keras.optimizers.Adam.update_step`, whose rate with its bias correction is computed once a step, for all variables."""
        optimizer, dtype = self._optimizer, backend.dtype_name(variable)
        if dtype not in self._shared:
            rate, step = (ops.cast(value, dtype) for value in (self._rate(learning_rate), optimizer.iterations + 1))
            unseen_1, unseen_2 = (1 - ops.power(ops.cast(beta, dtype), step) for beta in (_BETA_1, _BETA_2))
            found = (rate * ops.sqrt(unseen_2) / unseen_1, _BETA_1, _BETA_2, _EPSILON)
            self._shared[dtype] = [ops.convert_to_tensor(value, dtype) for value in found]
        index, gradient = optimizer._get_variable_index(variable), ops.cast(gradient, dtype)
        m, v = self._momentums[index], self._velocities[index]
        if backend.adam_step(variable, m, v, gradient, *self._shared[dtype]):
            return
        # As Keras writes it: of a sparse gradient only ops of Keras's make a sparse one.
        optimizer.assign_add(m, ops.multiply(ops.subtract(gradient, m), 1 - _BETA_1))
        optimizer.assign_add(v, ops.multiply(ops.subtract(ops.square(gradient), v), 1 - _BETA_2))
        length = ops.add(ops.sqrt(v), _EPSILON)
        optimizer.assign_sub(variable, ops.divide(ops.multiply(m, self._shared[dtype][0]), length))
