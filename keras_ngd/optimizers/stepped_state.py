"""The part of curvatures' states that every step renews: only where the step is taken, and of layers that were called."""

from typing import TYPE_CHECKING

from keras import ops

from keras_ngd import sharding
from keras_ngd.optimizers.blocks import Group
from keras_ngd.typing import Tensor, Variable

if TYPE_CHECKING:
    from keras_ngd.optimizers.arrivals import Arrived
    from keras_ngd.optimizers.natural_gradient import NaturalGradient


class SteppedState:
    """Of one step: what the state is to be replaced with, kept until it is known whether the step is taken.

    It is in the units of the loss, whatever scale that travels with.

    Args:
        optimizer: whose step it is.
        arrived: what came of its statistics.
    """

    def __init__(self, optimizer: "NaturalGradient", arrived: "Arrived") -> None:
        self._optimizer = optimizer
        self._examples = arrived.examples_of_all
        self._positions = {block: i for i, block in enumerate(optimizer.layout.blocks)}
        self._new: list[tuple[Variable, Tensor, Tensor]] = []
        self.finite = ops.ones((), "bool")

    def renewed(self, group: Group, v: Tensor, state: list[Tensor]) -> list[Tensor]:
        """A group's state as this step's directions are made with it.

        Args:
            group: see above.
            v: its gradients, without the loss scale.
            state: as it was before.
        """
        curvature, called = group.curvature, self.called(group)
        new = curvature.stepped(v, state, lambda: self._scale(group))
        for variable, value in zip(curvature.stepped_variables, new, strict=True):
            self.finite = self.finite & ops.isfinite(ops.sum(ops.cast(value, "float32")))
            self._new.append((variable, value, called))
        return curvature.with_stepped(state, new)

    def called(self, group: Group) -> Tensor:
        """`[k]`, whether a group's blocks belong to layers that were called on any worker."""
        return group.repeated(self._examples_of(group) > 0)

    def _examples_of(self, group: Group) -> Tensor:
        """`[blocks]` of a group, how many examples they saw."""
        return ops.take(self._examples, [self._positions[block] for block in group.blocks])

    def _scale(self, group: Group) -> Tensor:
        """`[k]`, see `Curvature.stepped`."""
        optimizer = self._optimizer
        ratios = ops.stack([optimizer.ratio_of(block.statistics) for block in group.blocks])
        scales = group.repeated(self._examples_of(group) * optimizer.losses_in_statistics * ratios)
        return ops.cast(scales, group.curvature.dtype)

    def assign(self, taken: Tensor) -> None:
        """Replaces the state, if the step is `taken`."""
        for variable, value, called in self._new:
            old = sharding.gathered(variable)
            chosen = ops.reshape(taken & called, (-1,) + (1,) * (len(value.shape) - 1))
            self._optimizer.assign(variable, sharding.stored(variable, ops.where(chosen, value, old)))
