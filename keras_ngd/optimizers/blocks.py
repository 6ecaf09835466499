"""Pairs the variables an optimizer is given into blocks: kernel, bias and the statistics that describe both."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from keras_ngd import backend, keras_private


@dataclass(frozen=True, eq=False)
class Block:
    """One captured layer as the optimizer sees it."""

    layer: str
    kernel: Any
    bias: Any
    statistics: Any

    @property
    def rows(self):
        return self.statistics.rows

    @property
    def shape(self):
        """`(input_dim, output_dim, dtype)`."""
        return self.rows.input_dim, self.rows.output_dim, self.statistics.averages[0].dtype

    @property
    def kind(self):
        """Blocks of one kind, whose statistics have equal shapes too, share batched computations."""
        return (*self.shape, *(tuple(v.shape[1:]) for v in self.statistics.averages))


@dataclass(eq=False)
class Group:
    """All blocks of one kind, and their curvature."""

    blocks: list = field(default_factory=list)
    curvature: Any = None

    @property
    def count(self):
        return sum(block.rows.groups for block in self.blocks)

    def stacked(self, tensors):
        """The tensors of a dict from blocks to lists of them, joined over the blocks of the group: a list."""
        return [backend.joined(parts) for parts in zip(*(tensors[block] for block in self.blocks), strict=True)]

    def parts(self, stacked):
        """Pairs of every block and its part of what the curvature stacks."""
        return zip(self.blocks, backend.parts(stacked, [block.rows.groups for block in self.blocks]), strict=True)


class Signals:
    """What a step is given: a gradient for each variable, dense, sparse or None. Those of statistics are what probes emitted.

    Args:
        grads: list of the gradients.
        variables: list of the variables.
        key: function that gives a variable's identity.
        is_overwritten: function that tells whether a variable is overwritten with its gradient.
    """

    def __init__(self, grads, variables, key, is_overwritten):
        self.grads, self.variables, self.key, self.is_overwritten = grads, variables, key, is_overwritten
        self._positions = {key(v): i for i, v in enumerate(variables)}

    def index(self, variable):
        """The position of a variable."""
        return self._positions[self.key(variable)]

    def of(self, variable):
        """The gradient of a variable."""
        return self.grads[self.index(variable)]

    def of_block(self, block):
        """The gradients of a block's kernel and bias, the latter None where there is none."""
        return [None if v is None else self.of(v) for v in (block.kernel, block.bias)]

    def with_gradients(self, grads):
        """The same of other gradients."""
        return Signals(grads, self.variables, self.key, self.is_overwritten)


def find_blocks(variables, key):
    """The blocks among `variables`, in their order; `key` gives a variable's identity.

    Raises:
        ValueError: where a layer's statistics are among the variables but its kernel or bias is not.
    """
    known = {key(v) for v in variables}
    blocks, seen = [], set()
    for variable in variables:
        statistics = getattr(variable, "keras_ngd_statistics", None)
        if statistics is None or id(statistics) in seen:
            continue
        seen.add(id(statistics))
        layer = statistics.owner()
        block = Block(layer.path, keras_private.kernel_of(layer), layer.bias if layer.use_bias else None, statistics)
        for part in (block.kernel, block.bias):
            if part is not None and key(part) not in known:
                raise ValueError(
                    f"Layer {layer.path!r} was captured, but its variable {part.path!r} is not trainable. Set "
                    "`trainable` on whole layers, and call `keras_ngd.capture(model, optimizer)` again with a new optimizer."
                )
        blocks.append(block)
    return blocks


class Layout:
    """The blocks of a model, and the same blocks grouped by kind, in order of first appearance."""

    def __init__(self, blocks=()):
        self.blocks = list(blocks)

    @cached_property
    def groups(self):
        groups = {}
        for block in self.blocks:
            groups.setdefault(block.kind, Group()).blocks.append(block)
        return list(groups.values())

    def part(self, blocks, make_curvature):
        """The layout of some of the blocks, with curvatures for these from `make_curvature(group)`."""
        part = Layout(blocks)
        for group in part.groups:
            group.curvature = make_curvature(group)
        return part
