"""What Keras's compiled loss makes of each single loss value.

`model.compile` makes a `CompileLoss`, which both trainers call inside the step that they trace. It keeps a list of `Loss`
objects, one for each output that has one. Here each is replaced in this list by one that tells, whenever it is called, with what
coefficients the single loss values enter the total. Nothing else about the loss changes.

This is the only module that knows how `Loss.__call__` reduces values; `tf_tests/optimizers/test_loss_ratio.py` fails where
that is done otherwise.
"""

import math
import weakref
from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from keras_ngd import backend, keras_private, replica
from keras_ngd.typing import Tensor

MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


class Heard:
    """What compiled losses told since the last forward pass, for one optimizer.

    Of the coefficients `c_j`, with which the single loss values enter the total that is differentiated, of all losses together:

        absolute    sum of |c_j|
        squares     sum of c_j^2
        whole       the sum of the squares of coefficients of losses that are one number for the batch: of each, one `C` is
                    taken for as many values `C / B` as the batch has examples
    """

    def __init__(self) -> None:
        # Replicas of a strategy are traced one after the other, each in a thread of its own.
        self._told: dict[Any, list[tuple[Any, Any]]] = {}

    def forget(self) -> None:
        """Told at a layer's call: what was told before is of another step."""
        # Where TensorFlow traces, a layer may be called once more in the backward pass, and steps are told apart by their graphs.
        graph = backend.graph()
        told = self._told.get(replica.number(), []) if graph is not None else []
        self._told[replica.number()] = [(of, sums) for of, sums in told if of is graph]

    def tell(self, sums: Any) -> None:
        self._told.setdefault(replica.number(), []).append((backend.graph(), sums))

    def take(self) -> Any:
        """`(absolute, squares, whole)`, or None where nothing was told that can be used here."""
        told = [sums for of, sums in self._told.pop(replica.number(), []) if backend.within(of)]
        if not told or not all(backend.usable(t) for sums in told for t in sums):
            return None
        return tuple(sum(parts) for parts in zip(*told, strict=True))


def compiled_losses(model: keras.Model | None) -> list[Any]:
    """The compiled losses that may be called after a captured layer of `model` was: its own, and that of what it is inside of."""
    found = {id(m): m for m in (model, getattr(keras_private.call_context(), "entry_layer", None)) if m is not None}
    losses = [keras_private.compiled_loss(m) for m in found.values()]
    return [loss for loss in losses if loss is not None]


def listen(compile_loss: Any, heard: Heard) -> None:
    """Has a `CompileLoss` tell `heard` about every call."""
    listeners = getattr(compile_loss, "keras_ngd_listeners", None)
    if listeners is None:
        listeners = compile_loss.keras_ngd_listeners = weakref.WeakSet()
        build = compile_loss.build

        def build_and_replace(y_true: Tensor, y_pred: Tensor) -> None:
            build(y_true, y_pred)
            _replace(compile_loss, listeners)

        compile_loss.build = build_and_replace
        if compile_loss.built:
            _replace(compile_loss, listeners)
    listeners.add(heard)


def _replace(compile_loss: Any, listeners: Iterable[Heard]) -> None:
    entries = keras_private.flat_losses(compile_loss)
    told = [entry._replace(loss=Telling(entry.loss, entry.loss_weights, listeners)) for entry in entries]
    keras_private.replace_flat_losses(compile_loss, told)


class Telling:
    """A `Loss`, or what is called like one, that tells listeners about every call.

    Args:
        loss: the `keras.losses.Loss`.
        weight: what its value is multiplied with in the total, or None.
        listeners: a set of `Heard`.
    """

    def __init__(self, loss: Any, weight: float | None, listeners: Iterable[Heard]) -> None:
        self._loss, self._weight, self._listeners = loss, weight, listeners

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)

    def __call__(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        loss, seen, own = self._loss, [], vars(self._loss).get("call")
        call = loss.call

        def seen_call(*args: Any, **kwargs: Any) -> Tensor:
            values = call(*args, **kwargs)
            seen.append(ops.convert_to_tensor(values))
            return values

        loss.call = seen_call
        try:
            result = loss(y_true, y_pred, sample_weight)
        finally:
            if own is None:
                del loss.call
            else:
                loss.call = own
        # A loss whose `__call__` is its own need not have one `call`: its value is taken for a mean.
        values = seen[0] if len(seen) == 1 else ops.zeros(())
        masks = [m for m in map(keras_private.mask_of, (y_pred, values)) if m is not None]
        sums = coefficients(values, sample_weight, masks, getattr(loss, "reduction", None))
        if self._weight is not None:
            weight = ops.abs(ops.stop_gradient(ops.convert_to_tensor(self._weight, "float32")))
            sums = (sums[0] * weight, sums[1] * weight**2, sums[2] * weight**2)
        for heard in list(self._listeners):
            heard.tell(sums)
        return result


def coefficients(values: Tensor, sample_weight: Tensor | None, masks: Any, reduction: str | None) -> Any:
    """The sums that `Heard` keeps, of one loss without its weight among others.

    The coefficients are those of Keras's `reduce_weighted_values`. Statistics and gradients undo that means are divided by the
    number of replicas of a strategy, so that is left out here; what is not divided by it counts as many times.

    Args:
        values: what the loss's `call` returned; only its shape matters.
        sample_weight: as the loss was given it, or None.
        masks: list of the masks on the prediction and on the values, which hide where any does.
        reduction: one of Keras's.
    """
    weight = None if sample_weight is None else ops.convert_to_tensor(sample_weight, "float32")
    if masks:
        mask = masks[0] if len(masks) == 1 else masks[0] & masks[1]
        weight = keras_private.masked_weight(weight, ops.cast(mask, "float32"), reduction)
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
