"""How an optimizer shares a training with other workers: what it does the same way whether or not there are any."""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_ngd import backend, distributed
from keras_ngd.distributed.communicator import Communicator
from keras_ngd.optimizers import shares
from keras_ngd.optimizers.blocks import Block, Layout, Signals, find_blocks
from keras_ngd.optimizers.worker_exchange import Workers
from keras_ngd.typing import Tensor, Variable

if TYPE_CHECKING:
    from keras_ngd.optimizers.arrivals import Arrived
    from keras_ngd.optimizers.natural_gradient import NaturalGradient


class Exchange:
    """Of one optimizer with those of all other workers; on one worker every exchange gives back what it is given.

    Before the first step all workers start from worker 0's values; in every step they share what they see.

    Args:
        optimizer: whose it is: its `communicator`, `gradient_worker_fraction` and `reduce_scatter` are looked at.
    """

    def __init__(self, optimizer: "NaturalGradient") -> None:
        self._optimizer = optimizer
        self._workers_of_rank: Callable[[int | None, Layout], Workers] | None = None
        self._connection: Communicator | None = None
        self._started, self._gathered_at = False, 0

    def connect(self) -> Communicator:
        """The communicator that the argument of this name stands for; Horovod may be initialised after the optimizer is made."""
        if self._connection is None or self._connection.size == 1:
            self._connection = distributed.resolve(self._optimizer.communicator, self._optimizer)
        return self._connection

    @property
    def communicator(self) -> Communicator:
        """See `connect`."""
        return self.connect()

    @property
    def workers(self) -> Workers | None:
        """What this worker does with others, `Workers`; None where it is alone."""
        return self._workers_of(self._optimizer.layout)

    def _workers_of(self, layout: Layout) -> Workers | None:
        """The same for a part of the layout."""
        return None if self._workers_of_rank is None else self._workers_of_rank(self.communicator.rank, layout)

    @property
    def local_layout(self) -> Layout:
        """The part of the layout whose inverses this worker has."""
        return self.local_layout_of(self._optimizer.layout)

    def local_layout_of(self, layout: Layout) -> Layout:
        """The same for a part of the layout."""
        workers = self._workers_of(layout)
        return layout if workers is None else workers.local_layout

    def received_bytes(self) -> dict[str, int]:
        """See `NaturalGradient.received_bytes`."""
        return self.communicator.received_bytes()

    # Before the first step

    def start(self, variables: Sequence[Variable]) -> None:
        """Once: makes sure that all workers are about to train the same variables, and gives them worker 0's values."""
        communicator, optimizer = self.communicator, self._optimizer
        if self._started or communicator.size == 1:
            return
        if backend.under_xla() and communicator.rank is not None:
            raise ValueError(
                "Workers cannot talk to each other inside a step that XLA compiles. Leave `jit_compile` of `model.compile` at "
                "'auto', or set it to False."
            )
        if not communicator.single_program:
            with backend.outside_trace():
                distributed.check_same(communicator, self._description(variables))
                self._take_over_state(communicator)
                distributed.broadcast_variables(communicator, [*variables, *self._other_variables(variables)])
                if optimizer.built:
                    optimizer.separate_draws()
        self._started = True

    def _description(self, variables: Sequence[Variable]) -> dict[str, Any]:
        optimizer = self._optimizer
        blocks = find_blocks(variables, optimizer._var_key)
        return {
            "optimizer": type(optimizer).__name__,
            # What was captured shows in the variables, below.
            "argument": {name: value for name, value in optimizer.get_config().items() if name != "not_captured"},
            **distributed.description(variables),
            "number of captured layers": len(blocks),
            "recorded of captured layer": {str(i): repr(b.statistics.spec) for i, b in enumerate(blocks)},
        }

    def _take_over_state(self, communicator: Communicator) -> None:
        """Gives all workers the optimizer state that worker 0 has loaded, if it has."""
        checkpoint = self._optimizer.checkpoint
        steps = communicator.gather_objects(checkpoint.step())
        for rank, step in enumerate(steps):
            if step not in (0, steps[0]):
                raise ValueError(
                    f"Worker {rank} goes on from step {step}, but worker 0 from step {steps[0]}: load the same checkpoint on "
                    "all workers, or on worker 0 alone."
                )
        if steps[0] and any(step == 0 for step in steps):
            state = communicator.broadcast_object(checkpoint.current())
            if communicator.rank:
                checkpoint.restore(state)

    def _other_variables(self, variables: Sequence[Variable]) -> list[Variable]:
        """The captured model's weights besides these, if the model is known; not its random seeds, which are to differ."""
        model, key = self._optimizer.captured_model(), self._optimizer._var_key
        known = {key(v) for v in variables}
        return [] if model is None else [v for v in model.weights if key(v) not in known]

    def build(self, layout: Layout) -> None:
        """Divides the blocks of the layout that the optimizer is built on."""
        communicator, optimizer = self.communicator, self._optimizer
        if communicator.size == 1:
            return
        fraction = optimizer.gradient_worker_fraction
        if communicator.single_program and fraction != 1:
            raise ValueError(
                "Replicas of a strategy hold the same variables, so all hold all inverses. Use Horovod, or leave "
                f"`gradient_worker_fraction` at 1. Received: gradient_worker_fraction={fraction!r}"
            )
        holding = distributed.gradient_workers(fraction, communicator.size)
        if optimizer.stagger and 1 < holding < communicator.size:
            raise ValueError(
                f"`stagger=True` is for layers whose inverses one worker has, or all; here {holding} of {communicator.size} have "
                f"each. Set `gradient_worker_fraction` to 1 or to 0. Received: gradient_worker_fraction={fraction!r}"
            )
        if optimizer.reduce_scatter:
            exchange = weakref.ref(self)
            for block in layout.blocks:
                block.statistics.before_saving = lambda: _check_gathered(exchange())

        owners = shares.owners_in(optimizer.shares.parts or [layout], optimizer.curvature_of, communicator.size)

        # Of one rank, but where this process has several replicas.
        @functools.cache
        def workers(rank: int | None, layout: Layout) -> Workers:
            return Workers(
                communicator,
                rank,
                layout,
                owners=owners,
                part=lambda blocks: layout.part(blocks, optimizer.curvature_of),
                fraction=fraction,
                scatter=optimizer.reduce_scatter,
                one_clock=optimizer.one_clock,
            )

        self._workers_of_rank = workers

    # In every step

    def mean_gradients(
        self, signals: Signals, arrived: "Arrived", numbers: Tensor | None, carrier: Variable | None
    ) -> "tuple[Signals, Arrived, Tensor | None, Tensor | None]":
        """What one worker with all examples would see.

        Args:
            signals: this worker's `Signals`.
            arrived: its `Arrived`.
            numbers: vector to be averaged over all examples, too, or None.
            carrier: weight besides those that are trained whose gradient is to be averaged, or None.

        Returns:
            `signals`, `arrived` and `numbers` of all workers, and this worker's share of all examples, a scalar (None on one
            worker).
        """
        workers, key = self.workers, signals.key
        if workers is None:
            return signals, arrived, numbers, None
        # The first layer that was called here: a branch that was not taken tells of no examples.
        examples = arrived.examples[ops.argmax(ops.cast(arrived.examples > 0, "int32"))]
        carrier = None if carrier is None else key(carrier)
        grads = signals.grads
        known = [
            i
            for i, (gradient, variable) in enumerate(zip(grads, signals.variables, strict=True))
            if gradient is not None and (key(variable) == carrier or not signals.is_overwritten(variable))
        ]
        owners = workers.owners_of(signals.variables, key)
        left_out = ops.concatenate([arrived.non_finite, arrived.absent, arrived.distorted]) & (examples > 0)
        if self.communicator.single_program:
            # Their gathering takes equal lengths only.
            grads = [backend.dense(g) if backend.is_sparse(g) else g for g in grads]
        stepped = any(group.curvature.has_steps for group in self._optimizer.layout.groups)
        found, share, left_out, numbers, summed = workers.mean_gradients(
            [grads[i] for i in known],
            [owners[i] for i in known],
            examples,
            left_out,
            numbers,
            arrived.examples if stepped else None,
        )
        means = dict(zip(known, found, strict=True))
        non_finite, absent, distorted = ops.unstack(ops.reshape(left_out, (3, -1)))
        arrived = dataclasses.replace(
            arrived,
            non_finite=non_finite,
            absent=absent & ~non_finite,
            distorted=distorted & ~non_finite,
            examples_of_all=arrived.examples if summed is None else summed,
        )
        signals = signals.with_gradients([means.get(i, gradient) for i, gradient in enumerate(grads)])
        return signals, arrived, numbers, share

    def plain_mean_gradients(self, signals: Signals) -> Signals:
        """The means of all workers' gradients, each with the same weight: where no layer tells of examples."""
        workers = self.workers
        if workers is None:
            return signals
        known = [
            i
            for i, (gradient, variable) in enumerate(zip(signals.grads, signals.variables, strict=True))
            if gradient is not None and not signals.is_overwritten(variable)
        ]
        dense = [backend.dense(g) if backend.is_sparse(g) else g for g in (signals.grads[i] for i in known)]
        one, none = ops.ones((), "float32"), ops.zeros((0,), "bool")
        means = dict(zip(known, workers.mean_gradients(dense, [None] * len(known), one, none)[0], strict=True))
        return signals.with_gradients([means.get(i, gradient) for i, gradient in enumerate(signals.grads)])

    def mean_statistics(
        self, averages: dict[Block, list[Tensor]], share: Tensor | None, left_out: Tensor
    ) -> dict[Block, list[Tensor]]:
        """For each block what its statistics go on with, from what this worker's probes emitted.

        Args:
            averages: dict from blocks, all or some of them, to lists of tensors.
            share: scalar, this worker's share of all examples.
            left_out: `[blocks]`, whose statistics are not to be had of some worker.
        """
        return averages if self.workers is None else self.workers.mean_statistics(averages, share, left_out)

    def refreshed_states(
        self,
        layout: Layout,
        renew: Callable[..., list[list[Tensor]]],
        states: list[list[Tensor]],
        update: dict[Block, Tensor] | None,
    ) -> list[list[Tensor]]:
        """New states of the groups of `local_layout_of(layout)`.

        Args:
            layout: what is refreshed.
            renew: function of a part of it and its groups' states: their new states, of which each worker makes a share.
            states: for each of those groups its state.
            update: for each block of the layout, whether it is renewed; None where all are.
        """
        workers = self._workers_of(layout)
        return renew(layout, states) if workers is None else workers.refresh(renew, states, update)

    def agreed(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Decisions, the same on all workers."""
        return tensors if self.workers is None else self.workers.agreed(tensors)

    def measured_layout_of(self, layout: Layout) -> Layout:
        """The part of it that this worker measures, of a sum over all its blocks; see `total`."""
        workers = self._workers_of(layout)
        return layout if workers is None else workers.measured_layout

    def total(self, measured: Tensor) -> Tensor:
        """The sum over all blocks, the same on all workers, of which this worker has that of `measured_layout_of`."""
        return measured if self.workers is None else self.workers.total(measured)

    def all_preconditioned(self, found: dict[Block, Tensor], length: Tensor) -> tuple[dict[Block, Tensor], Tensor]:
        """Preconditioned gradients of all blocks from those of the blocks of `local_layout`, and the length of all.

        Args:
            found: dict from each block of `local_layout` to its preconditioned gradient.
            length: scalar, the sum of these blocks' `<P, V>`.
        """
        workers = self.workers
        if workers is None or workers.local_layout is self._optimizer.layout:
            return found, length
        return workers.preconditioned(found, length)

    # Statistics that are scattered over their owners

    def gather_statistics(self) -> None:
        """See `NaturalGradient.gather_statistics`."""
        if self.workers is not None and self.workers.scatter:
            self.workers.gather_statistics()
            self.gathered = True

    @property
    def gathered(self) -> bool:
        """Whether this worker has the statistics of all layers."""
        scattered = self.workers is not None and self.workers.scatter
        return not scattered or self._gathered_at == self._optimizer.factor_updates

    @gathered.setter
    def gathered(self, value: bool) -> None:
        self._gathered_at = self._optimizer.factor_updates if value else -1


def _check_gathered(exchange: Exchange | None) -> None:
    if exchange is not None and not exchange.gathered:
        raise ValueError(distributed.NOT_GATHERED)
