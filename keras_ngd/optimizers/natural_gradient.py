"""The flow of a natural-gradient step, once for all methods."""

import keras
from keras import ops

from keras_ngd import backend, schedules
from keras_ngd.optimizers.averaging import WeightAveraging
from keras_ngd.optimizers.blocks import Layout, find_blocks
from keras_ngd.optimizers.state import StrictState


def stacked(group, inputs):
    """What the curvature of a group takes, of all its blocks."""
    parts = zip(*(inputs[block] for block in group.blocks), strict=True)
    return [part[0] if len(part) == 1 else ops.concatenate(part) for part in parts]


class NaturalGradient(StrictState, WeightAveraging, keras.optimizers.SGD):
    """Base of all methods: statistics in, curvature updated, gradients preconditioned, then Keras's own SGD.

    One step does, in this order:

        1  pair          variables into blocks (kernel, bias, statistics) and the rest
        2  average       statistics over the calls of layers called more than once
        3  refresh       the curvature's inverses, where the interval is due
        4  precondition  P = F^-1 V for every block
        5  clip          P <- nu P,  nu = min(1, sqrt(kl_clip / (lr^2 |sum <P, V>|)))   over all blocks
        6  step          keras.optimizers.SGD on P (blocks) and on the plain gradient (all other variables)
        7  gate          decide what the next backward pass records

    A batch whose statistics are not finite leaves a layer's averages as they are, and is tried again with the next one;
    a batch whose gradients are not finite counts as a zero gradient. Both are counted: `skipped_statistics`,
    `skipped_steps`.

    Methods override `make_statistics`, `make_curvature` and `curvature_input`; those whose layers do not all follow one
    clock also `build_curvature`, `refresh` and `gates`.

    Args:
        learning_rate: float, `LearningRateSchedule` or callable, as for every Keras optimizer.
        damping: positive float or `LearningRateSchedule` (of the step).
        momentum: float in [0, 1). Default 0.9.
        factor_decay: float in [0, 1): how much of the statistics' average is kept at an update. The average is free of
            start-up bias: after t updates its weights are proportional to `factor_decay ** age` and sum to 1.
        factor_interval: int or schedule: steps between updates of the statistics.
        inverse_interval: int or schedule: steps between refreshes of the inverses.
        kl_clip: positive float, or None for no clipping: bound on the squared length of a step in the Fisher metric.
        **kwargs: all other arguments of `keras.optimizers.SGD`: `nesterov`, `weight_decay` (decoupled), `clipnorm`,
            `clipvalue`, `global_clipnorm` (these clip the preconditioned gradient), `use_ema`, `ema_momentum`,
            `ema_overwrite_frequency`, `loss_scale_factor`, `name`.
    """

    def __init__(
        self,
        learning_rate,
        damping,
        momentum=0.9,
        factor_decay=0.95,
        factor_interval=10,
        inverse_interval=100,
        kl_clip=1e-3,
        **kwargs,
    ):
        name = type(self).__name__
        if kwargs.get("gradient_accumulation_steps"):
            raise ValueError(
                f"{name} does not support `gradient_accumulation_steps`: statistics and gradients would come from "
                "different batches. Use a larger batch. Received: gradient_accumulation_steps="
                f"{kwargs['gradient_accumulation_steps']}"
            )
        if not schedules.is_number(factor_decay) or not 0 <= factor_decay < 1:
            raise ValueError(f"`factor_decay` must be in [0, 1). Received: factor_decay={factor_decay!r}")
        if kl_clip is not None and not (schedules.is_number(kl_clip) and 0 < kl_clip < float("inf")):
            raise ValueError(f"`kl_clip` must be a positive float or None. Received: kl_clip={kl_clip!r}")
        damping = schedules.check_positive("damping", schedules.deserialize(damping))
        factor_interval = schedules.check_interval("factor_interval", schedules.deserialize(factor_interval))
        inverse_interval = schedules.check_interval("inverse_interval", schedules.deserialize(inverse_interval))
        super().__init__(learning_rate=learning_rate, momentum=momentum, **kwargs)
        self.damping, self.factor_decay = damping, float(factor_decay)
        self.kl_clip = None if kl_clip is None else float(kl_clip)
        self.factor_interval, self.inverse_interval = factor_interval, inverse_interval
        self.layout = Layout()

    def measure(self, model, data):
        """Settles what is to be measured on a model about to be captured, and on a batch of its inputs (or None)."""

    def make_statistics(self, layer):
        """New, unattached `Statistics` of the kind this method needs of a layer."""
        raise NotImplementedError

    def make_curvature(self, group):
        """A new curvature for a `Group` of blocks of one shape."""
        raise NotImplementedError

    def further_bytes(self, block):
        """Size of what a block needs besides its statistics' averages and its curvature."""
        return 0

    # Set-up

    def build(self, variables):
        """Creates momenta, inverses and counters for a model's trainable variables.

        Raises:
            ValueError: if the model was not captured for this kind of optimizer.
            RuntimeError: if the set-up has several workers.
        """
        if self.built:
            return
        workers = backend.parallel_workers()
        if workers is not None:
            raise RuntimeError(
                f"{type(self).__name__} runs on one worker so far, but found {workers}: the workers would precondition "
                "differently and drift apart."
            )
        variables = list(variables)
        layout = Layout(find_blocks(variables, self._var_key))
        self._check_blocks(layout.blocks)
        super().build(variables)
        self.layout = layout
        self.build_curvature(layout)
        self._next_factors = self.add_variable((), dtype="int", name="next_factor_step")
        self._next_inverses = self.add_variable((), dtype="int", name="next_inverse_step")
        self._factor_updates = self.add_variable((), dtype="int", name="factor_updates")
        self._inverse_updates = self.add_variable((), dtype="int", name="inverse_updates")
        self._skipped_statistics = self.add_variable((), dtype="int", name="skipped_statistics")
        self._skipped_steps = self.add_variable((), dtype="int", name="skipped_steps")
        # TensorFlow's trainer builds the optimizer of a built model while it traces the first step.
        with backend.outside_trace():
            if not self._restore_pending():
                # A checkpoint restored here has brought its own gates, with the statistics.
                for number, block in enumerate(layout.blocks):
                    self.start_statistics(block.statistics, number)

    def build_curvature(self, layout):
        """Creates the curvatures, and lists in `_refreshed` all variables that a refresh renews."""
        for group in layout.groups:
            group.curvature = self.make_curvature(group)
            group.curvature.build(self._add_state)
        self._refreshed = [variable for group in layout.groups for variable in group.curvature.variables]

    def start_statistics(self, statistics, number):
        """Opens the gate of the layer `number` for the first batch."""
        statistics.gate.assign(1.0)

    def _add_state(self, shape, initializer, dtype, name):
        return self.add_variable(shape, initializer=initializer, dtype=dtype, name=name)

    def _check_blocks(self, blocks):
        name = type(self).__name__
        if not blocks:
            raise ValueError(
                f"{name} found no captured layers, so it would train as plain SGD. Call "
                "`keras_ngd.capture(model, optimizer)` before `model.compile` (or after unfreezing layers). A saved model "
                "that makes its own layers: load it with `compile=False`, capture, compile, then `model.load_weights`."
            )
        for block in blocks:
            expected = self.make_statistics(block.statistics.owner()).spec
            if block.statistics.spec != expected:
                raise ValueError(
                    f"Layer {block.layer!r} was captured for another optimizer: it records {block.statistics.spec}, but "
                    f"{name} needs {expected}. Call `keras_ngd.capture(model, optimizer)` with this optimizer."
                )

    def __setattr__(self, name, value):
        # Keras's LossScaleOptimizer announces itself to the optimizer it wraps by resetting this attribute.
        if name == "loss_scale_factor" and name in self.__dict__:
            raise ValueError(
                f"{type(self).__name__} cannot be wrapped in a LossScaleOptimizer (Keras does so under `mixed_float16`): "
                "its statistics would carry the square of a loss scale it is not told. Use the `mixed_bfloat16` policy, or "
                f"{type(self).__name__}(..., loss_scale_factor=1024.0) with model.compile(..., auto_scale_loss=False)."
            )
        super().__setattr__(name, value)

    # Reading

    def _read(self, counter):
        return int(getattr(self, counter)) if self.built else 0

    @property
    def skipped_statistics(self):
        """How many updates of the statistics were left out because some of them were not finite."""
        return self._read("_skipped_statistics")

    @property
    def skipped_steps(self):
        """How many steps took a zero gradient because some gradient was not finite."""
        return self._read("_skipped_steps")

    @property
    def factor_updates(self):
        """How many batches have entered the statistics' averages."""
        return self._read("_factor_updates")

    @property
    def inverse_updates(self):
        """How often the inverses were refreshed."""
        return self._read("_inverse_updates")

    # The step

    def apply(self, grads, trainable_variables=None):
        """One step; see the class. Arguments as for `keras.optimizers.Optimizer.apply`."""
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        if not self.built:
            with keras.name_scope(self.name):
                self.build(variables)
        grads = list(grads)
        self._check_step(grads, variables)
        position = {self._var_key(v): i for i, v in enumerate(variables)}
        with keras.name_scope(self.name):
            new = self._natural_gradients(grads, variables, lambda v: position[self._var_key(v)])
        super().apply(new, trainable_variables)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        if self.built and len(trainable_variables) != len(self._trainable_variables):
            self._fail_on_changed_variables(len(trainable_variables))
        return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    def _fail_on_changed_variables(self, count):
        raise ValueError(
            f"{type(self).__name__} was built on {len(self._trainable_variables)} variables but is given {count}: layers were "
            "frozen, unfrozen, captured or released since. Create a new optimizer, call `keras_ngd.capture(model, optimizer)` "
            "with it, and compile again."
        )

    def _check_step(self, grads, variables):
        with backend.outside_trace():
            self._restore_pending()  # raises again what `build` raised
        known = self._trainable_variables_indices
        if len(variables) != len(known) or any(self._var_key(v) not in known for v in variables):
            self._fail_on_changed_variables(len(variables))
        missing = {self._var_key(v) for g, v in zip(grads, variables, strict=True) if g is None}
        for block in self.layout.blocks:
            if not block.statistics.reached or self._var_key(block.statistics.gate) in missing:
                raise ValueError(
                    f"Layer {block.layer!r} was captured, but the training step does not call it (it takes no part in the "
                    "loss, or its kernel is used without it), so its statistics never arrive. Leave it out: "
                    f"`keras_ngd.capture(model, optimizer, skip=[{block.layer!r}])`."
                )
            if not block.statistics.several_calls and block.statistics.traced_calls > 1:
                raise ValueError(self._several_calls_message(block))
            block.statistics.forget_trace()

    def _several_calls_message(self, block):
        return (
            f"Layer {block.layer!r} is called several times in a training step, and what {type(self).__name__} records of its "
            f"calls cannot be put together. Leave it out: `keras_ngd.capture(model, optimizer, skip=[{block.layer!r}])`."
        )

    def _natural_gradients(self, grads, variables, index):
        """Steps 2 to 5 and 7: the gradients as the update rule and the overwriting of statistics are to see them."""
        step = ops.convert_to_tensor(self._iterations)
        averages = self._average_over_calls(grads, index)
        opened = self._count_statistics(grads, index, step)
        damping = schedules.value_at(self.damping, step)

        def inputs(blocks):
            return {
                block: self.curvature_input(block.statistics, averages[block], grads[index(block.statistics.calls)])
                for block in blocks
            }

        self._refresh(inputs, damping, step, opened)
        preconditioned, lengths = self._precondition(grads, index, damping, inputs)
        nu, finite = self._step_scale(preconditioned, lengths, grads, variables)
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
        for block, gate in zip(self.layout.blocks, self.gates(self._next_gate(step)), strict=True):
            new[index(block.statistics.gate)] = gate
            for variable, value in zip(block.statistics.averages, averages[block], strict=True):
                new[index(variable)] = value
            for variable, value in self.control_values(block, step):
                new[index(variable)] = value
        return [new.get(i, gradient) for i, gradient in enumerate(grads)]

    def _follows_plain_rule(self, gradient, variable):
        return gradient is not None and not (
            self._overwrite_variable_with_gradient(variable) or backend.is_sparse(gradient)
        )

    def _average_over_calls(self, grads, index):
        """What the probes emitted, by block; the mean over its calls where a layer was called more than once."""
        blocks = self.layout.blocks
        emitted = {block: [grads[index(v)] for v in block.statistics.averages] for block in blocks}
        calls = {block: grads[index(block.statistics.calls)] for block in blocks}

        def divided():
            return [ops.divide(t, ops.cast(calls[b], t.dtype)) for b in blocks for t in emitted[b]]

        several = ops.max(ops.stack(list(calls.values()))) > 1
        flat = iter(ops.cond(several, divided, lambda: [t for b in blocks for t in emitted[b]]))
        return {block: [next(flat) for _ in emitted[block]] for block in blocks}

    def _count_statistics(self, grads, index, step):
        """Advances the counters of the statistics; whether any were recorded."""
        for block in self.layout.blocks:
            if not block.statistics.several_calls:
                calls = grads[index(block.statistics.calls)]
                backend.check_at_most(calls, 1.0, self._several_calls_message(block))
        blocks = [block.statistics for block in self.layout.blocks]
        open_gates = ops.stack([s.gate > 0 for s in blocks])
        opened = ops.any(open_gates)
        refused = ops.stack([grads[index(s.accepted)] < grads[index(s.calls)] for s in blocks])
        updated = opened & ~ops.any(refused & open_gates)
        due = step + schedules.interval_at(self.factor_interval, step)
        self._next_factors.assign(ops.where(updated, due, ops.convert_to_tensor(self._next_factors)))
        self._factor_updates.assign_add(ops.cast(updated, step.dtype))
        self._skipped_statistics.assign_add(ops.cast(opened & ~updated, step.dtype))
        return opened

    def _next_gate(self, step):
        """The weight with which the next batch enters the averages; 0 where none is due."""
        decay = ops.convert_to_tensor(self.factor_decay, "float32")
        updates = ops.cast(ops.convert_to_tensor(self._factor_updates), "float32")
        rate = (1 - decay) / (1 - ops.power(decay, updates + 1))
        return ops.where(step + 1 >= ops.convert_to_tensor(self._next_factors), rate, 0.0)

    def _refresh(self, inputs, damping, step, opened):
        """Replaces the curvatures' states where a refresh is due."""
        old = [ops.convert_to_tensor(variable) for variable in self._refreshed]
        due = self.refresh_due(step, opened)
        new = ops.cond(due, lambda: self.refresh(inputs(self.layout.blocks), damping, old), lambda: list(old))
        for variable, value in zip(self._refreshed, new, strict=True):
            self.assign(variable, value)
        following = step + schedules.interval_at(self.inverse_interval, step)
        self._next_inverses.assign(ops.where(due, following, ops.convert_to_tensor(self._next_inverses)))
        self._inverse_updates.assign_add(ops.cast(due, step.dtype))

    def refresh_due(self, step, opened):
        """Whether the curvatures are to be refreshed at `step`; `opened` tells whether it recorded statistics."""
        recorded = ops.convert_to_tensor(self._factor_updates) > 0
        return recorded & (step >= ops.convert_to_tensor(self._next_inverses))

    def refresh(self, inputs, damping, old):
        """New values of the refreshed variables.

        Args:
            inputs: for each block what its curvature takes.
            damping: scalar.
            old: the variables' values.
        """
        new = []
        for group, state in zip(self.layout.groups, self._states(old), strict=True):
            new += group.curvature.refresh(*stacked(group, inputs), damping, state)
        return new

    def _states(self, values):
        """The refreshed variables' values as one state for each group."""
        values = iter(values)
        return [[next(values) for _ in group.curvature.variables] for group in self.layout.groups]

    def curvature_input(self, statistics, averages, calls):
        """A block's averages as its curvature takes them: summed over the layer's calls, without the loss scale."""
        raise NotImplementedError

    def watch(self, gradients, finite, step):
        """Sees the plain gradients of every block's kernel and bias, and whether all gradients are finite. Default: nothing."""

    def gates(self, gate):
        """The gate of every block of the layout, from the one that the intervals ask for."""
        return [gate] * len(self.layout.blocks)

    def control_values(self, block, step):
        """Pairs of a control of a block's statistics and its value for the next step. Default: none."""
        return []

    def state_of(self, group, inputs):
        """What the curvature of a group preconditions with; `inputs(blocks)` is what these were refreshed with."""
        return [ops.convert_to_tensor(v) for v in group.curvature.variables]

    def _precondition(self, grads, index, damping, inputs):
        """Preconditioned kernel and bias gradients by position, and `<P, V>` of each group."""
        preconditioned, lengths = {}, []
        for group in self.layout.groups:
            state = self.state_of(group, inputs)
            parts = []
            for block in group.blocks:
                bias = None if block.bias is None else grads[index(block.bias)]
                parts.append(ops.cast(block.rows.matrix(grads[index(block.kernel)], bias), block.shape[2]))
            v = parts[0] if len(parts) == 1 else ops.concatenate(parts)
            p = group.curvature.precondition(v, damping, state)
            lengths.append(ops.cast(ops.sum(p * v), "float32"))
            for block, part in group.slices():
                kernel, bias = block.rows.kernel_and_bias(p[part])
                preconditioned[index(block.kernel)] = kernel
                if bias is not None:
                    preconditioned[index(block.bias)] = bias
        return preconditioned, lengths

    def _step_scale(self, preconditioned, lengths, grads, variables):
        """The KL clip's factor, and whether all gradients are finite."""
        length = sum(lengths)
        finite = ops.isfinite(length)
        for i, (gradient, variable) in enumerate(zip(grads, variables, strict=True)):
            if gradient is None or i in preconditioned or self._overwrite_variable_with_gradient(variable):
                continue
            values = gradient.values if backend.is_sparse(gradient) else gradient
            finite = finite & ops.isfinite(ops.sum(ops.cast(values, "float32")))
        self._skipped_steps.assign_add(ops.cast(~finite, self._skipped_steps.dtype))
        if self.kl_clip is None:
            return ops.ones(()), finite
        if self.loss_scale_factor is not None:
            length = length / self.loss_scale_factor**2
        rate = ops.cast(self.learning_rate, "float32")
        squared = rate * rate * ops.abs(length)
        return ops.minimum(1.0, ops.sqrt(self.kl_clip / ops.maximum(squared, 1e-30))), finite

    def get_config(self):
        config = super().get_config()
        config.pop("gradient_accumulation_steps", None)
        config.update(
            damping=schedules.serialize(self.damping),
            factor_decay=self.factor_decay,
            factor_interval=schedules.serialize(self.factor_interval),
            inverse_interval=schedules.serialize(self.inverse_interval),
            kl_clip=self.kl_clip,
        )
        return config
