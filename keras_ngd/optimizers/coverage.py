"""Which of the variables an optimizer is given are captured, and what it says where more are not than should be."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import keras

from keras_ngd.optimizers.blocks import Block
from keras_ngd.typing import Variable

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient


def _named(variables: Sequence[Variable]) -> str:
    """The paths of a few variables, for a message."""
    paths = [getattr(v, "path", v.name) for v in variables]
    return ", ".join(map(repr, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _is_kernel(variable: Variable) -> bool:
    return len(variable.shape) >= 2 and not getattr(variable, "overwrite_with_gradient", False)


def count_not_captured(variables: Sequence[Variable]) -> int:
    """How many kernels among a model's trainable variables `capture` has left out."""
    statistics = {id(s): s for s in (getattr(v, "keras_ngd_statistics", None) for v in variables) if s is not None}
    captured = {id(v) for s in statistics.values() for v in s.parameters()}
    return sum(_is_kernel(v) and id(v) not in captured for v in variables)


def check_coverage(optimizer: "NaturalGradient", variables: Sequence[Variable], blocks: Sequence[Block]) -> None:
    """Warns if more kernels are not captured than `optimizer.not_captured`, which `capture` left out."""
    left_out = optimizer.not_captured
    captured = {optimizer._var_key(v) for block in blocks for v in block.variables}
    kernels = [v for v in variables if _is_kernel(v)]
    plain = [v for v in kernels if optimizer._var_key(v) not in captured]
    if len(plain) > (left_out or 0):
        known = (
            "`keras_ngd.capture` was not called with this optimizer"
            if left_out is None
            else f"`keras_ngd.capture` left out {left_out}, when it was called with this optimizer"
        )
        warnings.warn(
            f"{type(optimizer).__name__} is to train {len(kernels)} kernels, {len(plain)} of which are not captured and follow "
            f"the rule for the rest of the model: {_named(plain)}. {known}. If layers were unfrozen or added since, call "
            "`keras_ngd.capture(model, optimizer)` with a new optimizer before `model.compile`.",
            stacklevel=2,
        )


def check_statistics_given(optimizer: "NaturalGradient", variables: Sequence[Variable]) -> None:
    """Raises an error if kernels of captured layers are among the variables, without their statistics."""
    model = optimizer.captured_model()
    statistics = {} if model is None else {id(v): v.keras_ngd_statistics for v in _statistics_weights(model)}
    kernels = {optimizer._var_key(v) for s in statistics.values() for v in s.parameters()}
    found = [v for v in variables if optimizer._var_key(v) in kernels and _is_kernel(v)]
    if found:
        raise ValueError(
            f"{type(optimizer).__name__} is given {len(variables)} variables, kernels of captured layers among them "
            f"({_named(found)}), but none of the layers' statistics, which are weights too. Differentiate the loss with "
            "respect to `model.trainable_variables`, all of them, and pass the gradients of all: "
            "`optimizer.apply(gradients, model.trainable_variables)`. (Of layers, `layer.trainable_variables`.)"
        )


def fail_on_changed_variables(
    optimizer: "NaturalGradient", count: int, variables: Sequence[Variable] | None = None
) -> None:
    """Raises the error for a step on other variables than the optimizer was built on."""
    what = f"{type(optimizer).__name__} was built on {len(optimizer.built_on)} variables but is given {count}"
    if variables is not None:
        given = {optimizer._var_key(v) for v in variables}
        missing = [v for v in optimizer.built_on if optimizer._var_key(v) not in given]
        new = [v for v in variables if optimizer._var_key(v) not in optimizer._trainable_variables_indices]
        parts = [f"{len(vs)} {which}: {_named(vs)}" for vs, which in ((missing, "missing"), (new, "new")) if vs]
        what += f" ({'; '.join(parts)})"
    raise ValueError(
        f"{what}. Either a step was asked for on a part of them: pass the gradients of all, those that are None as well, or "
        "use an optimizer for each part, captured and built for it (`optimizer.build(variables)`). Or layers were frozen, "
        "unfrozen, captured or released since: create a new optimizer, call `keras_ngd.capture(model, optimizer)` with it, "
        "and compile again."
    )


def _statistics_weights(model: keras.Model) -> list[Variable]:
    return [v for v in model.weights if hasattr(v, "keras_ngd_statistics")]
