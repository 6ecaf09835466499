"""Which examples of a batch have labels that are drawn: the first ones, a share of all."""

from collections.abc import Callable, Sequence

from keras import ops

from keras_ngd import backend
from keras_ngd.typing import Tensor

# The share of a batch, where none is asked for.
DEFAULT_FRACTION = 0.25


def drawn(x: Tensor, fraction: float) -> Tensor:
    """How many of the examples of `x`, its first axis, have labels that are drawn: an int, or a tensor where that is not known.

    At least one, and not all; none of a single example.
    """
    examples = x.shape[0]
    if examples is not None:
        return min(max(int(examples * fraction), 1), examples - 1) if examples else 0
    examples = ops.shape(x)[0]
    # As Python multiplies.
    found = ops.cast(ops.floor(ops.cast(examples, "float64") * fraction), "int32")
    return ops.maximum(ops.minimum(ops.maximum(found, 1), ops.cast(examples, "int32") - 1), 0)


def observed(x: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """How many of the examples statistics are of, those with drawn labels, or a single example as it is; and all to these."""
    count = drawn(x, fraction)
    if isinstance(count, int):
        count = max(count, 1)
        return count, x.shape[0] / count if x.shape[0] else 1.0
    count = ops.maximum(count, 1)
    return count, ops.cast(ops.shape(x)[0], "float32") / ops.cast(count, "float32")


def are_drawn(draw: Tensor) -> Tensor:
    """Whether labels are drawn in this step, a scalar boolean, from the weight `label_draw` of statistics."""
    return draw[0] > 0


def of_others(
    function: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor],
    draw: Tensor,
    fraction: float,
    products: bool = False,
) -> list[Tensor]:
    """`function(*tensors)`, of all examples, or where labels are drawn of the others alone: a list of tensors.

    The function is linear in the last of the tensors, and sums over examples. Without drawn labels it is of what it would be
    without all this, so that it is the same to the last bit.
    """
    if backend.under_xla() and not products:
        # Its CPU compiler leaves gradients of convolutions as naive loops inside of a conditional, in all steps.
        return list(function(*tensors[:-1], without_drawn(tensors[-1], draw, fraction)))
    count = drawn(tensors[0], fraction)
    return ops.cond(
        are_drawn(draw),
        lambda: list(function(*(t[count:] for t in tensors))),
        lambda: list(function(*tensors)),
    )


def without_drawn(ds: Tensor, draw: Tensor, fraction: float) -> Tensor:
    """A gradient `[examples, ...]`, zero for those whose labels are drawn."""
    rows = ops.reshape(ops.arange(ops.shape(ds)[0], dtype="int32"), (-1, *(1,) * (len(ds.shape) - 1)))
    others = rows >= drawn(ds, fraction)
    if backend.under_xla():
        # Part of what makes the gradient, once it is fused.
        return ops.where(others | ~are_drawn(draw), ds, ops.zeros_like(ds))
    return ops.cond(are_drawn(draw), lambda: ds * ops.cast(others, ds.dtype), lambda: ds)
