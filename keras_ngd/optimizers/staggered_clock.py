"""When which share of the layers is refreshed, where refreshes are spread over steps."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from keras import ops

from keras_ngd import schedules
from keras_ngd.optimizers.clock import Clock
from keras_ngd.typing import AddVariable, Tensor

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient


class _Turn(NamedTuple):
    """What is refreshed next, if that is at this step, and what comes after it.

    Attributes:
        whole: whether it is everything.
        begins: whether a round begins with it.
        share: which share it is where it is not everything.
        after: the value of `StaggeredClock.round` after it.
        following: the step of the next turn.
    """

    whole: Tensor
    begins: Tensor
    share: Tensor
    after: Tensor
    following: Tensor


class StaggeredClock(Clock):
    """The same in rounds: in each interval every share has one step of its own, at equal distances.

    With `n` shares share `s` is refreshed at the step `start + floor(s interval / n)`, and the next round begins at `start +
    interval`, with the interval of that step. Where something is known for the first time, and where all inverses are to be
    made anew, everything is refreshed at once, and share 0 has had its turn. So it is at the start of a round whose interval is
    shorter than there are shares, as while intervals grow from 1; such a round has no further turns. A turn that is missed is
    made up for at the next step, and those after it wait: no step has two.

    Args:
        optimizer: see `Clock`; its `shares` are those there are.
        add: its `StateLayout.add`.
    """

    def __init__(self, optimizer: "NaturalGradient", add: AddVariable) -> None:
        super().__init__(optimizer, add)
        self._shares = optimizer.shares.parts
        # Whose turn is next (0: everything's, else 1 more than the share), and the round's first step and interval.
        self.round = add((3,), "zeros", "int", "refresh_round")

    def renewed(
        self, step: Tensor, due: Tensor, renew: Callable[[Any], list[Tensor]], whole: Any, old: Sequence[Tensor]
    ) -> list[Tensor]:
        turn = self._turn(step)
        branch = ops.where(due, ops.where(turn.whole, 1, 2 + turn.share), 0)
        shares = [functools.partial(renew, share) for share in self._shares]
        return ops.switch(branch, [lambda: list(old), lambda: renew(whole), *shares])

    def refreshed(self, step: Tensor, due: Tensor) -> Tensor:
        turn, assign = self._turn(step), self._optimizer.assign
        for variable, value in ((self.round, turn.after), (self.next_inverses, turn.following)):
            assign(variable, ops.where(due, value, ops.convert_to_tensor(variable)))
        return due & turn.begins

    def refresh_at_once(self) -> None:
        super().refresh_at_once()
        self.round.assign([0, 0, 0])

    def _turn(self, step: Tensor) -> _Turn:
        optimizer, count = self._optimizer, max(len(self._shares), 1)
        turn, start, interval = ops.unstack(ops.cast(ops.convert_to_tensor(self.round), step.dtype), num=3)
        begins = turn <= 1
        start = ops.where(begins, step, start)
        now = schedules.interval_at(optimizer.inverse_interval, step, optimizer.interval_growth)
        interval = ops.where(begins, now, interval)
        short, share = interval < count, ops.maximum(turn - 1, 0)
        after = ops.where(short, 0, (share + 1) % count)
        return _Turn(
            whole=(turn == 0) | (begins & short),
            begins=begins,
            share=share,
            after=ops.stack([after + 1, start, interval]),
            following=start + ops.where(after == 0, interval, after * interval // count),
        )


def clock_of(optimizer: "NaturalGradient", add: AddVariable) -> Clock:
    """A new clock of the kind that an optimizer asks for, with variables of its `StateLayout.add`."""
    if optimizer.stagger:
        return StaggeredClock(optimizer, add)
    return Clock(optimizer, add, optimizer.refreshes_what_was_recorded)
