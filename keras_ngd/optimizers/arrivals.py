"""What of the statistics arrives at a step: of which layers, from how many calls, and whether it was changed on its way."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from keras import ops

from keras_ngd import backend
from keras_ngd.curvature import where_chosen
from keras_ngd.optimizers import checks
from keras_ngd.optimizers.blocks import Block, Group, Signals
from keras_ngd.optimizers.loss_value import average_weight
from keras_ngd.optimizers.state_layout import laid_out
from keras_ngd.statistics.emission import SENTINEL, TALLIED
from keras_ngd.typing import AddVariable, Tensor, Variable

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient

# How far from 1 a sentinel may be, and how far from a whole number a number of calls (relative). Both
# travel in float32; noise on the gradients, or a clip of each of them, changes them by far more.
SAME, WHOLE = 1e-4, 1e-3


@dataclasses.dataclass
class Arrived:
    """What came of the statistics of all blocks: `averages` by block, the others `[blocks]`.

    Attributes:
        averages: for each block those that its statistics go on with: what arrived, divided by the calls that arrived with
            it, or the old ones.
        calls: how often each layer was called; where it was not, how often it was the last time.
        last: `[blocks, 3]`, the statistics' tallies as they were before.
        gate_open: whose gate was open.
        non_finite: of these, who saw something that is not finite.
        absent: of these, whose layer was not called.
        distorted: of these, whose statistics cannot be told from what arrived.
        examples: the length of a call's batch, 0 where the layer was not called.
        examples_of_all: the same summed over all workers. It is gathered only for states that steps renew.
        changes: what else was done to statistics on their way: dict of some of `counters.CHANGES` to booleans.
    """

    averages: dict[Block, list[Tensor]]
    calls: Tensor
    last: Tensor
    gate_open: Tensor
    non_finite: Tensor
    absent: Tensor
    distorted: Tensor
    examples: Tensor
    examples_of_all: Tensor
    changes: dict[str, Tensor]

    @property
    def kept(self) -> Tensor:
        """Whose averages stay as they were though their gate was open."""
        return self.non_finite | self.absent | self.distorted

    @property
    def recorded(self) -> Tensor:
        """Whose averages a batch has entered."""
        return self.gate_open & ~self.kept


def _whole(numbers: Tensor) -> Tensor:
    """Which numbers are those of calls, up to rounding."""
    nearest = ops.round(numbers)
    return (nearest >= 1) & (ops.abs(numbers - nearest) <= WHOLE * nearest)


def numbers_of_calls(arrived: Tensor, traced: Tensor) -> Tensor:
    """How often each layer was called, from what arrived as its calls, whatever factor all gradients were multiplied with.

    Whole numbers are what they are. Others have a factor, the smallest ratio to what was traced if whole numbers come of it.
    Where none do, a layer was called as often as was traced.

    Args:
        arrived: `[blocks]`, the calls times a factor; 0 of layers that were not called.
        traced: `[blocks]`, how often a pass calls them as far as the trace tells, which in a loop is once.
    """
    present = arrived > 0
    factor = ops.min(ops.where(present, arrived / traced, float("inf")))
    divided = arrived / ops.where(ops.isfinite(factor) & (factor > 0), factor, 1.0)
    one_by_one = ops.where(_whole(arrived), ops.round(arrived), traced)
    found = ops.where(ops.all(_whole(divided) | ~present), ops.round(divided), one_by_one)
    return ops.where(ops.all(_whole(arrived) | ~present), ops.round(arrived), found)


class Arrivals:
    """Takes in what the probes emitted, and tells with which weight the next batch enters the averages.

    Args:
        optimizer: whose step it is: its `decay_of` is asked.
        blocks: of its layout.
        add: its `StateLayout.add`.

    Attributes:
        updates: variable `[blocks]`, how many batches have entered each layer's averages.
    """

    def __init__(self, optimizer: "NaturalGradient", blocks: Sequence[Block], add: AddVariable) -> None:
        self._optimizer, self._blocks = optimizer, blocks
        self.updates = add((len(blocks),), "zeros", "int", "layer_updates")

    def take_in(self, signals: Signals) -> Arrived:
        """What arrived among the gradients `signals`, as `Arrived`.

        Each call of a layer emits its averages, a 1 as `calls` and a `SENTINEL` as `sentinel`, and gradients are sums over calls.
        So a factor that a training step multiplies all gradients with drops out, and what else it does to them shows.
        """
        blocks = self._blocks

        # One by one: XLA sees through slices of each that its numbers are known, not through those of all.
        tallies = [ops.unstack(signals.of(block.statistics.tally), num=len(TALLIED)) for block in blocks]
        calls, accepted, examples = map(ops.stack, zip(*tallies, strict=True))
        sentinel = ops.stack([signals.of(block.statistics.sentinel) for block in blocks])
        traced = ops.convert_to_tensor([float(max(block.statistics.traced_calls, 1)) for block in blocks], calls.dtype)
        gate_open = ops.stack([block.statistics.gate.value for block in blocks]) > 0
        present, absent = calls > 0, calls == 0
        number = numbers_of_calls(calls, traced)
        divisor = ops.where(present, calls, 1.0)
        intact = present & (ops.abs(sentinel / divisor / SENTINEL - 1) <= SAME)
        not_finite = ~ops.isfinite(calls) | (intact & (accepted / divisor < 1 - WHOLE))
        mixed = self._mixed_passes(ops.where(intact, number, 1.0), traced)
        examples = ops.where(present, examples / divisor, 0.0)
        taken = gate_open & intact & ~mixed & ~not_finite
        emitted = [signals.of(v) for block in blocks for v in block.statistics.averages]

        def divided() -> list[Tensor]:
            flat, found = iter(emitted), []
            for block, took, parts in zip(blocks, ops.unstack(taken), ops.unstack(divisor), strict=True):
                for old in block.statistics.averages:
                    t = next(flat)
                    found.append(ops.where(took, t / ops.cast(parts, t.dtype), ops.convert_to_tensor(old)))
            return found

        # In most steps nothing is to be done, and nothing of the averages' size is touched.
        untouched = ops.all((calls == 1) & (sentinel == SENTINEL)) & ~ops.any(mixed)

        flat = iter(ops.cond(untouched, lambda: list(emitted), divided))
        last = ops.stack([block.statistics.tally.value for block in blocks])
        return Arrived(
            averages={b: laid_out(b, [next(flat) for _ in b.statistics.averages]) for b in blocks},
            calls=ops.where(present, number, last[:, TALLIED.index("calls")]),
            last=last,
            gate_open=gate_open,
            non_finite=gate_open & not_finite,
            absent=gate_open & absent,
            distorted=gate_open & ~absent & ~not_finite & ~(intact & ~mixed),
            examples=examples,
            examples_of_all=examples,
            changes=self._changes_of(calls, number, traced, intact, gate_open) | {"mixed": ops.any(gate_open & mixed)},
        )

    def _mixed_passes(self, number: Tensor, traced: Tensor) -> Tensor:
        """`[blocks]`: in whose statistics those of several passes were added that cannot be put together.

        Args:
            number: `[blocks]`, how often each layer was called.
            traced: `[blocks]`, how often it is called in one pass.
        """
        apart = [not (block.statistics.adds_up or block.statistics.looped) for block in self._blocks]
        several = [block.statistics.several_calls for block in self._blocks]
        limits = ops.where(ops.convert_to_tensor(several, "bool"), traced, 1.0)
        mixed = (number > limits) & ops.convert_to_tensor(apart, "bool")
        if any(apart):
            backend.check_none(mixed, [checks.several_calls_message(self._optimizer, block) for block in self._blocks])
        return mixed

    def _changes_of(
        self, calls: Tensor, number: Tensor, traced: Tensor, intact: Tensor, gate_open: Tensor
    ) -> dict[str, Tensor]:
        """What a training step of the user's did to the statistics that did no harm to them."""
        adds_up = [block.statistics.adds_up and not block.statistics.looped for block in self._blocks]
        accumulated = gate_open & intact & (number > traced) & ops.convert_to_tensor(adds_up, "bool")
        # Not 1e-3: a penalty is as small as that.
        scaled = intact & (ops.abs(calls / ops.where(number > 0, number, 1.0) - 1) > 1e-6)
        return {"scaled": ops.any(scaled), "accumulated": ops.any(accumulated)}

    def count(self, arrived: "Arrived") -> None:
        """Counts the batch, for each layer whose averages it has entered."""
        self._optimizer.assign_add(self.updates, ops.cast(arrived.recorded, self.updates.dtype))

    def rates(self) -> Tensor:
        """`[blocks]`, the weight with which a batch enters each layer's averages now."""
        decay = ops.convert_to_tensor([self._optimizer.decay_of(block) for block in self._blocks], "float32")
        return average_weight(decay, ops.convert_to_tensor(self.updates))

    def next_values(self, arrived: "Arrived") -> list[list[tuple[Variable, Tensor]]]:
        """For each block pairs of a weight of its statistics, neither an average nor the gate, and its next value."""
        statistics = [block.statistics for block in self._blocks]
        last, calls = arrived.last[:, TALLIED.index("examples")], arrived.calls
        examples = ops.where(arrived.examples > 0, arrived.examples * calls, last)
        # Not what arrives, which rounding would spoil where it was multiplied and divided.
        tallies = ops.unstack(ops.stack([calls, calls, examples], axis=1))
        sentinels = ops.unstack(SENTINEL * calls)
        drawn = ops.unstack(arrived.gate_open & ~arrived.absent)
        found = []
        for i, of_block in enumerate(statistics):
            values = [(of_block.tally, tallies[i]), (of_block.sentinel, sentinels[i])]
            controls = [ops.convert_to_tensor(control) for control in of_block.controls]
            for control, old, new in zip(of_block.controls, controls, of_block.next_controls(controls), strict=True):
                values.append((control, ops.where(drawn[i], new, old)))
            found.append(values)
        return found

    def where_known(
        self, groups: Sequence[Group], new: Sequence[Sequence[Tensor]], old: Sequence[Sequence[Tensor]]
    ) -> list[list[Tensor]]:
        """New states of these groups, of layers that ever recorded anything; of others the old, initial ones."""
        updated = ops.convert_to_tensor(self.updates) > 0
        known = {block: updated[i] for i, block in enumerate(self._blocks)}
        return where_chosen([group.of_each(known) for group in groups], new, old)
