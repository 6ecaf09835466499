"""Tensors of blocks in the forms that they are kept, sent and received in."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keras import ops

from keras_ngd import backend
from keras_ngd.optimizers.blocks import Block, Layout
from keras_ngd.typing import Shape, Tensor


def by_block(layout: Layout, states: Sequence[Sequence[Tensor]]) -> dict[Block, list[Tensor]]:
    """The parts of its groups' states that are each block's."""
    found: dict[Any, list[Any]] = {block: [] for block in layout.blocks}
    for group, state in zip(layout.groups, states, strict=True):
        for value in state:
            for block, part in group.parts(value):
                found[block].append(part)
    return found


def by_group(layout: Layout, states: dict[Block, list[Tensor]]) -> list[list[Tensor]]:
    """The states of its groups from those of each block."""
    return [
        [ops.concatenate(values) for values in zip(*(states[block] for block in group.blocks), strict=True)]
        for group in layout.groups
    ]


def flat(tensors: dict[Block, list[Tensor]], blocks: Sequence[Block]) -> list[Tensor]:
    """The tensors of these blocks as one list."""
    return [t for block in blocks for t in tensors[block]]


def unflat(
    flat: Iterable[Tensor], like: Mapping[Block, Sequence[Any]], blocks: Sequence[Block]
) -> dict[Block, list[Tensor]]:
    """By block, from one list; each has as many as in `like`."""
    rest = iter(flat)
    return {block: [next(rest) for _ in like[block]] for block in blocks}


def split_like(vector: Tensor, shapes: Iterable[Shape]) -> list[Tensor]:
    """A vector as tensors of these shapes, one after the other."""
    parts = backend.parts(vector, [math.prod(shape) for shape in shapes])
    return [ops.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]
