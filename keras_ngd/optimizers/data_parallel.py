"""How an optimizer joins the workers of a data-parallel training."""

import dataclasses
import functools
import weakref

from keras import ops

from keras_ngd import backend, distributed, replica
from keras_ngd.optimizers.blocks import Group, find_blocks
from keras_ngd.optimizers.workers import Workers


class DataParallel:
    """Mixin: before the first step all workers start from worker 0's values; in every step they share what they see."""

    _all_workers, _met, _model, _connection, _gathered = None, False, None, None, 0

    def connected(self):
        """The communicator that the argument `communicator` stands for; Horovod may be initialised after the optimizer."""
        if self._connection is None or self._connection.size == 1:
            # Out of sight of Keras, which looks into what optimizers have as attributes.
            object.__setattr__(self, "_connection", distributed.resolve(self.communicator, self))
        return self._connection

    @property
    def _workers(self):
        """What this worker does with others; None where it is alone."""
        return None if self._all_workers is None else self._all_workers(self.connected().rank)

    def received_bytes(self):
        """What this worker has received from others in training steps, in bytes, by stage; `{}` on one worker.

        Stages are `initial state`, `gradients`, `statistics`, `inverses`, `preconditioned`, `decisions` and `saving`.
        """
        return self.connected().received_bytes()

    def _meet(self, variables):
        """Once: makes sure that all workers are about to train the same, and gives them worker 0's values."""
        communicator = self.connected()
        if self._met or communicator.size == 1:
            return
        if backend.under_xla() and communicator.rank is not None:
            raise ValueError(
                "Workers cannot talk to each other inside a step that XLA compiles. Leave `jit_compile` of `model.compile` at "
                "'auto', or set it to False."
            )
        if communicator.together:
            self._met = True
            return
        with backend.outside_trace():
            distributed.check_same(communicator, self._description(variables))
            self._take_over_state(communicator)
            distributed.broadcast_variables(communicator, [*variables, *self._other_variables(variables)])
            if self.built:
                self.separate_draws()
        self._met = True

    def _description(self, variables):
        blocks = find_blocks(variables, self._var_key)
        return {
            "optimizer": type(self).__name__,
            # What was captured shows in the variables, below.
            "argument": {name: value for name, value in self.get_config().items() if name != "not_captured"},
            **distributed.description(variables),
            "number of captured layers": len(blocks),
            "recorded of captured layer": {str(i): repr(b.statistics.spec) for i, b in enumerate(blocks)},
        }

    def _take_over_state(self, communicator):
        """Gives all workers the optimizer state that worker 0 has loaded, if it has."""
        steps = communicator.gather_objects(self.restored_step())
        for rank, step in enumerate(steps):
            if step not in (0, steps[0]):
                raise ValueError(
                    f"Worker {rank} goes on from step {step}, but worker 0 from step {steps[0]}: load the same checkpoint on "
                    "all workers, or on worker 0 alone."
                )
        if steps[0] and any(step == 0 for step in steps):
            state = communicator.broadcast_object(self.current_state())
            if communicator.rank:
                self.restore(state)

    def _other_variables(self, variables):
        """The captured model's weights besides these, if the model is known; not its random seeds, which are to differ."""
        model = None if self._model is None else self._model()
        known = {self._var_key(v) for v in variables}
        return [] if model is None else [v for v in model.weights if self._var_key(v) not in known]

    def _make_workers(self, layout):
        """A function from ranks to their `Workers`, or None. (Of one rank, but where this process has several replicas.)"""
        communicator = self.connected()
        if communicator.size == 1:
            return None
        if communicator.together and self.gradient_worker_fraction != 1:
            raise ValueError(
                "Replicas of a strategy hold the same variables, so all hold all inverses. Use Horovod, or leave "
                f"`gradient_worker_fraction` at 1. Received: gradient_worker_fraction={self.gradient_worker_fraction!r}"
            )
        if self.reduce_scatter:
            optimizer = weakref.ref(self)
            for block in layout.blocks:
                block.statistics.before_saving = lambda: _check_gathered(optimizer())

        @functools.cache
        def workers(rank):
            return Workers(
                communicator,
                rank,
                layout,
                cost=lambda block: self.make_curvature(Group([block])).refresh_cost,
                part=lambda blocks: layout.part(blocks, self.make_curvature),
                fraction=self.gradient_worker_fraction,
                scatter=self.reduce_scatter,
                one_clock=self.one_clock,
            )

        return workers

    def gather_statistics(self):
        """Gives all workers the statistics of all layers; to be called on all, outside a step (`callbacks.GatherStatistics`).

        With `reduce_scatter=True` only a layer's owner has them, and nobody could save them all.
        """
        if self._workers is not None and self._workers.scatter:
            self._workers.gather_statistics()
            self.gathered = True

    @property
    def gathered(self):
        """Whether this worker has the statistics of all layers."""
        return self._workers is None or not self._workers.scatter or self._gathered == self.factor_updates

    @gathered.setter
    def gathered(self, value):
        self._gathered = self.factor_updates if value else -1

    def restored(self, renew):
        super().restored(renew)
        # What was saved is complete.
        self.gathered = True

    def separate_draws(self):
        """Makes every worker draw random numbers of its own, if there are any to be drawn in the probes."""

    def _average_over_workers(self, grads, variables, arrived, sums):
        """The gradients as one worker with all examples would see them, this worker's share of these, what arrived at all, and
        the means over the examples of `sums`, a vector or None."""
        # The first layer that was called here: a branch that was not taken tells of no examples.
        examples = arrived.examples[ops.argmax(ops.cast(arrived.examples > 0, "int32"))]
        carrier = self._loss_carrier()
        carrier = None if carrier is None else self._var_key(carrier)
        known = [
            i
            for i, (gradient, variable) in enumerate(zip(grads, variables, strict=True))
            if gradient is not None
            and (self._var_key(variable) == carrier or not self._overwrite_variable_with_gradient(variable))
        ]
        owners = self._workers.owners_of(variables, self._var_key)
        left_out = [arrived.refused, arrived.absent, arrived.distorted]
        left_out = ops.concatenate(left_out) & (examples > 0)
        if self.connected().together:
            # Their gathering takes equal lengths only.
            grads = [backend.dense(g) if backend.is_sparse(g) else g for g in grads]
        means, share, left_out, sums = self._workers.mean_gradients(
            [grads[i] for i in known], [owners[i] for i in known], examples, left_out, sums
        )
        means = dict(zip(known, means, strict=True))
        refused, absent, distorted = ops.unstack(ops.reshape(left_out, (3, -1)))
        arrived = dataclasses.replace(
            arrived, refused=refused, absent=absent & ~refused, distorted=distorted & ~refused
        )
        return [means.get(i, gradient) for i, gradient in enumerate(grads)], share, arrived, sums

    def share_statistics(self, averages, calls, share, refused):
        """Brings the statistics of several workers together.

        Args:
            averages: for each block what this worker's probes emitted.
            calls: for each block how often its layer was called.
            share: scalar, this worker's share of all examples.
            refused: `[blocks]`, whose statistics are not to be had of some worker.

        Returns:
            For each block what its statistics go on with; and what its curvature takes, where that is not made of these by
            `curvature_input`.
        """
        return self._workers.mean_statistics(averages, share, refused), {}

    def _agreed(self, tensors):
        """Decisions, the same on all workers."""
        return tensors if self._workers is None else self._workers.agreed(tensors)

    @property
    def held(self):
        """The part of the layout whose inverses this worker holds."""
        return self.layout if self._workers is None else self._workers.held

    # A strategy would compare or reduce what replicas assign: they agree already, or have what is each one's own.

    def assign(self, variable, value):
        super().assign(replica.local(variable), value)

    def assign_add(self, variable, value):
        super().assign_add(replica.local(variable), value)

    def _overwrite_variables_directly_with_gradients(self, grads, variables):
        if replica.context() is None:
            return super()._overwrite_variables_directly_with_gradients(grads, variables)
        others = []
        for gradient, variable in zip(grads, variables, strict=True):
            if self._overwrite_variable_with_gradient(variable):
                self.assign(variable, gradient)
            else:
                others.append((gradient, variable))
        return [gradient for gradient, _ in others], [variable for _, variable in others]

    def _all_reduce_sum_gradients(self, grads_and_vars):
        # They are the same on all replicas by now. Where there is only one, there is nothing to sum up: TensorFlow would register
        # a gradient of the sum, with the whole step's graph, and never let go of it.
        if self._workers is not None or not replica.several():
            return list(grads_and_vars)
        return super()._all_reduce_sum_gradients(grads_and_vars)

    def _refreshed_states(self, renew, states, update):
        """New states of all groups of what is held, by `renew` of the part of it that is this worker's."""
        if self._workers is None:
            return renew(self.layout, states)
        return self._workers.refresh(renew, states, update)


def _check_gathered(optimizer):
    if optimizer is not None and not optimizer.gathered:
        raise ValueError(distributed.NOT_GATHERED)
