"""The flow of a natural-gradient step, once for all methods."""

import weakref

import keras
from keras import ops

from keras_ngd import backend, schedules, sharding
from keras_ngd.optimizers.arrivals import Arrivals
from keras_ngd.optimizers.averaging import WeightAveraging
from keras_ngd.optimizers.blocks import Layout, find_blocks
from keras_ngd.optimizers.checks import Checks
from keras_ngd.optimizers.counters import Counters
from keras_ngd.optimizers.coverage import Coverage
from keras_ngd.optimizers.data_parallel import DataParallel
from keras_ngd.optimizers.loss_ratio import LossRatio
from keras_ngd.optimizers.notices import Notices
from keras_ngd.optimizers.rest import RestRule
from keras_ngd.optimizers.sharded_state import ShardedState
from keras_ngd.optimizers.state import StrictState
from keras_ngd.optimizers.step_length import StepLength


def stacked(group, inputs):
    """What the curvature of a group takes, of all its blocks."""
    parts = zip(*(inputs[block] for block in group.blocks), strict=True)
    return [backend.joined(part) for part in parts]


# The methods as their papers have them: nothing is relative to the loss, and all variables follow one rule.
PAPER_SETTINGS = {
    "kl_clip": 1e-3,
    "loss_clip": None,
    "fisher_scale": None,
    "interval_growth": None,
    "rest": "sgd",
}


def settled_damping(damping, mode, absolute, default=1.0):
    """The damping and its mode: relative, and `default`, where no damping is given, and else `absolute` where no mode is."""
    if damping is None:
        if mode not in (None, "relative"):
            raise ValueError(
                f"`damping_mode={mode!r}` is in units of the curvature and needs a `damping`, such as 0.01. Received: "
                "damping=None"
            )
        return default, "relative"
    return damping, absolute if mode is None else mode


