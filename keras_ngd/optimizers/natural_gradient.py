"""The flow of a natural-gradient step, once for all methods."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_ngd import backend, schedules, sharding
from keras_ngd.curvature import refreshed
from keras_ngd.optimizers import checks, coverage, state_layout
from keras_ngd.optimizers.arrivals import Arrivals
from keras_ngd.optimizers.assembled import AssembledOptimizer
from keras_ngd.optimizers.blocks import Block, Group, Layout, Signals, find_blocks
from keras_ngd.optimizers.bound import Bound, bounded
from keras_ngd.optimizers.counters import Counters
from keras_ngd.optimizers.damping_unit import BlockwiseDampingUnit, DampingUnit
from keras_ngd.optimizers.loss_value import MeanLoss, average_weight
from keras_ngd.optimizers.method import Inputs
from keras_ngd.optimizers.refreshed_state import RefreshedState
from keras_ngd.optimizers.rest import RestRule
from keras_ngd.optimizers.shares import parts_of
from keras_ngd.optimizers.staggered_clock import clock_of
from keras_ngd.optimizers.stepped_state import SteppedState
from keras_ngd.typing import Initializer, Shape, Tensor, Variable

if TYPE_CHECKING:
    from keras_ngd.optimizers.arrivals import Arrived


class NaturalGradient(AssembledOptimizer):
    """Base of all methods: statistics in, curvature updated, gradients preconditioned, then Keras's own SGD.

    One step does, in this order:

        1  pair          variables into blocks (parameters, statistics) and the rest
        2  average       statistics over the calls of layers called more than once; all gradients and statistics over workers
        3  refresh       the curvature's inverses, where the interval is due; each worker its share of the layers
        4  precondition  P = F^-1 V for every block
        5  clip          P <- nu P, so that no step is too long
        6  step          keras.optimizers.SGD on P (blocks), Adam's rule on the plain gradient (all other variables)
        7  gate          decide what the next backward pass records

    A batch whose statistics are not finite leaves a layer's averages as they are, and is tried again with the next one;
    a batch whose gradients are not finite counts as a zero gradient. Both are counted: `skipped_statistics`,
    `skipped_steps`. So does a step that does not call a layer leave all of it as it is, and a layer that never recorded
    anything has P = V. Statistics that a custom training step has changed beyond a common factor are left out and counted:
    `distorted_statistics`. What there is to say of this is said once, when `fit` ends: `give_notices`.

    What a method is asked for is in `Method`. What a step consists of belongs to the optimizer's parts, one module each:

        exchange        what workers do together             mean_loss, ratio    the units of the loss
        arrivals        what probes emitted                  bound               how long a step may be
        clock           when to record and to refresh        rest_rule           all other variables
        counters        what happened                        checkpoint          saving and loading
        damping_unit    what the damping is relative to

    Arguments are those of `AssembledOptimizer`.
    """

    # Set-up

    @backend.unconverted
    def build(self, variables: Sequence[Variable]) -> None:
        """Creates momenta, inverses and counters for a model's trainable variables.

        Raises:
            ValueError: if the model was not captured for this kind of optimizer, or not under the active `keras.distribution`;
                of a model that is being loaded, at the first step.
        """
        if self.built:
            return
        # TensorFlow's trainer builds the optimizer of a built model while it traces the first step.
        with backend.outside_trace():
            self._build_on(list(variables))

    def _build_on(self, variables: Sequence[Variable]) -> None:
        layout = self.checkpoint.until_trained(lambda: self._checked_layout(variables))
        sharding.check([*variables, *self.variables])
        super().build(variables)
        if layout is None:
            self._add_counters([])
            return
        self.layout = layout
        if self.stagger:
            self.shares = parts_of(layout, self.curvature_of, self.inverse_interval)
        self.exchange.build(layout)
        for group in layout.groups:
            group.curvature = self.curvature_of(group)
        checks.check_saved(self, layout.groups)
        for group in self.local_layout.groups:
            group.curvature.build(self.state.add_curvature if self.gradient_worker_fraction == 1 else _unsaved)
        self.build_own_state(layout)
        captured = {self._var_key(v) for block in layout.blocks for v in block.variables}
        captured |= {self._var_key(v) for v in self.further_variables}
        self.rest_rule = RestRule(
            self,
            variables,
            [self._var_key(v) in captured or self._overwrite_variable_with_gradient(v) for v in variables],
        )
        self.mean_loss, self.bound = MeanLoss(self, self.state.add), Bound(self, self.state.add)
        self.damping_unit = (BlockwiseDampingUnit if self.stagger else DampingUnit)(self, self.state.add)
        self._add_counters(layout.blocks)
        self.ratio.build(layout.blocks, self.state.add)
        self.loss_carrier.blocks = layout.blocks
        for block in layout.blocks:
            block.statistics.watched_by(self)
        if not self.checkpoint.restore_pending():
            # A checkpoint restored here has brought its own gates, with the statistics.
            for number, block in enumerate(layout.blocks):
                self.start_statistics(block.statistics, number)
        if self.exchange.workers is not None:
            self.separate_draws()

    def _checked_layout(self, variables: Sequence[Variable]) -> Layout:
        layout = Layout(find_blocks(variables, self._var_key))
        checks.check_blocks(self, layout.blocks, variables)
        coverage.check_coverage(self, variables, layout.blocks)
        return layout

    def _add_counters(self, blocks: Sequence[Block]) -> None:
        self.clock = clock_of(self, self.state.add)
        self.counters = Counters(self, self.state.add)
        self.arrivals = Arrivals(self, blocks, self.state.add)

    @property
    def local_layout(self) -> Layout:
        """The part of the layout whose inverses this worker has."""
        return self.exchange.local_layout

    # The step

    @backend.unconverted
    def apply(self, grads: Sequence[Tensor], trainable_variables: Sequence[Variable] | None = None) -> None:
        """One step; see the class. Arguments as for `keras.optimizers.Optimizer.apply`."""
        variables = self.built_on if trainable_variables is None else list(trainable_variables)
        self.exchange.start(variables)
        if not self.built:
            with keras.name_scope(self.name):
                self.build(variables)
        grads = [backend.of_known_shape(g, v.shape) for g, v in zip(grads, variables, strict=True)]
        signals = Signals(grads, variables, self._var_key, self._overwrite_variable_with_gradient)
        with backend.outside_trace():
            self.checkpoint.check()  # raises again what `build` raised
        checks.check_step(self, signals)
        self.labels.check_drawn()
        with keras.name_scope(self.name):
            new = self._natural_gradients(signals)
        with self.rest_rule.one_step():
            super().apply(new, variables)

    def stateless_apply(
        self, optimizer_variables: Sequence[Tensor], grads: Sequence[Tensor], trainable_variables: Sequence[Variable]
    ) -> Any:
        if self.built and len(trainable_variables) != len(self.built_on):
            coverage.fail_on_changed_variables(self, len(trainable_variables))
        return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    def _natural_gradients(self, signals: Signals) -> list[Tensor]:
        """The gradients as the update rules and the overwriting of statistics are to see them, from `signals`, as they came."""
        step = ops.convert_to_tensor(self._iterations)
        arrived = self.arrivals.take_in(signals)
        sums = self.ratio.of_batch(arrived.examples)
        signals, arrived, sums, share = self.exchange.mean_gradients(signals, arrived, sums, self.loss_carrier.weight)
        signals = signals.with_dense(self.layout.blocks)
        loss = self.loss_carrier.taken_out(signals)
        self.ratio.take_in(sums, arrived.recorded)
        recorded = self._count(arrived, step, loss)
        # Rows are shared in the units of the loss, which these averages make.
        calls = dict(zip(self.layout.blocks, ops.unstack(arrived.calls), strict=True))
        averages, combined = self.share_statistics(arrived.averages, calls, share, arrived.kept)
        damping = schedules.value_at(self.damping, step)

        def inputs(blocks: Sequence[Block]) -> dict[Block, list[Tensor]]:
            return {
                b: combined.get(b)
                or self.approximation_of(b.geometry).curvature_input(
                    b.statistics, state_layout.gathered_averages(b, averages), calls[b]
                )
                for b in blocks
            }

        self._refresh(inputs, damping, step, recorded, ~ops.any(arrived.non_finite) & ops.isfinite(loss))
        averages = self.after_refresh(averages)
        stepped = SteppedState(self, arrived)
        damping = self.damping_unit.times(damping)
        preconditioned, scales, length = self._precondition(signals, inputs, damping, loss, stepped)
        others = self._others(signals, preconditioned)
        sound = stepped.finite & self.labels.whole(arrived.examples)
        finite = self._all_finite([signals.grads[i] for i in others], length, sound)
        stepped.assign(finite)
        nu = self.bound.scale(length, loss, finite)
        new = bounded(signals, preconditioned, scales, others, nu, finite)
        self.observe_gradients({block: signals.of_block(block) for block in self.layout.blocks}, finite, step)
        new |= self._next_statistics(signals, arrived, averages, step)
        return [new.get(i, gradient) for i, gradient in enumerate(signals.grads)]

    def _count(self, arrived: "Arrived", step: Tensor, loss: Tensor) -> Tensor:
        """Counts what arrived, and takes the loss into its average; whether any statistics were recorded."""
        gate_open, recorded = ops.any(arrived.gate_open), ops.any(arrived.recorded)
        non_finite = ops.any(arrived.non_finite)
        updates = ops.convert_to_tensor(self.counters.factor_updates)
        self.mean_loss.take_in(loss, average_weight(self.factor_decay, updates), recorded & ~non_finite)
        # A batch that reached no layer is none; one with statistics that nobody can tell is not tried again at once.
        self.clock.recorded(step, ops.any(arrived.gate_open & ~arrived.absent) & ~non_finite)
        self.arrivals.count(arrived)
        self.counters.count("factor_updates", recorded & ~non_finite)
        if self.fisher == "sampled":
            self.counters.count("unsampled_updates", recorded & ~non_finite & (ops.max(arrived.examples) == 1))
        self.counters.count("skipped_statistics", gate_open & non_finite)
        self.counters.count_changes(arrived.changes | {"distorted": ops.any(arrived.distorted)})
        return recorded

    def share_statistics(
        self, averages: dict[Block, list[Tensor]], calls: dict[Block, Tensor], share: Tensor | None, left_out: Tensor
    ) -> tuple[dict[Block, list[Tensor]], dict[Block, list[Tensor]]]:
        return self.exchange.mean_statistics(averages, share, left_out), {}

    def _refresh(self, inputs: Inputs, damping: Tensor, step: Tensor, recorded: Tensor, finite: Tensor) -> None:
        """Replaces the curvatures' states where a refresh is due."""
        variables = [v for group in self.local_layout.groups for v in group.curvature.refreshed_variables]
        variables += [*self.damping_unit.variables, *self.decided_variables]
        old = [ops.convert_to_tensor(variable) for variable in variables]
        known = ops.convert_to_tensor(self.counters.factor_updates) > 0
        due = self.clock.refresh_due(step, recorded, known)
        if self.refreshes_from_the_last:
            due = due & finite

        def renew(layout: Layout) -> list[Tensor]:
            return self._renewed(layout, inputs, damping, list(old))

        new = self.clock.renewed(step, due, renew, self.layout, old)
        for variable, value in zip(variables, new, strict=True):
            self.assign(variable, value)
        self.counters.count("inverse_updates", self.clock.refreshed(step, due))

    def _renewed(self, layout: Layout, inputs: Inputs, damping: Tensor, old: Sequence[Tensor]) -> list[Tensor]:
        """New values of all variables that a refresh of a part of the layout, or of all of it, renews, from the old ones."""
        values, local = iter(old), self.exchange.local_layout_of(layout)
        kept = RefreshedState(self.local_layout, values)
        states = kept.of(local)
        measured: dict[tuple[Block, ...], list[Tensor]] = {}

        def stacked(group: Group) -> list[Tensor]:
            return measured.get(tuple(group.blocks)) or group.stacked(inputs(group.blocks))

        def kept_stacked(group: Group) -> list[Tensor]:
            return measured.setdefault(tuple(group.blocks), group.stacked(inputs(group.blocks)))

        # What is measured of all blocks is not made once more, where these are also what is refreshed.
        unit = self.damping_unit.measured(layout, kept_stacked, [next(values) for _ in self.damping_unit.variables])
        damping = self.damping_unit.times(damping, unit)
        decided, update = self.decide(layout, inputs, damping, list(values))

        def renew(layout: Layout, states: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
            chosen = None
            if update is not None:
                chosen = [group.of_each(update) for group in layout.groups]
            curvatures = [group.curvature for group in layout.groups]
            return refreshed(curvatures, [stacked(group) for group in layout.groups], damping, states, chosen)

        with self.state.refreshing([group.curvature for group in self.layout.groups]):
            new = self.exchange.refreshed_states(layout, renew, states, update)
            new = self.arrivals.where_known(local.groups, new, states)
        return [*kept.replaced(local, new), *unit, *decided]

    def _precondition(
        self, signals: Signals, inputs: Inputs, damping: Tensor, loss: Tensor, stepped: SteppedState
    ) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
        """Preconditioned gradients of all blocks' variables by position, scales of some, and the sum of all `<P, V>`.

        The scales bound the steps of single blocks; they are left to what multiplies all of them anyway.
        """
        gradients: dict[Block, Tensor] = {}
        found: dict[Block, Tensor] = {}
        scale_of: dict[Block, Tensor] = {}
        lengths = []
        for block in self.local_layout.blocks:
            gradients[block] = ops.cast(block.geometry.to_matrix(signals.of_block(block)), block.shape[2])
        for group in self.local_layout.groups:
            v = backend.concatenated([gradients[block] for block in group.blocks])
            v = state_layout.on_all_devices(group, v)
            p = self._directions(group, v, damping, inputs, stepped)
            p = state_layout.on_all_devices(group, p)
            of_each = group.of_blocks(ops.cast(ops.sum(p * v, axis=(1, 2)), "float32"))
            if self.bound.is_of_blocks:
                of_blocks = self.bound.of_blocks(of_each, loss)
                of_each = of_each * of_blocks
                if self.local_layout is self.layout:
                    scale_of |= dict(zip(group.blocks, ops.unstack(of_blocks), strict=True))
                else:
                    # Others get them as they are to be.
                    p = p * ops.reshape(ops.cast(group.repeated(of_blocks), p.dtype), (-1, 1, 1))
            lengths.append(ops.sum(of_each))
            found |= dict(group.parts(p))
        found, length = self.exchange.all_preconditioned(found, sum(lengths, ops.zeros((), "float32")))
        preconditioned, scales = {}, {}
        for block in self.layout.blocks:
            for variable, part in zip(block.variables, block.geometry.from_matrix(found[block]), strict=True):
                position = signals.index(variable)
                preconditioned[position] = part
                if block in scale_of:
                    scales[position] = scale_of[block]
        return preconditioned, scales, length

    def _directions(
        self,
        group: Group,
        v: Tensor,
        damping: Tensor,
        inputs: Inputs,
        stepped: SteppedState,
    ) -> Tensor:
        """The preconditioned gradients of a group's gradients `v`."""
        curvature, state = group.curvature, state_layout.gathered_state(group.curvature.variables)

        def of_refresh() -> list[Tensor]:
            return group.stacked(inputs(group.blocks))

        if not curvature.has_steps:
            return curvature.precondition(v, damping, state, of_refresh)
        v = v / self.loss_scale
        p = curvature.precondition(v, damping, stepped.renewed(group, v, state), of_refresh)
        called = ops.cast(stepped.called(group), p.dtype) * self.loss_scale
        return backend.times_or_zero(p, ops.reshape(called, (-1, 1, 1)))

    def _others(self, signals: Signals, preconditioned: dict[int, Tensor]) -> list[int]:
        """The positions of the variables that are trained, and have a gradient, but are of no block."""
        return [
            i
            for i, (gradient, variable) in enumerate(zip(signals.grads, signals.variables, strict=True))
            if not (gradient is None or i in preconditioned or signals.is_overwritten(variable))
        ]

    def _all_finite(self, gradients: Sequence[Tensor], length: Tensor, finite: Tensor) -> Tensor:
        """Whether these gradients and a length are finite, and what else was; steps in which they are not are counted."""
        values = [gradient.values if backend.is_sparse(gradient) else gradient for gradient in gradients]
        sums = [ops.cast(length, "float32"), *(ops.sum(ops.cast(of_one, "float32")) for of_one in values)]
        finite = finite & ops.all(ops.isfinite(ops.stack(sums)))
        self.counters.count("skipped_steps", ~finite)
        return finite

    def _next_statistics(
        self, signals: Signals, arrived: "Arrived", averages: dict[Block, list[Tensor]], step: Tensor
    ) -> dict[int, Tensor]:
        """By position: what the statistics' weights are overwritten with, for the next backward pass."""
        new: dict[int, Tensor] = {}
        due = ops.where(self.clock.records_next(step), self.arrivals.rates(), 0.0)
        gates, following = self.gates(due), self.arrivals.next_values(arrived)
        for variable, value in self.labels.next_values([block.statistics for block in self.layout.blocks], gates):
            new[signals.index(variable)] = value
        for block, gate, values in zip(self.layout.blocks, ops.unstack(gates), following, strict=True):
            statistics = block.statistics
            values = [
                (statistics.gate, gate),
                *values,
                *zip(statistics.averages, averages[block], strict=True),
                *self.control_values(block, step),
            ]
            if statistics.loss is not None:
                values.append((statistics.loss, ops.zeros((2,), "float32")))
            new |= {signals.index(variable): value for variable, value in values}
        return new

    def update_step(self, gradient: Tensor, variable: Variable, learning_rate: Tensor) -> None:
        if self.rest_rule.follows(self._get_variable_index(variable)):
            self.rest_rule.update_step(gradient, variable, learning_rate, super().update_step)
        else:
            super().update_step(gradient, variable, learning_rate)


def _unsaved(shape: Shape, initializer: Initializer, dtype: str, name: str) -> Variable:
    """A variable that is not a part of the optimizer's state: workers have different ones."""
    return keras.Variable(initializer, shape, dtype, trainable=False, name=name)
