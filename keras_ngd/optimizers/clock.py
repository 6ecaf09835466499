"""When statistics are recorded and inverses refreshed."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_ngd import schedules
from keras_ngd.typing import AddVariable, IntervalLike, Tensor

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient


class Clock:
    """The steps at which the next batch enters the statistics, and the next refresh of the inverses is due.

    Args:
        optimizer: whose they are: its `factor_interval`, `inverse_interval` and `interval_growth` are looked at in every step.
        add: its `StateLayout.add`.
        refreshes_what_was_recorded: whether inverses are made of each batch that was recorded, and of no other.
    """

    def __init__(
        self, optimizer: "NaturalGradient", add: AddVariable, refreshes_what_was_recorded: bool = False
    ) -> None:
        self._optimizer, self._tied = optimizer, refreshes_what_was_recorded
        self.next_factors = add((), "zeros", "int", "next_factor_step")
        self.next_inverses = add((), "zeros", "int", "next_inverse_step")

    def records_next(self, step: Tensor) -> Tensor:
        """Whether the batch after that of `step` is to enter the statistics."""
        return step + 1 >= ops.convert_to_tensor(self.next_factors)

    def recorded(self, step: Tensor, done: Tensor) -> None:
        """Told whether the batch of `step` has entered the statistics, or is not to be tried again at once."""
        self._set("next_factors", self._optimizer.factor_interval, step, done)

    def refresh_due(self, step: Tensor, recorded: Tensor, known: Tensor) -> Tensor:
        """Whether inverses are to be refreshed at `step`.

        Args:
            step: scalar.
            recorded: whether this step has recorded statistics.
            known: whether any step ever has.
        """
        return recorded if self._tied else known & (step >= ops.convert_to_tensor(self.next_inverses))

    def renewed(
        self, step: Tensor, due: Tensor, renew: Callable[[Any], list[Tensor]], whole: Any, old: Sequence[Tensor]
    ) -> list[Tensor]:
        """What a refresh makes of some tensors, if one is `due`.

        Args:
            step: scalar.
            due: as `refresh_due` has it, or fewer.
            renew: function of what is to be refreshed to the new tensors.
            whole: what that is where it is everything.
            old: the tensors as they are.
        """
        return ops.cond(due, lambda: renew(whole), lambda: list(old))

    def refreshed(self, step: Tensor, due: Tensor) -> Tensor:
        """Told whether inverses were refreshed at `step`; says whether that began a refresh of all layers."""
        self._set("next_inverses", self._optimizer.inverse_interval, step, due)
        return due

    def refresh_at_once(self) -> None:
        """Has the inverses refreshed at the next step."""
        self.next_inverses.assign(0)

    def _set(self, name: str, interval: IntervalLike, step: Tensor, done: Tensor) -> None:
        variable = getattr(self, name)
        following = step + schedules.interval_at(interval, step, self._optimizer.interval_growth)
        self._optimizer.assign(variable, ops.where(done, following, ops.convert_to_tensor(variable)))
