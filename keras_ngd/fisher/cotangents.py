"""Gradients of drawn labels, in front of a loss: what goes back from there of the first examples is that of labels drawn.

What the loss is of need not be a captured layer's output. Whatever is between, activations, reshapes and layers that are not
captured, sends on what it is sent.
"""

from typing import Any

from keras import ops

from keras_ngd import backend, replica
from keras_ngd.fisher.likelihoods import Likelihood
from keras_ngd.fisher.sampled_rows import are_drawn, drawn
from keras_ngd.typing import Tensor

# Losses of one model draw different numbers, and so do replicas, of which there are fewer than ...
_LOSSES, _REPLICAS = 2**6, 2**12


def noise(shape: Any, draw: Tensor, loss: int) -> Tensor:
    """Uniform numbers in (0, 1), of this shape.

    Args:
        shape: the first axis is that of the examples whose labels are drawn.
        draw: the value of the weight `label_draw` of statistics.
        loss: number of the loss.
    """
    seed = ops.cast(draw[1:], "int32")
    number = (seed[0] * _REPLICAS + ops.cast(replica.identity(), "int32")) * _LOSSES + loss
    # Below 0, where no layer draws.
    return ops.minimum(backend.uniform(shape, ops.stack([-1 - number, seed[1]]), "float32"), 1 - 2.0**-24)


def with_drawn_labels(
    predictions: Tensor,
    likelihood: Likelihood,
    coefficients: Tensor,
    rescaled: Tensor,
    draw: Tensor,
    fraction: float,
    number: int,
) -> tuple[Tensor, Tensor]:
    """Predictions as they are, whose gradient where labels are drawn is

        of the first examples:   sqrt(c / B) times that of a loss value for a label drawn, times what the loss is multiplied with,
        of the others:           what it is, times `rescaled`.

    Args:
        predictions: what the loss is given, `[B, ...]`.
        likelihood: the loss's.
        coefficients: `c`, with which each loss value enters the loss, over what the loss is multiplied with in the total; of a
            shape that broadcasts to the predictions'.
        rescaled: scalar, by which the loss's divisor grows where it is a mean over the other examples alone.
        draw: the value of the weight `label_draw` of statistics.
        fraction: the share of the examples whose labels are drawn.
        number: of the loss among the model's.

    Returns:
        The predictions, and a slot for `sent_back`.
    """
    replicas = replica.count()

    def gradient(ds: list[Tensor], predictions: Tensor, *arguments: Tensor) -> list[Any]:
        (dy, upstream), (coefficients, rescaled, draw) = ds, arguments
        count, examples = drawn(predictions, fraction), ops.shape(predictions)[0]

        def replaced() -> Tensor:
            first = predictions[:count]

            def numbers(shape: Any) -> Tensor:
                return ops.cast(noise(shape, draw, number), first.dtype)

            c = coefficients if len(coefficients.shape) == 0 else coefficients[:count]
            # What is differentiated may be a multiple of the loss.
            size = upstream * ops.sqrt(c / ops.cast(examples, c.dtype)) / replicas
            found = ops.cast(size, dy.dtype) * ops.cast(likelihood.gradient(first, numbers), dy.dtype)
            return ops.concatenate([found, dy[count:] * ops.cast(rescaled, dy.dtype)], axis=0)

        new = ops.cond(are_drawn(draw), replaced, lambda: dy)
        return [[new, ops.zeros_like(upstream)], None, *(ops.zeros_like(t) for t in arguments)]

    constants = [ops.stop_gradient(t) for t in (predictions, coefficients, rescaled, draw)]
    found = backend.identities_with_gradient(gradient)([predictions, ops.zeros((), "float32")], *constants)
    return found[0], found[1]


def sent_back(loss: Tensor, slot: Tensor) -> Tensor:
    """A loss as it is; what it is multiplied with in what is differentiated arrives as the gradient of the slot."""

    def gradient(ds: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        return ds, ops.cast(ops.mean(ds), slot.dtype)

    return backend.identity_with_gradient(gradient)(loss, slot)
