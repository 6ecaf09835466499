"""The part of curvatures' states that refreshes renew: as its variables keep it, and as a refresh takes and gives it."""

from collections.abc import Iterator, Sequence

from keras_ngd.optimizers.block_tensors import by_block, by_group
from keras_ngd.optimizers.blocks import Block, Layout
from keras_ngd.optimizers.state_layout import gathered_state, stored_state
from keras_ngd.typing import Tensor


class RefreshedState:
    """Of all groups of a layout, of which a refresh renews those of a part of its blocks.

    What has no block in that part is not touched: it is neither gathered from devices nor copied.

    Args:
        layout: whose groups' curvatures have variables.
        values: what these hold, group by group; no more is taken than that.
    """

    def __init__(self, layout: Layout, values: Iterator[Tensor]) -> None:
        self._layout = layout
        self._variables = [group.curvature.refreshed_variables for group in layout.groups]
        self._kept = [[next(values) for _ in variables] for variables in self._variables]

    def of(self, part: Layout) -> list[list[Tensor]]:
        """The states of a part's groups."""
        if part is self._layout:
            return [self._gathered(i) for i in range(len(part.groups))]
        return by_group(part, self._of_blocks(part))

    def replaced(self, part: Layout, new: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The values of all variables, with these new states of a part's groups."""
        states, touched = new, list(range(len(self._kept)))
        if part is not self._layout:
            touched = self._touched(part)
            states = by_group(self._whole(part), self._of_blocks(part) | by_block(part, new))
        found = dict(enumerate(self._kept))
        for i, state in zip(touched, states, strict=True):
            found[i] = stored_state(self._variables[i], state)
        return [value for i in range(len(found)) for value in found[i]]

    def _gathered(self, i: int) -> list[Tensor]:
        return gathered_state(self._variables[i], self._kept[i])

    def _touched(self, part: Layout) -> list[int]:
        """The numbers of the groups that have blocks of the part."""
        blocks = set(part.blocks)
        return [i for i, group in enumerate(self._layout.groups) if not blocks.isdisjoint(group.blocks)]

    def _whole(self, part: Layout) -> Layout:
        """The layout of these groups alone."""
        return Layout(block for i in self._touched(part) for block in self._layout.groups[i].blocks)

    def _of_blocks(self, part: Layout) -> dict[Block, list[Tensor]]:
        """The states of all their blocks."""
        return by_block(self._whole(part), [self._gathered(i) for i in self._touched(part)])
