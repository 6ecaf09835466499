"""How a refresh is divided: among the steps of an interval, each of which refreshes a share, and among workers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_ngd.distributed import place
from keras_ngd.distributed.placement import loads
from keras_ngd.optimizers.blocks import Block, Group, Layout
from keras_ngd.typing import IntervalLike, Tensor

# Each share is a branch of the compiled step.
MOST_SHARES = 32


@dataclasses.dataclass(frozen=True)
class Shares:
    """What has a turn of its own where refreshes are spread over steps; nothing where they are not.

    An object, since Keras puts lists that are attributes of an optimizer into objects of its own.

    Attributes:
        parts: one after the other: parts of a layout, or, of a method without one, of what else it refreshes.
    """

    parts: Sequence[Any] = ()


def divided(costs: Sequence[float], interval: IntervalLike) -> list[list[int]]:
    """Numbers of pieces of work in shares of about equal costs, as few as make the longest of them as short as it can be.

    Pieces are not cut, so that where one is much longer than all others, many shares would be no better than few.

    Args:
        costs: for each piece what it takes.
        interval: steps that there are for all shares, one each; a schedule sets no bound.
    """
    most = max(min(len(costs), MOST_SHARES, interval if isinstance(interval, int) else MOST_SHARES), 1)
    placements = [place(costs, count) for count in range(1, most + 1)]
    longest = [max(loads(costs, owners, len(costs) + 1)) for owners in placements]
    owners = placements[longest.index(min(longest))]
    shares: list[list[int]] = [[] for _ in range(max(owners, default=0) + 1)]
    for i, owner in enumerate(owners):
        shares[owner].append(i)
    return shares


def parts_of(layout: Layout, make_curvature: Callable[[Group], Any], interval: IntervalLike) -> Shares:
    """The parts of a layout that are refreshed in steps of their own, with curvatures of `make_curvature(group)`."""
    costs = [cost_of(block, make_curvature) for block in layout.blocks]
    found = [[layout.blocks[i] for i in share] for share in divided(costs, interval)]
    return Shares([layout.part(blocks, make_curvature) for blocks in found])


def cost_of(block: Block, make_curvature: Callable[[Group], Any]) -> float:
    """What a refresh of one block takes."""
    return make_curvature(Group([block])).refresh_cost


def put_back(old: Tensor, new: Tensor, numbers: Sequence[int], axis: int = 0) -> Tensor:
    """`old` with what is `new` in the place of the slices `numbers` along an axis."""
    count = old.shape[axis]
    if len(numbers) == count:
        return new
    places = {number: count + i for i, number in enumerate(numbers)}
    return ops.take(ops.concatenate([old, new], axis=axis), [places.get(i, i) for i in range(count)], axis=axis)


def owners_in(parts: Sequence[Layout], make_curvature: Callable[[Group], Any], workers: int) -> dict[Block, int]:
    """For each block of all parts the worker that refreshes it.

    Each part is balanced for itself, since its blocks are refreshed in one step; where that leaves a choice, a block goes to
    the worker that has least of the parts before.
    """
    owners: dict[Block, int] = {}
    before = [0.0] * workers
    for part in parts:
        costs = [cost_of(block, make_curvature) for block in part.blocks]
        found = place(costs, workers, before)
        owners |= zip(part.blocks, found, strict=True)
        before = [old + new for old, new in zip(before, loads(costs, found, workers), strict=True)]
    return owners
