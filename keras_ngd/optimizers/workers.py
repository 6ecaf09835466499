"""What the workers of a data-parallel training do together in a step."""

import functools
import math

from keras import ops

from keras_ngd import backend
from keras_ngd.distributed import gradient_workers, holders_of, place, row_of
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
        inverses       a layer's owner inverts, and sends one triangle of each inverse to all that hold it
        preconditioned the holder of a layer sends its gradient, preconditioned, to others that do not hold it, at every step
        decisions      (THOR's trace rule) worker 0's

    With the fraction 1 all workers hold all inverses, and no preconditioned gradients are sent (KAISA's COMM-OPT); with `1 / P`
    only owners hold them, and no inverses are sent (MEM-OPT); others lie in between (HYBRID; `distributed.holders_of`). Where
    only owners hold them, statistics and the gradients of captured layers can be reduced to owners alone, by one reduce-scatter
    each (SP-NGD): nobody else needs them, and half the bytes are received.

    Means weigh workers by how many examples their batches had, so unequal batches count as one large batch would. Statistics
    that are not finite on one worker are left out on all.

    Args:
        communicator: a `keras_ngd.distributed.Communicator` of several workers.
        rank: which of them this is; None where the same trace is for all, each of which then does all inversions.
        layout: the model's `Layout`.
        cost: function of a block: what its inversion takes.
        part: function of a list of blocks: the `Layout` of these alone.
        fraction: share of the workers that hold each layer's inverses.
        scatter: whether statistics and gradients go to owners alone.
    """

    def __init__(self, communicator, rank, layout, cost, part, fraction, scatter=False):
        self.communicator, self.rank, self.layout, self.scatter = communicator, rank, layout, scatter
        self.holding = gradient_workers(fraction, communicator.size)
        owners = place([cost(block) for block in layout.blocks], communicator.size)
        self.owners = dict(zip(layout.blocks, owners, strict=True))
        self.own = part([block for block in layout.blocks if self.owners[block] == self.rank])
        self.everywhere = self.holding == communicator.size
        self.held = layout if self.everywhere else part(self.held_by(self.rank))

    def _holders(self, block):
        return holders_of(self.owners[block], self.holding, self.communicator.size)

    def held_by(self, rank):
        """The blocks that a worker holds the inverses of."""
        return [block for block in self.layout.blocks if rank in self._holders(block)]

    def owners_of(self, variables, key):
        """For each of these variables, whose identity is its `key`, the only worker that needs its gradient, or None."""
        if not self.scatter:
            return [None] * len(variables)
        owners = {
            key(v): owner for block, owner in self.owners.items() for v in (block.kernel, block.bias) if v is not None
        }
        return [owners.get(key(v)) for v in variables]

    def mean_gradients(self, gradients, owners, examples, refused):
        """Means over all examples of all workers.

        Args:
            gradients: list of gradients of means over this worker's examples, dense or sparse.
            owners: for each of them the rank of the only worker that needs its mean, or None where all do.
            examples: scalar, how many these are.
            refused: `[blocks]` booleans, whose statistics this worker leaves out.

        Returns:
            The means (where others alone need them, this worker's gradients), this worker's share of all examples, and
            `refused` of any worker.
        """
        # Means over no examples are not numbers.
        weight = examples / self.communicator.loss_scale
        dense = [i for i, g in enumerate(gradients) if not backend.is_sparse(g)]
        products = backend.zero_unless(
            examples > 0, lambda: [gradients[i] * ops.cast(weight, gradients[i].dtype) for i in dense]
        )
        weighed = dict(zip(dense, products, strict=True))
        scattered = [i for i in weighed if owners[i] is not None]
        reduced = [i for i in weighed if owners[i] is None]
        mine = self.communicator.reduce_scatter(
            [weighed[i] for i in scattered],
            [owners[i] for i in scattered],
            "gradients",
            "keras_ngd_scattered_gradients",
        )
        control = ops.concatenate([ops.reshape(examples, (1,)), ops.cast(refused, "float32")])
        *sums, control = self.communicator.all_reduce(
            [*(weighed[i] for i in reduced), control], "gradients", "keras_ngd_gradients"
        )
        total = ops.maximum(control[0], 1.0)
        share = examples / total
        sums = dict(zip([*scattered, *reduced], [*mine, *sums], strict=True))
        means = []
        for i, gradient in enumerate(gradients):
            if backend.is_sparse(gradient):
                values = gradient.values * ops.cast(weight / total, gradient.values.dtype)
                parts = self.communicator.all_gather(
                    [values, gradient.indices], "gradients", f"keras_ngd_sparse_gradient_{i}"
                )
                means.append(backend.sparse(*parts, gradient))
            elif sums[i] is None:
                means.append(gradient)
            else:
                means.append(sums[i] / ops.cast(total, gradient.dtype))
        return means, share, control[1:] > 0

    def mean_statistics(self, emitted, share, refused):
        """Averages over all workers of what the probes emitted, by block, of layers whose gate was open.

        Where statistics are scattered, others' layers keep the averages they had when they were last gathered.
        """
        if self.scatter:
            return self._scattered_statistics(emitted, share, refused)
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

    def _scattered_statistics(self, emitted, share, refused):
        """Averages of the own blocks, if the gates, which all open together, were open."""
        blocks, own = self.layout.blocks, self.own.blocks
        averages = {block: [ops.convert_to_tensor(v) for v in block.statistics.averages] for block in blocks}

        def kept(block, average):
            """What an average contributes to the next."""
            return average * ops.cast(1 - ops.minimum(block.statistics.gate, 1.0), average.dtype)

        def opened():
            sent, owners = [], []
            for block in blocks:
                # Without what this worker's average contributed: it is out of date on all but the owner.
                fresh = [t - kept(block, old) for t, old in zip(emitted[block], averages[block], strict=True)]
                tensors = packed([t * ops.cast(share, t.dtype) for t in fresh])
                sent += tensors
                owners += [self.owners[block]] * len(tensors)
            sums = self.communicator.reduce_scatter(sent, owners, "statistics", "keras_ngd_statistics")
            mine, new = iter([t for t in sums if t is not None]), []
            for i, block in enumerate(blocks):
                if block in own:
                    fresh = unpacked([next(mine) for _ in averages[block]], averages[block])
                    merged = [f + kept(block, old) for f, old in zip(fresh, averages[block], strict=True)]
                    new += [ops.where(refused[i], o, t) for o, t in zip(averages[block], merged, strict=True)]
            # Never nothing: a worker may own no layer.
            return [*new, ops.zeros(())]

        due = ops.any(ops.stack([block.statistics.gate > 0 for block in blocks]))
        new = iter(ops.cond(due, opened, lambda: [*(t for b in own for t in averages[b]), ops.zeros(())]))
        return averages | {block: [next(new) for _ in averages[block]] for block in own}

    def gather_statistics(self):
        """Gives all workers the averages of all layers, at once: where they are scattered, only owners have them."""
        for i, block in enumerate(self.layout.blocks):
            variables = block.statistics.averages
            old = [ops.convert_to_tensor(v) for v in variables]
            received = self.communicator.broadcast(packed(old), self.owners[block], "saving", f"keras_ngd_gathered_{i}")
            for variable, value in zip(variables, unpacked(received, old), strict=True):
                variable.assign(value)

    def agreed(self, tensors):
        """Worker 0's decisions: others might decide differently by a rounding."""
        if self.rank is None:
            return tensors
        return self.communicator.broadcast(tensors, 0, "decisions", "keras_ngd_decision")

    def refresh(self, renew, states, update):
        """New states of the groups of what is held, each block's from its owner.

        Args:
            renew: function of a part of the layout and its groups' states: their new states.
            states: for each group of `held` its state.
            update: for each block of the layout, whether it is renewed; None where all are.
        """
        if self.rank is None:
            return renew(self.layout, states)
        old, mine = by_block(self.held, states), {}
        if self.own.blocks:
            mine = by_block(self.own, renew(self.own, by_group(self.own, old)))
        if self.holding == 1:
            return by_group(self.held, mine)
        new = self._broadcast(old, mine, update) if self.everywhere else self._send_to_holders(old, mine, update)
        return by_group(self.held, new)

    def _broadcast(self, old, mine, update):
        """States of all blocks, of those that are renewed as their owners have them."""
        new = {}
        for i, block in enumerate(self.layout.blocks):

            def received(i=i, block=block):
                sent = self._packed(block, mine.get(block, old[block]))
                tensors = self.communicator.broadcast(sent, self.owners[block], "inverses", f"keras_ngd_inverse_{i}")
                return self._unpacked(block, tensors, old[block])

            kept = functools.partial(list, old[block])
            new[block] = received() if update is None else ops.cond(update[block], received, kept)
        return new

    def _send_to_holders(self, old, mine, update):
        """States of the blocks that are held, of those that are renewed as their owners have them.

        In one exchange, of what is renewed.
        """
        communicator = self.communicator
        column = holders_of(self.rank, self.holding, communicator.size)
        mates = [rank for rank in column if rank != self.rank]
        by_owner = {rank: [b for b in self.held.blocks if self.owners[b] == rank] for rank in range(communicator.size)}
        shapes = {block: [t.shape for t in self._packed(block, old[block])] for block in old}
        sizes = {block: sum(math.prod(shape) for shape in shapes[block]) for block in old}

        def renewed(block):
            return 1 if update is None else ops.cast(update[block], "int32")

        vectors = []
        for block in self.own.blocks:
            vector = ops.concatenate([ops.reshape(t, (-1,)) for t in self._packed(block, mine[block])])
            vectors.append(vector[: sizes[block] * renewed(block)])
        lengths = [
            sum(renewed(b) * sizes[b] for b in by_owner[rank]) if rank in mates else 0
            for rank in range(communicator.size)
        ]
        received = communicator.exchange(vectors or [ops.zeros((0,))], mates, lengths, "inverses", "keras_ngd_inverses")
        # What is sent is all of one type: layers' factors are.
        received[self.rank] = ops.concatenate(communicator.as_sent(vectors, "inverses")) if vectors else None
        new = {}
        for rank, blocks in by_owner.items():
            start = 0
            for block in blocks:
                length = sizes[block] * renewed(block)

                def taken(vector=received[rank], start=start, block=block):
                    part = ops.reshape(ops.slice(vector, [start], [sizes[block]]), (sizes[block],))
                    return self._unpacked(block, split_like(part, shapes[block]), old[block])

                kept = functools.partial(list, old[block])
                new[block] = taken() if update is None else ops.cond(update[block], taken, kept)
                start = start + length
        return new

    @functools.cached_property
    def _symmetric(self):
        return {block for group in self.layout.groups if group.curvature.symmetric for block in group.blocks}

    def _packed(self, block, state):
        return packed(state) if block in self._symmetric else state

    def _unpacked(self, block, tensors, like):
        return unpacked(tensors, like) if block in self._symmetric else tensors

    def preconditioned(self, found, length):
        """Preconditioned gradients of all blocks, where not all are held, from those of the blocks that are.

        Args:
            found: dict from each held block to its preconditioned gradient, `[groups, input_dim, output_dim]`.
            length: scalar, the sum of these blocks' `<P, V>`.

        Returns:
            The same dict of all blocks, and their length.
        """
        rank, size = self.rank, self.communicator.size
        others = [other for other in row_of(rank, self.holding, size) if other != rank]
        theirs = {
            other: [(block, (block.rows.groups, *block.shape[:2])) for block in self.held_by(other)] for other in others
        }
        sizes = [1 + sum(math.prod(s) for _, s in theirs[r]) if r in theirs else 0 for r in range(size)]
        dtype = self.layout.blocks[0].shape[2]
        mine = [*(found[block] for block in self.held.blocks), ops.reshape(ops.cast(length, dtype), (1,))]
        received = self.communicator.exchange(mine, others, sizes, "preconditioned", "keras_ngd_preconditioned")
        found, lengths = dict(found), {rank: ops.cast(mine[-1][0], "float32")}
        for other, blocks in theirs.items():
            *parts, last = split_like(received[other], [*(shape for _, shape in blocks), ()])
            found |= {block: part for (block, _), part in zip(blocks, parts, strict=True)}
            lengths[other] = ops.cast(last, "float32")
        # As one sum: TensorFlow reorders additions, differently on each worker.
        return found, ops.sum(ops.stack([lengths[other] for other in sorted(lengths)]))


def split_like(vector, shapes):
    """A vector as tensors of these shapes, one after the other."""
    start, parts = 0, []
    for shape in shapes:
        parts.append(ops.reshape(vector[start : start + math.prod(shape)], shape))
        start += math.prod(shape)
    return parts
