"""The likelihoods of Keras's losses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_ngd import keras_private
from keras_ngd.fisher.likelihoods import NAMED, Bernoulli, Categorical, Gaussian, Likelihood
from keras_ngd.typing import Tensor


class Known(NamedTuple):
    """What is known of a loss.

    Attributes:
        likelihood: its `Likelihood`.
        weight: function of the labels that gives how many labels each position has, or None where all have one.
        visible: function of the labels that gives which positions count at all, or None where all do.
    """

    likelihood: Likelihood
    weight: Callable[[Tensor], Tensor] | None = None
    visible: Callable[[Tensor], Tensor] | None = None


def known(loss: Any) -> Known | None:
    """What is known of a loss, a `keras.losses.Loss`; None where that is nothing."""
    found = keras_private.loss_function(loss)
    if found is None:
        return None
    function, arguments = found
    make = _KNOWN.get(function)
    return None if make is None else make(**arguments)


def unknown(loss: Any) -> str:
    """What to say of a loss whose likelihood is not known."""
    name = getattr(loss, "name", None) or type(loss).__name__
    return (
        f"With fisher='sampled' labels are drawn from the model, and it is not known from which distribution the loss {name!r} "
        f"takes them to be. Say so with the argument `likelihood` of the optimizer, one of {tuple(NAMED)} or an object such as "
        "`keras_ngd.fisher.Categorical(from_logits=True)`; or use fisher='empirical'. Known by "
        "themselves are categorical and sparse categorical cross-entropy, binary cross-entropy and the mean squared error."
    )


def _categorical(from_logits: bool = False, label_smoothing: float = 0.0, axis: int = -1) -> Known:
    def weight(labels: Tensor) -> Tensor:
        # The Hessian of `-sum t log softmax(z)` is that of one label times the sum of `t`.
        return ops.maximum((1 - label_smoothing) * ops.sum(labels, axis=axis) + label_smoothing, 0.0)

    return Known(Categorical(from_logits, axis), weight)


def _sparse_categorical(from_logits: bool = False, ignore_class: int | None = None, axis: int = -1) -> Known:
    def visible(labels: Tensor) -> Tensor:
        return ops.not_equal(labels, ops.cast(ignore_class, labels.dtype))

    return Known(Categorical(from_logits, axis), visible=None if ignore_class is None else visible)


def _binary(from_logits: bool = False, label_smoothing: float = 0.0, axis: int = -1) -> Known:
    # The Hessian does not depend on the labels.
    return Known(Bernoulli(from_logits, axis))


_KNOWN: dict[Any, Callable[..., Known]] = {
    keras.losses.categorical_crossentropy: _categorical,
    keras.losses.sparse_categorical_crossentropy: _sparse_categorical,
    keras.losses.binary_crossentropy: _binary,
    keras.losses.mean_squared_error: lambda: Known(Gaussian()),
}
