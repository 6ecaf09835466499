"""With which coefficients the single values of a loss of Keras's enter it.

This is the only module that knows how `Loss.__call__` reduces values; `tf_tests/optimizers/test_loss_ratio.py` fails where
that is done otherwise.
"""

import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_ngd import keras_private, replica
from keras_ngd.typing import Tensor

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


def _weight(sample_weight: Tensor | None, masks: Sequence[Tensor], reduction: str | None) -> tuple[Any, Any]:
    """The weights of the values as Keras's `reduce_weighted_values` makes them, None for none; and what all masks make."""
    weight = None if sample_weight is None else ops.convert_to_tensor(sample_weight, "float32")
    if not masks:
        return weight, None
    mask = masks[0]
    for other in masks[1:]:
        mask = mask & other
    mask = ops.cast(mask, "float32")
    return keras_private.masked_weight(weight, mask, reduction), mask


def sums(values: Tensor, sample_weight: Tensor | None, masks: Any, reduction: str | None) -> Any:
    """The sums that `compiled_loss.Heard` keeps, of one loss without its weight among others.

    The coefficients are those of Keras's `reduce_weighted_values`. Statistics and gradients undo that means are divided by the
    number of replicas of a strategy, so that is left out here; what is not divided by it counts as many times.

    Args:
        values: what the loss's `call` returned; only its shape matters.
        sample_weight: as the loss was given it, or None.
        masks: list of the masks on the prediction and on the values, which hide where any does.
        reduction: one of Keras's.
    """
    weight, _ = _weight(sample_weight, masks, reduction)
    if weight is None:
        absolute = squares = count = _size(values)
        whole = len(values.shape) == 0
    else:
        weight = ops.stop_gradient(weight)
        ones, weight = keras_private.same_rank(ops.ones_like(values, "float32"), weight)
        each = ops.abs(ones * weight)
        absolute, squares, count = ops.sum(each), ops.sum(ops.square(each)), _size(each)
        whole = len(each.shape) == 0
    if reduction in MEANS and not whole:
        divisor = count
        if reduction == "mean_with_sample_weight" and weight is not None:
            divisor = ops.abs(ops.sum(weight))
        absolute, squares = _quotient(absolute, divisor), _quotient(_quotient(squares, divisor), divisor)
    else:
        replicas = replica.count()
        absolute, squares = absolute * replicas, squares * replicas**2
    if len(values.shape) == 0:
        return absolute, 0.0, absolute * absolute
    return absolute, squares, 0.0


def of_each(
    shape: Sequence[Any],
    sample_weight: Tensor | None,
    masks: Sequence[Tensor],
    reduction: str | None,
    examples: Any,
    left_out: Any,
) -> tuple[Tensor, Tensor]:
    """The coefficient of every value of a loss, and what those of the others grow by where the first examples are left out.

    Arguments are those of `sums`, but for these:

    Args:
        shape: of the values.
        examples: how many there are.
        left_out: how many of them are.

    Returns:
        Coefficients of the shape `shape`, and a scalar.
    """
    ones = ops.ones(shape, "float32")
    weight, mask = _weight(sample_weight, masks, reduction)
    rescaled = ops.cast(examples, "float32") / ops.cast(examples - left_out, "float32")
    if weight is None:
        each = ones
    else:
        weight = ops.stop_gradient(weight)
        same, expanded = keras_private.same_rank(ones, weight)
        each = ops.abs(same * expanded)
        counted = mask if reduction in ("mean", "sum_over_batch_size") else weight
        if counted is not None and (mask is not None or reduction == "mean_with_sample_weight") and reduction in MEANS:
            rows = ops.cast(ops.arange(ops.shape(counted)[0], dtype="int32") >= left_out, "float32")
            rows = ops.reshape(rows, (-1, *(1,) * (len(counted.shape) - 1)))
            rescaled = ops.divide_no_nan(ops.sum(counted), ops.sum(counted * rows))
    if reduction in MEANS and len(each.shape):
        mean = reduction == "mean_with_sample_weight" and weight is not None
        each = ops.divide_no_nan(each, ops.abs(ops.sum(weight)) if mean else ops.cast(_size(each), "float32"))
    else:
        each = each * replica.count()
    return ops.reshape(each, shape), rescaled


def _size(tensor: Tensor) -> Tensor:
    """How many numbers a tensor has: a float, or a scalar tensor where that is not known yet."""
    shape = ops.shape(tensor)
    if all(isinstance(size, int) for size in shape):
        return float(math.prod(shape))
    return ops.prod(ops.stack([ops.cast(size, "float32") for size in shape]))


def _quotient(value: Tensor, divisor: Tensor) -> Tensor:
    if isinstance(value, float) and isinstance(divisor, float):
        return value / divisor if divisor else 0.0
    return ops.divide_no_nan(ops.convert_to_tensor(value, "float32"), ops.convert_to_tensor(divisor, "float32"))
