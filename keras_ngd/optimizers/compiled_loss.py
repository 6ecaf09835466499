"""What Keras's compiled loss makes of each single loss value.

`model.compile` makes a `CompileLoss`, which both trainers call inside the step that they trace. It keeps a list of `Loss`
objects, one for each output that has one. Here each is replaced in this list by one that tells, whenever it is called, with what
coefficients the single loss values enter the total. Nothing else about the loss changes.

How that is done `loss_coefficients` knows. Where labels are drawn from the model, the same objects put what draws them in front.
"""

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_ngd import backend, keras_private, replica
from keras_ngd.fisher import known_losses
from keras_ngd.fisher.cotangents import sent_back
from keras_ngd.optimizers import loss_coefficients
from keras_ngd.typing import Tensor

if TYPE_CHECKING:
    from keras_ngd.optimizers.label_sampling import LabelSampling


class Heard:
    """What compiled losses told since the last forward pass, for one optimizer.

    Of the coefficients `c_j`, with which the single loss values enter the total that is differentiated, of all losses together:

        absolute    sum of |c_j|
        squares     sum of c_j^2
        whole       the sum of the squares of coefficients of losses that are one number for the batch: of each, one `C` is
                    taken for as many values `C / B` as the batch has examples

    Args:
        sampling: what draws labels from the model for the losses, or None.
    """

    def __init__(self, sampling: "LabelSampling | None" = None) -> None:
        self.sampling = sampling
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
    told = [
        entry._replace(loss=Telling(entry.loss, entry.loss_weights, listeners, entry.name, number))
        for number, entry in enumerate(entries)
    ]
    keras_private.replace_flat_losses(compile_loss, told)


class Telling:
    """A `Loss`, or what is called like one, that tells listeners about every call.

    Args:
        loss: the `keras.losses.Loss`.
        weight: what its value is multiplied with in the total, or None.
        listeners: a set of `Heard`.
        output: name of the model's output that it is of.
        number: of the loss among the model's.
    """

    def __init__(
        self, loss: Any, weight: float | None, listeners: Iterable[Heard], output: str = "", number: int = 0
    ) -> None:
        self._loss, self._weight, self._listeners = loss, weight, listeners
        self._output, self._number = output, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)

    def __call__(self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        loss, seen, own = self._loss, [], vars(self._loss).get("call")
        call, slots = loss.call, []
        sampling = next((h.sampling for h in self._listeners if h.sampling is not None and h.sampling.begun()), None)
        masks = [m for m in [keras_private.mask_of(y_pred)] if m is not None]

        def seen_call(y_true: Tensor, y_pred: Tensor, **kwargs: Any) -> Tensor:
            if sampling is not None:
                given = (y_true, y_pred, sample_weight, masks)
                y_true, y_pred, slot = sampling.in_front(loss, self._output, self._number, self._weight, call, given)
                slots.append(slot)
            values = call(y_true, y_pred, **kwargs)
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
        if sampling is not None:
            if len(slots) != 1:
                raise ValueError(known_losses.unknown(loss))
            result = sent_back(result, slots[0])
        # A loss whose `__call__` is its own need not have one `call`: its value is taken for a mean.
        values = seen[0] if len(seen) == 1 else ops.zeros(())
        masks += [m for m in [keras_private.mask_of(values)] if m is not None]
        sums = loss_coefficients.sums(values, sample_weight, masks, getattr(loss, "reduction", None))
        if self._weight is not None:
            weight = ops.abs(ops.stop_gradient(ops.convert_to_tensor(self._weight, "float32")))
            sums = (sums[0] * weight, sums[1] * weight**2, sums[2] * weight**2)
        for heard in list(self._listeners):
            heard.tell(sums)
        return result
