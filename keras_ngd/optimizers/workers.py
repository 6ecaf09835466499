"""What the workers of a data-parallel training do together in a step."""

import functools
import json

from keras import ops

from keras_ngd import backend
from keras_ngd.distributed import place
from keras_ngd.linalg.packing import pack, unpack


def _is_matrix(tensor):
    return len(tensor.shape) > 2 and tensor.shape[-1] == tensor.shape[-2]


def packed(tensors):
    """Symmetric matrices by one triangle each; other tensors as they are."""
    return [pack(t) if _is_matrix(t) else t for t in tensors]


def unpacked(tensors, like):
    """What `packed` was given, from what it returned; `like` has the tensors' shapes."""
    return [
        ops.reshape(unpack(t, old.shape[-1]), old.shape) if _is_matrix(old) else t
        for t, old in zip(tensors, like, strict=True)
    ]


def by_block(layout, states):
    """The parts of its groups' states that are each block's."""
    return {
        block: [value[part] for value in state]
        for group, state in zip(layout.groups, states, strict=True)
        for block, part in group.slices()
    }


def by_group(layout, states):
    """The states of its groups from those of each block."""
    return [
        [ops.concatenate(values) for values in zip(*(states[block] for block in group.blocks), strict=True)]
        for group in layout.groups
    ]


class Workers:
    """The exchanges of one training step, of all workers with all others.

    Every worker sees its own examples and does all of a step but the inversions, with the same numbers as all others:

        gradients      means over all examples:  all-reduce at every step
        statistics     means over all examples:  all-reduce of the layers that recorded any, one triangle of each factor
        inverses       a layer's owner inverts, and broadcasts one triangle of each inverse
        decisions      (THOR's trace rule) worker 0's

    Means weigh workers by how many examples their batches had, so unequal batches count as one large batch would. Statistics
    that are not finite on one worker are left out on all.

    Args:
        communicator: a `keras_ngd.distributed.Communicator` of several workers.
        layout: the model's `Layout`.
        cost: function of a block: what its inversion takes.
        part: function of a list of blocks: the `Layout` of these alone.
    """

    def __init__(self, communicator, layout, cost, part):
        self.communicator, self.layout = communicator, layout
        owners = place([cost(block) for block in layout.blocks], communicator.size)
        self.owners = dict(zip(layout.blocks, owners, strict=True))
        self.own = part([block for block in layout.blocks if self.owners[block] == communicator.rank])

    def mean_gradients(self, gradients, examples, refused):
        """Means over all examples of all workers.

        Args:
            gradients: list of gradients of means over this worker's examples, dense or sparse.
            examples: scalar, how many these are.
            refused: `[blocks]` booleans, whose statistics this worker leaves out.

        Returns:
            The means, this worker's share of all examples, and `refused` of any worker.
        """
        dense = [g for g in gradients if not backend.is_sparse(g)]
        control = ops.concatenate([ops.reshape(examples, (1,)), ops.cast(refused, "float32")])
        *sums, control = self.communicator.all_reduce(
            [*(g * ops.cast(examples, g.dtype) for g in dense), control], "gradients", "keras_ngd_gradients"
        )
        total = ops.maximum(control[0], 1.0)
        share, sums = examples / total, iter(sums)
        means = []
        for i, gradient in enumerate(gradients):
            if backend.is_sparse(gradient):
                values = gradient.values * ops.cast(share, gradient.values.dtype)
                parts = self.communicator.all_gather(
                    [values, gradient.indices], "gradients", f"keras_ngd_sparse_gradient_{i}"
                )
                means.append(backend.sparse(*parts, gradient))
            else:
                means.append(next(sums) / ops.cast(total, gradient.dtype))
        return means, share, control[1:] > 0

    def mean_statistics(self, emitted, share, refused):
        """Averages over all workers of what the probes emitted, by block, of layers whose gate was open."""
        averages = {}
        for i, block in enumerate(self.layout.blocks):
            averages[block] = ops.cond(
                block.statistics.gate > 0,
                lambda i=i, block=block: self._mean(i, block, emitted[block], share, refused[i]),
                lambda block=block: list(emitted[block]),
            )
        return averages

    def _mean(self, i, block, emitted, share, refused):
        old = [ops.convert_to_tensor(v) for v in block.statistics.averages]
        sums = self.communicator.all_reduce(
            packed([t * ops.cast(share, t.dtype) for t in emitted]), "statistics", f"keras_ngd_statistics_{i}"
        )
        return [ops.where(refused, o, t) for o, t in zip(old, unpacked(sums, old), strict=True)]

    def agreed(self, tensors):
        """Worker 0's decisions: others might decide differently by a rounding."""
        return self.communicator.broadcast(tensors, 0, "decisions", "keras_ngd_decision") if tensors else []

    def refresh(self, renew, states, update):
        """New states of all groups, each block's from its owner.

        Args:
            renew: function of a part of the layout and its groups' states: their new states.
            states: for each group of the layout its state.
            update: for each block of the layout, whether it is renewed; None where all are.
        """
        old, mine = by_block(self.layout, states), {}
        if self.own.blocks:
            mine = by_block(self.own, renew(self.own, by_group(self.own, old)))
        new = {}
        for group in self.layout.groups:
            for block in group.blocks:
                share = functools.partial(self._share, block, mine.get(block, old[block]), group.curvature.symmetric)
                kept = functools.partial(list, old[block])
                new[block] = share() if update is None else ops.cond(update[block], share, kept)
        return by_group(self.layout, new)

    def _share(self, block, state, symmetric):
        """The state of a block as its owner has it."""
        name = f"keras_ngd_inverse_{self.layout.blocks.index(block)}"
        sent = packed(state) if symmetric else state
        received = self.communicator.broadcast(sent, self.owners[block], "inverses", name)
        return unpacked(received, state) if symmetric else received


def check_same(communicator, description):
    """Raises a `ValueError` on every worker if one of them is about to train something else.

    Args:
        description: dict of what has to be the same everywhere, of what JSON can hold.
    """
    found = [json.loads(text) for text in communicator.gather_objects(json.dumps(description, default=str))]
    for rank, other in enumerate(found[1:], 1):
        for what, value in found[0].items():
            if other[what] != value:
                raise ValueError(f"Workers are not training the same: {_difference(what, value, other[what], rank)}")


def _difference(what, first, second, rank):
    if isinstance(first, dict) and isinstance(second, dict):
        for key in {**first, **second}:
            if first.get(key) != second.get(key):
                return _difference(f"{what}: {key}", first.get(key), second.get(key), rank)
    return f"{what} is {first!r} on worker 0 but {second!r} on worker {rank}."
