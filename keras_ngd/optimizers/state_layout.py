"""Where an optimizer's state lies on the devices of a `keras.distribution`: whole on each, or a part of it on each."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from keras_ngd import sharding
from keras_ngd.curvature import Curvature
from keras_ngd.optimizers.blocks import Block, Group
from keras_ngd.typing import AddVariable, Initializer, Shape, Tensor, Variable


def check_shard_state(shard_state: bool, gradient_worker_fraction: float) -> None:
    """Raises a `ValueError` if the argument `shard_state` is not possible here."""
    if not isinstance(shard_state, bool):
        raise ValueError(f"`shard_state` must be True or False. Received: shard_state={shard_state!r}")
    if shard_state and sharding.distribution() is None:
        raise ValueError(
            "`shard_state=True` is for several devices, but no `keras.distribution` of several devices is active on the JAX "
            "backend. Call `keras.distribution.set_distribution(keras.distribution.DataParallel())` before you make the "
            "optimizer and the model, or leave `shard_state` out."
        )
    if shard_state and gradient_worker_fraction != 1:
        raise ValueError(
            "`gradient_worker_fraction` is for workers of Horovod, `shard_state` for devices of a `keras.distribution`: set "
            f"one of them. Received: gradient_worker_fraction={gradient_worker_fraction!r}, shard_state=True"
        )


class StateLayout:
    """Adds an optimizer's variables where they are to lie.

    Args:
        add_variable: the optimizer's method of that name.
        shard_state: whether each device has a part of the curvatures, in place of all of them.
    """

    def __init__(self, add_variable: AddVariable, shard_state: bool) -> None:
        self._add_variable, self.shard_state = add_variable, shard_state

    def add(self, shape: Shape, initializer: Initializer, dtype: str, name: str, shard: bool = False) -> Variable:
        """A new variable of the optimizer that is whole on every device, or `shard`ed."""

        def add_variable(shape: Shape, initializer: Initializer) -> Variable:
            return self._add_variable(shape, initializer=initializer, dtype=dtype, name=name)

        spread = sharding.spread(shape, shard)
        return add_variable(shape, initializer) if spread is None else sharding.add(add_variable, initializer, spread)

    def add_curvature(self, shape: Shape, initializer: Initializer, dtype: str, name: str) -> Variable:
        """A new variable of a curvature's state."""
        return self.add(shape, initializer, dtype, name, self.shard_state)

    def refreshing(self, curvatures: Sequence[Curvature]) -> AbstractContextManager[None]:
        """The context in which the inverses of these curvatures are made, by all devices or by each its part."""
        # Under Horovod a worker may hold no inverses at all.
        variables = [v for curvature in curvatures for v in curvature.variables] if self.shard_state else []
        return sharding.dividing(sharding.spread_of(variables[0]).mesh if variables else None)


def gathered_averages(block: Block, averages: Mapping[Block, Sequence[Tensor]]) -> list[Tensor]:
    """A block's averages from a dict by block, each of them whole, as its curvature takes them."""
    return [sharding.gathered(v, t) for v, t in zip(block.statistics.averages, averages[block], strict=True)]


def laid_out(block: Block, averages: Sequence[Tensor]) -> list[Tensor]:
    """New values of the averages of a block's statistics, a list, where these lie."""
    spreads = [sharding.spread_of(v) for v in block.statistics.averages]
    return [t if s is None else s.laid_out(t) for t, s in zip(averages, spreads, strict=True)]


def on_all_devices(group: Group, gradients: Tensor) -> Tensor:
    """A group's gradients on all devices, before and after each has multiplied them with its part of the inverses."""
    spreads = [sharding.spread_of(v) for v in group.curvature.variables]
    if any(s is not None and s.axis is not None for s in spreads):
        return spreads[0].replicated(gradients)
    return gradients


def gathered_state(variables: Sequence[Variable], values: Sequence[Tensor] | None = None) -> list[Tensor]:
    """What variables of a curvature's state hold, each tensor of it whole, or `values` of these variables."""
    if values is None:
        return [sharding.gathered(v) for v in variables]
    return [sharding.gathered(v, t) for v, t in zip(variables, values, strict=True)]


def stored_state(variables: Sequence[Variable], state: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of a curvature's state as its variables keep them."""
    return [sharding.stored(v, t) for v, t in zip(variables, state, strict=True)]
