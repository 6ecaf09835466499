"""The unit of a damping that is relative to the curvature of a model."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from keras import ops

from keras_ngd.optimizers.blocks import Block, Group, Layout
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

    Attributes:
        variables: those that a refresh renews, the unit the first of them; none where it is 1.
    """

    def __init__(self, optimizer: "NaturalGradient", add: AddVariable) -> None:
        self._optimizer = optimizer
        self.variables: list[Variable] = []
        if optimizer.damping_mode == GLOBAL:
            self.variables = [add((), "ones", "float32", "mean_curvature")]

    def times(self, damping: Tensor, measured: Sequence[Tensor] | None = None) -> Tensor:
        """A damping in the units of the curvature: by what was `measured`, or as of the last refresh."""
        for unit in (self.variables if measured is None else measured)[:1]:
            damping = damping * ops.convert_to_tensor(unit)
        return damping

    def measured(
        self, layout: Layout, stacked: Callable[[Group], Sequence[Tensor]], old: Sequence[Tensor]
    ) -> list[Tensor]:
        """New values of `variables`, where a part of the layout is refreshed.

        Args:
            layout: that part, or all of it.
            stacked: what curvatures are refreshed with, a function of their group.
            old: the values as they are.
        """
        if not self.variables:
            return []
        exchange, sums = self._optimizer.exchange, []
        for group in exchange.measured_layout_of(layout).groups:
            trace = _traces(group, stacked)
            parameters = group.curvature.size * ops.sum(ops.cast(trace > 0, "float32"))
            sums.append(ops.stack([ops.sum(trace), parameters]))
        nothing = ops.broadcast_to(_nothing(old[0]), (2,))
        return [_mean(exchange.total(sum(sums, nothing)))]


class BlockwiseDampingUnit(DampingUnit):
    """The same where refreshes are spread over steps: of each block's trace as of its own last turn.

    So a step measures no more than what it refreshes.
    """

    def __init__(self, optimizer: "NaturalGradient", add: AddVariable) -> None:
        super().__init__(optimizer, add)
        if self.variables:
            self.variables.append(add((2, len(optimizer.layout.blocks)), "zeros", "float32", "curvature_by_block"))

    def measured(
        self, layout: Layout, stacked: Callable[[Group], Sequence[Tensor]], old: Sequence[Tensor]
    ) -> list[Tensor]:
        if not self.variables:
            return []
        exchange = self._optimizer.exchange
        found: dict[Block, Tensor] = {}
        for group in exchange.measured_layout_of(layout).groups:
            trace = _traces(group, stacked)
            parameters = group.curvature.size * ops.cast(trace > 0, "float32")
            pairs = ops.stack([group.of_blocks(trace), group.of_blocks(parameters)], axis=1)
            found |= dict(zip(group.blocks, ops.unstack(pairs, num=len(group.blocks)), strict=True))
        blocks, none = self._optimizer.layout.blocks, _nothing(old[1][:, 0])
        new = exchange.total(ops.stack([found.get(block, none) for block in blocks], axis=1))
        renewed = set(layout.blocks)
        by_block = ops.where(ops.convert_to_tensor([[block in renewed for block in blocks]]), new, old[1])
        return [_mean(ops.sum(by_block, axis=1)), by_block]


def _traces(group: Group, stacked: Callable[[Group], Sequence[Tensor]]) -> Tensor:
    """`[k]`, those of a group's Fisher blocks; 0 where one is not finite."""
    trace = group.curvature.trace(stacked(group))
    return ops.cast(ops.where(ops.isfinite(trace), trace, 0.0), "float32")


def _nothing(like: Tensor) -> Tensor:
    """Zeros that are no constant, of which TensorFlow would run the exchange while it compiles: a worker may own no layer."""
    return ops.clip(like, 0.0, 0.0)


def _mean(sums: Tensor) -> Tensor:
    """The mean eigenvalue, from the sum of traces and the number of parameters."""
    total, parameters = ops.unstack(sums, num=2)
    # Of curvature that is zero nothing is known.
    return ops.where(total > 0, total / ops.maximum(parameters, 1.0), 1.0)
