"""What an optimizer refuses to train with, and how it says so."""

import sys

import keras

from keras_ngd import backend, distributed, schedules


def _called_by(kind):
    """Whether a method of an object of this class is being called, and calls what asks."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), kind):
            return True
        frame = frame.f_back
    return False


class Checks:
    """Mixin: what would otherwise train as plain SGD, or wrongly, is an error at the earliest point."""

    def _check_own_arguments(self, factor_decay, kl_clip, kwargs):
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

    def _check_division(self, communicator, gradient_worker_fraction, reduce_scatter, shard_state):
        """Of arguments that say how several workers or devices share the work."""
        distributed.check(communicator)
        if not schedules.is_number(gradient_worker_fraction) or not 0 <= gradient_worker_fraction <= 1:
            raise ValueError(
                "`gradient_worker_fraction` must be in [0, 1]. Received: "
                f"gradient_worker_fraction={gradient_worker_fraction!r}"
            )
        if not isinstance(reduce_scatter, bool):
            raise ValueError(f"`reduce_scatter` must be True or False. Received: reduce_scatter={reduce_scatter!r}")
        if reduce_scatter and gradient_worker_fraction != 0:
            raise ValueError(
                "`reduce_scatter=True` brings sums to each layer's owner alone, so nobody else can hold its inverses: it needs "
                f"`gradient_worker_fraction=0`. Received: gradient_worker_fraction={gradient_worker_fraction!r}"
            )
        self._check_shard_state(shard_state, gradient_worker_fraction)

    def _check_blocks(self, blocks, variables):
        name = type(self).__name__
        # A MultiOptimizer in between may have kept to itself that it is wrapped.
        self._check_loss_scale()
        if not blocks:
            self.check_statistics_given(variables)
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
        # Keras's LossScaleOptimizer announces itself to the optimizer it wraps by resetting this attribute. MultiOptimizer sets
        # it too, to the scale that it applies itself.
        if name == "loss_scale_factor" and name in self.__dict__:
            self._check_loss_scale()
        super().__setattr__(name, value)

    def _check_loss_scale(self):
        """Called where a LossScaleOptimizer would set a scale, or build this optimizer."""
        if _called_by(keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                f"{type(self).__name__} cannot be wrapped in a LossScaleOptimizer (Keras does so under `mixed_float16`): "
                "its statistics would carry the square of a loss scale it is not told. Use the `mixed_bfloat16` policy, or "
                f"{type(self).__name__}(..., loss_scale_factor=1024.0) with model.compile(..., auto_scale_loss=False)."
            )

    def _check_step(self, grads, variables):
        with backend.outside_trace():
            self.check_loaded()  # raises again what `build` raised
        known = self._trainable_variables_indices
        if len(variables) != len(known) or any(self._var_key(v) not in known for v in variables):
            self.fail_on_changed_variables(len(variables), variables)
        missing = {self._var_key(v) for g, v in zip(grads, variables, strict=True) if g is None}
        for block in self.layout.blocks:
            if block.statistics.vectorized is not None and not block.statistics.reached:
                raise ValueError(block.statistics.vectorized)
            if not block.statistics.reached or self._var_key(block.statistics.gate) in missing:
                raise ValueError(
                    f"Layer {block.layer!r} was captured, but the training step does not call it (it takes no part in the "
                    "loss, or its kernel is used without it), so its statistics never arrive. Leave it out: "
                    f"`keras_ngd.capture(model, optimizer, skip=[{block.layer!r}])`."
                )
            statistics = block.statistics
            if not statistics.several_calls and (statistics.traced_calls > 1 or statistics.looped):
                raise ValueError(self._several_calls_message(block))
            block.statistics.forget_trace()

    def _several_calls_message(self, block):
        name = type(self).__name__
        if block.statistics.several_calls:
            return (
                f"The gradients of several passes were added up before one step, so the rows that {name} keeps of layer "
                f"{block.layer!r} were, too: those of one batch to another's. Make a step for each pass, or one pass with a "
                "larger batch; KFAC and THOR take gradients that were added."
            )
        return (
            f"Layer {block.layer!r} is called several times in a training step, and what {name} records of its calls cannot be "
            f"put together. Leave it out: `keras_ngd.capture(model, optimizer, skip=[{block.layer!r}])`. (If the gradients of "
            "several passes were added up: make a step for each, or one pass with a larger batch; KFAC and THOR take them.)"
        )
