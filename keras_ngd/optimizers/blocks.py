"""Pairs the variables an optimizer is given into blocks: parameters and the statistics that describe them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from keras import ops

from keras_ngd import backend
from keras_ngd.typing import Tensor, Variable

if TYPE_CHECKING:
    from keras_ngd.layers.geometry import Geometry


@dataclass(frozen=True, eq=False)
class Block:
    """One weight matrix of a captured layer, as the optimizer sees it.

    Attributes:
        layer: the layer's path, and the part's name where it has several.
        variables: the parameters that the matrix is made of: a kernel, and its bias where there is one.
        statistics: those that describe it.
    """

    layer: str
    variables: Sequence[Variable]
    statistics: Any

    @classmethod
    def of(cls, statistics: Any) -> "Block":
        """The block that these statistics, of a captured layer, describe."""
        return cls(statistics.path_of_part(), tuple(statistics.parameters()), statistics)

    @property
    def geometry(self) -> "Geometry":
        return self.statistics.geometry

    @property
    def shape(self) -> tuple[int, int, Any]:
        """`(input_dim, output_dim, dtype)`."""
        return self.geometry.input_dim, self.geometry.output_dim, self.statistics.averages[0].dtype

    @property
    def kind(self) -> tuple[Any, ...]:
        """Blocks of one kind, whose statistics have equal shapes too, share batched computations."""
        return (self.geometry.structure, *self.shape, *(tuple(v.shape[1:]) for v in self.statistics.averages))


@dataclass(eq=False)
class Group:
    """All blocks of one kind, and their curvature."""

    blocks: list[Block] = field(default_factory=list)
    curvature: Any = None

    @property
    def count(self) -> int:
        return sum(block.geometry.groups for block in self.blocks)

    def stacked(self, tensors: Mapping[Block, Sequence[Tensor]]) -> list[Tensor]:
        """The tensors of a dict from blocks to lists of them, joined over the blocks of the group: a list."""
        return [backend.concatenated(parts) for parts in zip(*(tensors[block] for block in self.blocks), strict=True)]

    def of_each(self, values: Mapping[Block, Tensor]) -> Tensor:
        """`[k]`, from a scalar for each block, which may be several of the `k`: a convolution's groups."""
        return self.repeated(ops.stack([values[block] for block in self.blocks]))

    def repeated(self, values: Tensor) -> Tensor:
        """`[k]`, from `[blocks]`."""
        counts = [block.geometry.groups for block in self.blocks]
        return values if max(counts) == 1 else ops.take(values, np.repeat(np.arange(len(counts)), counts))

    def of_blocks(self, values: Tensor) -> Tensor:
        """`[blocks]`, the sums of the values `[k]` of each."""
        counts = [block.geometry.groups for block in self.blocks]
        if max(counts) == 1:
            return values
        return ops.stack([ops.sum(part) for part in backend.parts(values, counts)])

    def parts(self, stacked: Tensor) -> Iterable[tuple[Block, Tensor]]:
        """Pairs of every block and its part of what the curvature stacks."""
        return zip(self.blocks, backend.parts(stacked, [block.geometry.groups for block in self.blocks]), strict=True)


class Signals:
    """What a step is given: a gradient for each variable, dense, sparse or None. Those of statistics are what probes emitted.

    Args:
        grads: list of the gradients.
        variables: list of the variables.
        key: function that gives a variable's identity.
        is_overwritten: function that tells whether a variable is overwritten with its gradient.
    """

    def __init__(
        self,
        grads: Sequence[Tensor],
        variables: Sequence[Variable],
        key: Callable[[Variable], Any],
        is_overwritten: Callable[[Variable], bool],
    ) -> None:
        self.grads, self.variables, self.key, self.is_overwritten = grads, variables, key, is_overwritten
        self._positions = {key(v): i for i, v in enumerate(variables)}

    def index(self, variable: Variable) -> int:
        """The position of a variable."""
        return self._positions[self.key(variable)]

    def of(self, variable: Variable) -> Tensor:
        """The gradient of a variable."""
        return self.grads[self.index(variable)]

    def of_block(self, block: Block) -> list[Tensor]:
        """The gradients of a block's variables."""
        return [self.of(v) for v in block.variables]

    def with_dense(self, blocks: Iterable[Block]) -> "Signals":
        """The same with the sparse gradients of these blocks' variables as dense ones, as preconditioned ones are."""
        grads = list(self.grads)
        for index in (self.index(v) for block in blocks for v in block.variables):
            grads[index] = backend.dense(grads[index]) if backend.is_sparse(grads[index]) else grads[index]
        return self.with_gradients(grads)

    def with_gradients(self, grads: Sequence[Tensor]) -> "Signals":
        """The same of other gradients."""
        return Signals(grads, self.variables, self.key, self.is_overwritten)


def find_blocks(variables: Sequence[Variable], key: Callable[[Variable], Any]) -> list[Block]:
    """The blocks among `variables`, in their order; `key` gives a variable's identity.

    Raises:
        ValueError: where a layer's statistics are among the variables but its parameters are not.
    """
    known = {key(v) for v in variables}
    blocks, seen = [], set()
    for variable in variables:
        statistics = getattr(variable, "keras_ngd_statistics", None)
        if statistics is None or id(statistics) in seen:
            continue
        seen.add(id(statistics))
        block = Block.of(statistics)
        for part in block.variables:
            if key(part) not in known:
                raise ValueError(
                    f"Layer {block.layer!r} was captured, but its variable {part.path!r} is not trainable. Set "
                    "`trainable` on whole layers, and call `keras_ngd.capture(model, optimizer)` again with a new optimizer."
                )
        blocks.append(block)
    return blocks


class Layout:
    """The blocks of a model, and the same blocks grouped by kind, in order of first appearance."""

    def __init__(self, blocks: Iterable[Block] = ()) -> None:
        self.blocks = list(blocks)

    @cached_property
    def groups(self) -> list[Group]:
        groups: dict[tuple[Any, ...], Group] = {}
        for block in self.blocks:
            groups.setdefault(block.kind, Group()).blocks.append(block)
        return list(groups.values())

    def part(self, blocks: Iterable[Block], make_curvature: Callable[[Group], Any]) -> "Layout":
        """The layout of some of the blocks, with curvatures for these from `make_curvature(group)`."""
        part = Layout(blocks)
        for group in part.groups:
            group.curvature = make_curvature(group)
        return part