class NaturalGradient(
    Checks,
    Arrivals,
    Counters,
    Coverage,
    DataParallel,
    LossRatio,
    RestRule,
    ShardedState,
    StepLength,
    StrictState,
    Notices,
    WeightAveraging,
    keras.optimizers.SGD,
):
    """Base of all methods: statistics in, curvature updated, gradients preconditioned, then Keras's own SGD.

    One step does, in this order:

        1  pair          variables into blocks (kernel, bias, statistics) and the rest
        2  average       statistics over the calls of layers called more than once; all gradients and statistics over workers
        3  refresh       the curvature's inverses, where the interval is due; each worker its share of the layers
        4  precondition  P = F^-1 V for every block
        5  clip          P <- nu P, so that no step promises to take too large a share off the loss
        6  step          keras.optimizers.SGD on P (blocks), Adam's rule on the plain gradient (all other variables)
        7  gate          decide what the next backward pass records

    A batch whose statistics are not finite leaves a layer's averages as they are, and is tried again with the next one;
    a batch whose gradients are not finite counts as a zero gradient. Both are counted: `skipped_statistics`,
    `skipped_steps`. So does a step that does not call a layer leave all of it as it is, and a layer that never recorded
    anything has P = V. Statistics that a custom training step has changed beyond a common factor are left out and counted:
    `distorted_statistics`. What there is to say of this is said once, when `fit` ends: `give_notices`.

    Methods override `make_statistics`, `make_curvature`, `curvature_input` and `refresh`; those whose layers do not all follow
    one clock also `one_clock`, `build_curvature`, `decide` and `gates`.

    Args:
        learning_rate: float, `LearningRateSchedule` or callable, as for every Keras optimizer.
        damping: positive float or `LearningRateSchedule` (of the step).
        momentum: float in [0, 1). Default 0.9.
        factor_decay: float in [0, 1): how much of the statistics' average is kept at an update. The average is free of
            start-up bias: after t updates its weights are proportional to `factor_decay ** age` and sum to 1.
        factor_interval: int or schedule: steps between updates of the statistics.
        inverse_interval: int or schedule: steps between refreshes of the inverses.
        interval_growth: positive float or None. An interval given as an int is at most this share of the steps so far, and at
            least 1: what a network is like changes fastest in its first steps. None: the interval itself from the first step
            on. Default 0.1.
        loss_clip: positive float, or None for none: bound on what a step promises to take off the loss, as a share of the
            loss and for a learning rate of 1. Default `"auto"`: 1.0, or None where `kl_clip` is given.
        kl_clip: positive float, or None for none: bound on the squared length of a step in the Fisher metric. Default None.
        fisher_scale: `"loss"`: the Fisher matrix is divided by the loss (its running average), so that steps do not depend on the
            loss's units. The empirical Fisher matrix is a square of gradients: it falls with the square of the residuals, the
            loss's curvature does not. Of squared errors the quotient is the Gauss-Newton matrix, up to a constant. None: the
            empirical Fisher matrix itself. Default `"loss"`.
        rest: `"adam"` or `"sgd"`: the update rule of variables that no curvature describes. Default `"adam"`.
        rest_learning_rate: float or `LearningRateSchedule`: its learning rate. Default None: a tenth of `learning_rate` for
            `"adam"`, `learning_rate` itself for `"sgd"`.
        communicator: `"auto"` (default): Horovod where `horovod.tensorflow.init()` has started several processes;
            `"horovod"`, `"local"`, or a `keras_ngd.distributed.Communicator`.
        gradient_worker_fraction: share of several workers that hold each layer's inverses; its product with their number must
            divide it, and 0 stands for one of them. Others get the layer's preconditioned gradient instead, at every step. With
            less than 1 (the default) inverses are not saved: training that goes on begins with a refresh.
        reduce_scatter: whether statistics and the gradients of captured layers are summed up on their layers' owners alone, as in
            SP-NGD; for `gradient_worker_fraction=0`. Default False: on all workers. What is saved then needs the callback
            `keras_ngd.callbacks.GatherStatistics` on all workers.
        shard_state: whether each device of the active `keras.distribution` (JAX) keeps and inverts a part of the statistics
            and inverses, in place of all of them. Default False.
        **kwargs: all other arguments of `keras.optimizers.SGD`: `nesterov`, `weight_decay` (decoupled), `clipnorm`,
            `clipvalue`, `global_clipnorm` (these clip the preconditioned gradient), `use_ema`, `ema_momentum`,
            `ema_overwrite_frequency`, `loss_scale_factor`, `name`.
    """

    # Whether all layers record in the same steps.
    one_clock = True

    # Whether the state of a layer grows with the squares of its sizes.
    whole_factors = False

    def __init__(
        self,
        learning_rate,
        damping,
        momentum=0.9,
        factor_decay=0.95,
        factor_interval=10,
        inverse_interval=100,
        kl_clip=None,
        loss_clip="auto",
        fisher_scale="loss",
        interval_growth=0.1,
        rest="adam",
        rest_learning_rate=None,
        communicator="auto",
        gradient_worker_fraction=1.0,
        reduce_scatter=False,
        shard_state=False,
        **kwargs,
    ):
        self._check_own_arguments(factor_decay, kl_clip, kwargs)
        loss_clip = self._checked_step_length(loss_clip, kl_clip, fisher_scale)
        if interval_growth is not None:
            interval_growth = schedules.check_positive_number("interval_growth", interval_growth)
        rest, rest_learning_rate = self._checked_rest(rest, rest_learning_rate)
        damping = schedules.check_positive("damping", schedules.deserialize(damping))
        factor_interval = schedules.check_interval("factor_interval", schedules.deserialize(factor_interval))
        inverse_interval = schedules.check_interval("inverse_interval", schedules.deserialize(inverse_interval))
        self._check_division(communicator, gradient_worker_fraction, reduce_scatter, shard_state)
        super().__init__(learning_rate=learning_rate, momentum=momentum, **kwargs)
        self.damping, self.factor_decay = damping, float(factor_decay)
        self.kl_clip = None if kl_clip is None else float(kl_clip)
        self.factor_interval, self.inverse_interval = factor_interval, inverse_interval
        self.loss_clip = loss_clip
        self.fisher_scale, self.interval_growth = fisher_scale, interval_growth
        self.rest, self.rest_learning_rate = rest, rest_learning_rate
        self.communicator, self.gradient_worker_fraction = communicator, float(gradient_worker_fraction)
        self.reduce_scatter = reduce_scatter
        self.shard_state, self.layout = shard_state, Layout()

    def measure(self, model, data):
        """Settles what is to be measured on a model about to be captured, and on a batch of its inputs (or None)."""

    def captured(self, model):
        """Told which model was captured for this optimizer."""
        self._model = weakref.ref(model)

    def make_statistics(self, layer):
        """New, unattached `Statistics` of the kind this method needs of a layer."""
        raise NotImplementedError

    def make_curvature(self, group):
        """A new curvature for a `Group` of blocks of one shape."""
        raise NotImplementedError

    @property
    def loss_scale(self):
        """What the losses were multiplied with whose gradients arrive."""
        return self.loss_scale_factor or 1.0

    def further_bytes(self, block):
        """Size of what a block needs besides its statistics' averages and its curvature."""
        return 0

    # Set-up

    @backend.unconverted
    def build(self, variables):
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

    def _build_on(self, variables):
        layout = self.until_trained(lambda: self._checked_layout(variables))
        sharding.check([*variables, *self.variables])
        super().build(variables)
        if layout is None:
            self.add_counters()
            return
        self.layout, self._all_workers = layout, self._make_workers(layout)
        self.build_curvature(layout)
        self.build_rest(variables, layout.blocks)
        self.build_step_length()
        self.add_counters()
        self.add_loss_ratio()
        for block in layout.blocks:
            block.statistics.watched_by(self)
        if not self._restore_pending():
            # A checkpoint restored here has brought its own gates, with the statistics.
            for number, block in enumerate(layout.blocks):
                self.start_statistics(block.statistics, number)
        if self._workers is not None:
            self.separate_draws()

    def _checked_layout(self, variables):
        layout = Layout(find_blocks(variables, self._var_key))
        self._check_blocks(layout.blocks, variables)
        self.check_coverage(variables, layout.blocks)
        return layout

    def restored(self, renew):
        super().restored(renew)
        if self.gradient_worker_fraction < 1:
            self._next_inverses.assign(0)

    def build_curvature(self, layout):
        """Creates the curvatures, and lists in `_decided` what else a refresh renews."""
        for group in layout.groups:
            group.curvature = self.make_curvature(group)
        for group in self.held.groups:
            group.curvature.build(self._add_curvature if self.gradient_worker_fraction == 1 else _unsaved)
        self._decided = []

    def start_statistics(self, statistics, number):
        """Opens the gate of the layer `number` for the first batch."""
        statistics.gate.assign(1.0)

    # The step

    @backend.unconverted
    def apply(self, grads, trainable_variables=None):
        """One step; see the class. Arguments as for `keras.optimizers.Optimizer.apply`."""
        variables = self.built_on if trainable_variables is None else list(trainable_variables)
        self._meet(variables)
        if not self.built:
            with keras.name_scope(self.name):
                self.build(variables)
        grads = [backend.of_known_shape(g, v.shape) for g, v in zip(grads, variables, strict=True)]
        self._check_step(grads, variables)
        position = {self._var_key(v): i for i, v in enumerate(variables)}
        with keras.name_scope(self.name):
            new = self._natural_gradients(grads, variables, lambda v: position[self._var_key(v)])
        super().apply(new, variables)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        if self.built and len(trainable_variables) != len(self.built_on):
            self.fail_on_changed_variables(len(trainable_variables))
        return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    def _natural_gradients(self, grads, variables, index):
        """Steps 2 to 5 and 7: the gradients as the update rule and the overwriting of statistics are to see them."""
        step = ops.convert_to_tensor(self._iterations)
        arrived, given = self._take_in(grads, index), {}
        averages, calls, sums = arrived.averages, arrived.calls, self.loss_sums(arrived)
        if self._workers is not None:
            grads, share, arrived, sums = self._average_over_workers(grads, variables, arrived, sums)
        loss = self.arrived_loss(grads, index)
        self.average_loss_sums(sums, arrived)
        recorded = self._count_statistics(arrived, step, loss)
        # Rows are shared in the units of the loss, which these averages make.
        if self._workers is not None:
            averages, given = self.share_statistics(averages, calls, share, arrived.kept)
        damping = schedules.value_at(self.damping, step)

        def inputs(blocks):
            return {
                b: given.get(b) or self.curvature_input(b.statistics, self.whole(b, averages), calls[b]) for b in blocks
            }

        self._refresh(inputs, damping, step, recorded)
        preconditioned, lengths = self._precondition(grads, index, damping, inputs)
        finite = self._all_finite(preconditioned, lengths, grads, variables)
        nu = self.step_scale(sum(lengths), loss, finite)
        plain = [
            i
            for i, (gradient, variable) in enumerate(zip(grads, variables, strict=True))
            if i not in preconditioned and self._follows_plain_rule(gradient, variable)
        ]
        steps = backend.zero_unless(
            finite,
            lambda: [p * ops.cast(nu, p.dtype) for p in preconditioned.values()] + [grads[i] for i in plain],
        )
        new = dict(zip([*preconditioned, *plain], steps, strict=True))
        for i, gradient in enumerate(grads):
            if backend.is_sparse(gradient):
                new[i] = backend.sparse_zero_unless(finite, gradient)
        gradients = {
            block: [None if v is None else grads[index(v)] for v in (block.kernel, block.bias)]
            for block in self.layout.blocks
        }
        self.watch(gradients, finite, step)
        for i, (block, gate) in enumerate(
            zip(self.layout.blocks, ops.unstack(self.gates(self._next_gates(step))), strict=True)
        ):
            new[index(block.statistics.gate)] = gate
            for variable, value in self._counts(block, i, arrived):
                new[index(variable)] = value
            for variable, value in zip(block.statistics.averages, averages[block], strict=True):
                new[index(variable)] = value
            for variable, value in self.control_values(block, step):
                new[index(variable)] = value
            if block.statistics.loss is not None:
                new[index(block.statistics.loss)] = ops.zeros((2,), "float32")
        return [new.get(i, gradient) for i, gradient in enumerate(grads)]

    def _follows_plain_rule(self, gradient, variable):
        return gradient is not None and not (
            self._overwrite_variable_with_gradient(variable) or backend.is_sparse(gradient)
        )

    def _refresh(self, inputs, damping, step, recorded):
        """Replaces the curvatures' states where a refresh is due."""
        variables = [v for group in self.held.groups for v in group.curvature.variables] + self._decided
        old = [ops.convert_to_tensor(variable) for variable in variables]
        due = self.refresh_due(step, recorded)
        new = ops.cond(due, lambda: self._renewed(inputs, damping, list(old)), lambda: list(old))
        for variable, value in zip(variables, new, strict=True):
            self.assign(variable, value)
        following = step + schedules.interval_at(self.inverse_interval, step, self.interval_growth)
        self.assign(self._next_inverses, ops.where(due, following, ops.convert_to_tensor(self._next_inverses)))
        self.assign_add(self._inverse_updates, ops.cast(due, step.dtype))

    def _renewed(self, inputs, damping, old):
        """New values of all variables that a refresh renews, from the old ones."""
        values = iter(old)
        states = [[sharding.whole(v, next(values)) for v in group.curvature.variables] for group in self.held.groups]
        decided, update = self.decide(inputs, damping, list(values))

        def renew(layout, states):
            return self.refresh(layout, inputs(layout.blocks), damping, states, update)

        with self.refreshing():
            new = self._known_only(self._refreshed_states(renew, states, update), states)
        pairs = zip(self.held.groups, new, strict=True)
        return [t for group, state in pairs for t in self.stored_state(group, state)] + list(decided)

    def refresh_due(self, step, recorded):
        """Whether the curvatures are to be refreshed at `step`; `recorded` tells whether it recorded statistics."""
        known = ops.convert_to_tensor(self._factor_updates) > 0
        return known & (step >= ops.convert_to_tensor(self._next_inverses))

    def decide(self, inputs, damping, old):
        """What is to be renewed at a refresh. Default: everything.

        Args:
            inputs: as for `state_of`.
            damping: scalar.
            old: values of the variables in `_decided`.

        Returns:
            The new values of these variables, and for each block whether it is to be renewed (a dict), or None for all.
        """
        return old, None

    def refresh(self, layout, inputs, damping, states, update):
        """New states of the groups of a layout, which may have some of the model's blocks only.

        Args:
            layout: a `Layout`.
            inputs: for each of its blocks what its curvature takes.
            damping: scalar.
            states: for each of its groups the curvature's state.
            update: as `decide` returns it.
        """
        raise NotImplementedError

    def curvature_input(self, statistics, averages, calls):
        """A block's averages as its curvature takes them: summed over the layer's calls, without the loss scale, in the units of
        the loss (`ratio_of`)."""
        raise NotImplementedError

    def watch(self, gradients, finite, step):
        """Sees the plain gradients of every block's kernel and bias, and whether all gradients are finite. Default: nothing."""

    def gates(self, gates):
        """`[blocks]`, the gates of the layout's blocks, from those that the intervals ask for."""
        return gates

    def control_values(self, block, step):
        """Pairs of a control of a block's statistics and its value for the next step. Default: none."""
        return []

    def state_of(self, group, inputs):
        """What the curvature of a group preconditions with; `inputs(blocks)` is what these were refreshed with."""
        return [sharding.whole(v) for v in group.curvature.variables]

    def _precondition(self, grads, index, damping, inputs):
        """Preconditioned kernel and bias gradients by position, and parts of the sum of all `<P, V>`."""
        gradients, found, lengths = {}, {}, []
        for block in self.held.blocks:
            bias = None if block.bias is None else grads[index(block.bias)]
            gradients[block] = ops.cast(block.rows.matrix(grads[index(block.kernel)], bias), block.shape[2])
        for group in self.held.groups:
            v = self.everywhere(group, backend.joined([gradients[block] for block in group.blocks]))
            p = self.everywhere(group, group.curvature.precondition(v, damping, self.state_of(group, inputs)))
            lengths.append(ops.cast(ops.sum(p * v), "float32"))
            found |= dict(group.parts(p))
        if self.held is not self.layout:
            found, length = self._workers.preconditioned(found, sum(lengths, ops.zeros(())))
            lengths = [length]
        preconditioned = {}
        for block in self.layout.blocks:
            kernel, bias = block.rows.kernel_and_bias(found[block])
            preconditioned[index(block.kernel)] = kernel
            if bias is not None:
                preconditioned[index(block.bias)] = bias
        return preconditioned, lengths

    def _all_finite(self, preconditioned, lengths, grads, variables):
        """Whether all gradients are finite."""
        finite = ops.isfinite(sum(lengths))
        for i, (gradient, variable) in enumerate(zip(grads, variables, strict=True)):
            if gradient is None or i in preconditioned or self._overwrite_variable_with_gradient(variable):
                continue
            values = gradient.values if backend.is_sparse(gradient) else gradient
            finite = finite & ops.isfinite(ops.sum(ops.cast(values, "float32")))
        self.assign_add(self._skipped_steps, ops.cast(~finite, self._skipped_steps.dtype))
        return finite

    def get_config(self):
        config = super().get_config()
        config.pop("gradient_accumulation_steps", None)
        config.update(
            damping=schedules.serialize(self.damping),
            factor_decay=self.factor_decay,
            factor_interval=schedules.serialize(self.factor_interval),
            inverse_interval=schedules.serialize(self.inverse_interval),
            kl_clip=self.kl_clip,
            loss_clip=self.loss_clip,
            fisher_scale=self.fisher_scale,
            interval_growth=self.interval_growth,
            rest=self.rest,
            rest_learning_rate=schedules.serialize(self.rest_learning_rate),
        )
        if self.gradient_worker_fraction != 1:
            config["gradient_worker_fraction"] = self.gradient_worker_fraction
        if self.reduce_scatter:
            config["reduce_scatter"] = True
        if self.shard_state:
            config["shard_state"] = True
        if isinstance(self.communicator, str) and self.communicator != "auto":
            config["communicator"] = self.communicator
        return config


def _unsaved(shape, initializer, dtype, name):
    """A variable that is not a part of the optimizer's state: workers have different ones."""
    return keras.Variable(initializer, shape, dtype, trainable=False, name=name)
