"""The unit of a damping that is relative to the curvature of a model."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from keras import ops

from keras_ngd.optimizers.blocks import Group
from keras_ngd.typing import AddVariable, Tensor, Variable

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient

GLOBAL = "global"


class DampingUnit:
    """What an optimizer's damping is multiplied with: 1, or, with `damping_mode="global"`, the mean eigenvalue of all blocks,

        sum over blocks of tr F / sum over blocks of the number of parameters,

    of those whose trace is above 0, as of the last refresh. A damping in units of each layer's own curvature would let layers of
    little curvature take steps as much longer: those of a Transformer's attention, whose curvature changes fast, are too long.

    Args:
        optimizer: whose damping it is: its `damping_mode` and `layout` are looked at.
        add: its `StateLayout.add`.
    """

    def __init__(self, optimizer: "NaturalGradient", add: AddVariable) -> None:
        self._optimizer = optimizer
        self.variables: list[Variable] = []
        if optimizer.damping_mode == GLOBAL:
            self.variables = [add((), "ones", "float32", "mean_curvature")]

    def times(self, damping: Tensor, measured: Sequence[Tensor] | None = None) -> Tensor:
        """A damping in the units of the curvature: by what was `measured`, or as of the last refresh."""
        for unit in self.variables if measured is None else measured:
            damping = damping * ops.convert_to_tensor(unit)
        return damping

    def measured(self, stacked: Callable[[Group], Sequence[Tensor]]) -> list[Tensor]:
        """New values of `variables`, from what curvatures are refreshed with, a function of their group."""
        if not self.variables:
            return []
        exchange, sums = self._optimizer.exchange, []
        for group in exchange.measured_layout.groups:
            trace = group.curvature.trace(stacked(group))
            trace = ops.cast(ops.where(ops.isfinite(trace), trace, 0.0), "float32")
            parameters = group.curvature.size * ops.sum(ops.cast(trace > 0, "float32"))
            sums.append(ops.stack([ops.sum(trace), parameters]))
        # A worker may own no layer.
        total, parameters = ops.unstack(exchange.total(sum(sums, ops.zeros((2,), "float32"))), num=2)
        # Of curvature that is zero nothing is known.
        return [ops.where(total > 0, total / ops.maximum(parameters, 1.0), 1.0)]
