"""What an optimizer refuses to train with, and how it says so."""

import sys
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras

from keras_ngd import distributed, schedules
from keras_ngd.distributed.communicator import Communicator
from keras_ngd.optimizers.blocks import Block, Group, Signals
from keras_ngd.optimizers.coverage import check_statistics_given, fail_on_changed_variables
from keras_ngd.optimizers.state_layout import check_shard_state
from keras_ngd.typing import Variable

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient


def _called_by(kind: type) -> bool:
    """Whether a method of an object of this class is being called, and calls what asks."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), kind):
            return True
        frame = frame.f_back
    return False


def check_own_arguments(name: str, factor_decay: float, kwargs: dict[str, Any]) -> None:
    """Of the optimizer called `name`."""
    if kwargs.get("gradient_accumulation_steps"):
        raise ValueError(
            f"{name} does not support `gradient_accumulation_steps`: statistics and gradients would come from "
            "different batches. Use a larger batch. Received: gradient_accumulation_steps="
            f"{kwargs['gradient_accumulation_steps']}"
        )
    if not schedules.is_number(factor_decay) or not 0 <= factor_decay < 1:
        raise ValueError(f"`factor_decay` must be in [0, 1). Received: factor_decay={factor_decay!r}")


def check_division(
    communicator: Communicator | str, gradient_worker_fraction: float, reduce_scatter: bool, shard_state: bool
) -> None:
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
    check_shard_state(shard_state, gradient_worker_fraction)


def check_stagger(stagger: bool) -> None:
    """Raises a `ValueError` if the argument is not possible."""
    if not isinstance(stagger, bool):
        raise ValueError(
            "`stagger` must be True, for refreshes that are spread over the steps of each `inverse_interval`, or False. "
            f"Received: stagger={stagger!r}"
        )


def check_saved(optimizer: "NaturalGradient", groups: Sequence[Group]) -> None:
    """Raises a `ValueError` if state would not be saved that a refresh cannot make anew."""
    fraction = optimizer.gradient_worker_fraction
    if fraction != 1 and any(group.curvature.has_steps for group in groups):
        raise ValueError(
            f"{type(optimizer).__name__} keeps averages of its steps' gradients, which cannot be made anew where they were not "
            "saved; with a part of the workers holding each layer's state it is not. Leave `gradient_worker_fraction` at 1. "
            f"Received: gradient_worker_fraction={fraction!r}"
        )


def check_blocks(optimizer: "NaturalGradient", blocks: Sequence[Block], variables: Sequence[Variable]) -> None:
    """Raises a `ValueError` if there are no blocks among the variables that an optimizer is built on, or those of another."""
    name = type(optimizer).__name__
    # A MultiOptimizer in between may have kept to itself that it is wrapped.
    check_loss_scale(optimizer)
    if not blocks:
        check_statistics_given(optimizer, variables)
        raise ValueError(
            f"{name} found no captured layers, so it would train as plain SGD. Call "
            "`keras_ngd.capture(model, optimizer)` before `model.compile` (or after unfreezing layers). A saved model "
            "that makes its own layers: load it with `compile=False`, capture, compile, then `model.load_weights`."
        )
    for block in blocks:
        expected = optimizer.approximation_of(block.geometry).make_statistics(block.statistics.owner()).spec
        if block.statistics.spec != expected:
            raise ValueError(
                f"Layer {block.layer!r} was captured for another optimizer: it records {block.statistics.spec}, but "
                f"{name} needs {expected}. Call `keras_ngd.capture(model, optimizer)` with this optimizer."
            )

        fraction = block.statistics.sampled_fraction
        if fraction != optimizer.labels.fraction:
            drawn = "the labels of no examples" if fraction is None else f"the labels of {fraction} of the examples"
            raise ValueError(
                f"Layer {block.layer!r} was captured for another optimizer, with which {drawn} are drawn. It is now given "
                f"{name}(fisher={optimizer.fisher!r}, statistics_fraction={optimizer.statistics_fraction}). Call "
                "`keras_ngd.capture(model, optimizer)` with this optimizer."
            )


def check_loss_scale(optimizer: "NaturalGradient") -> None:
    """Called where a LossScaleOptimizer would set a scale, or build this optimizer."""
    if _called_by(keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            f"{type(optimizer).__name__} cannot be wrapped in a LossScaleOptimizer (Keras does so under `mixed_float16`): "
            "its statistics would carry the square of a loss scale it is not told. Use the `mixed_bfloat16` policy, or "
            f"{type(optimizer).__name__}(..., loss_scale_factor=1024.0) with model.compile(..., auto_scale_loss=False)."
        )


def check_step(optimizer: "NaturalGradient", signals: Signals) -> None:
    """Raises a `ValueError` if a built optimizer is given other variables than it was built on, or a layer's statistics cannot
    arrive."""
    known = optimizer._trainable_variables_indices
    if len(signals.variables) != len(known) or any(signals.key(v) not in known for v in signals.variables):
        fail_on_changed_variables(optimizer, len(signals.variables), signals.variables)
    for block in optimizer.layout.blocks:
        if block.statistics.vectorized is not None and not block.statistics.reached:
            raise ValueError(block.statistics.vectorized)
        if not block.statistics.reached or signals.of(block.statistics.gate) is None:
            raise ValueError(
                f"Layer {block.layer!r} was captured, but the training step does not call it (it takes no part in the "
                "loss, or its kernel is used without it), so its statistics never arrive. Leave it out: "
                f"`keras_ngd.capture(model, optimizer, skip=[{block.statistics.owner().path!r}])`."
            )
        statistics = block.statistics
        if not statistics.several_calls and (statistics.traced_calls > 1 or statistics.looped):
            raise ValueError(several_calls_message(optimizer, block))
        block.statistics.forget_trace()


def several_calls_message(optimizer: "NaturalGradient", block: Block) -> str:
    """What to say where rows of several calls, or passes, of a layer cannot be put together."""
    name, skip = type(optimizer).__name__, f"skip=[{block.statistics.owner().path!r}]"
    if block.statistics.several_calls:
        return (
            f"The gradients of several passes were added up before one step, so the rows that {name} keeps of layer "
            f"{block.layer!r} were, too: those of one batch to another's. Make a step for each pass, or one pass with a "
            "larger batch; KFAC and THOR take gradients that were added."
        )
    return (
        f"Layer {block.layer!r} is called several times in a training step, and what {name} records of its calls cannot be "
        f"put together. Leave it out: `keras_ngd.capture(model, optimizer, {skip})`. (If the gradients of "
        "several passes were added up: make a step for each, or one pass with a larger batch; KFAC and THOR take them.)"
    )
