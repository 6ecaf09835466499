"""Likelihoods: which distribution of labels a loss takes predictions for, and gradients of labels that are drawn from it."""

import abc
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ngd.typing import Config, Shape, Tensor

# A function of a shape: so many numbers, uniform in (0, 1).
Noise = Callable[[Any], Tensor]


class Likelihood(abc.ABC):
    """What a loss takes its predictions for.

    A loss has one value for each position: for each index into its predictions without the axis that it takes together.
    """

    # Which axis that is.
    axis: int = -1

    @abc.abstractmethod
    def gradient(self, predictions: Tensor, noise: Noise) -> Tensor:
        """The gradients of all loss values with respect to predictions, for labels that are drawn from these.

        So their outer products' mean, over the draws, is the Hessian of a loss value with respect to its predictions, or, where
        these are not logits, the Gauss-Newton part of the Hessian with respect to the logits behind them.
        """

    def get_config(self) -> Config:
        return {}

    @classmethod
    def from_config(cls, config: Config) -> "Likelihood":
        return cls(**config)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.get_config().items())})"


@keras.saving.register_keras_serializable("keras_ngd")
class Categorical(Likelihood):
    """One class of several, for each position: that of categorical cross-entropies.

        y ~ softmax(z),      gradient = softmax(z) - e_y

    with respect to logits `z`; with respect to probabilities `p`, which may have any sum: `1 / sum(p) - e_y / p_y`.

    Args:
        from_logits: whether predictions are logits. Default False: probabilities.
        axis: that of the classes. Default -1.
    """

    def __init__(self, from_logits: bool = False, axis: int = -1) -> None:
        self.from_logits, self.axis = bool(from_logits), int(axis)

    def gradient(self, predictions: Tensor, noise: Noise) -> Tensor:
        last = len(predictions.shape) - 1
        predictions = ops.moveaxis(predictions, self.axis, last) if self.axis % (last + 1) != last else predictions
        logits = predictions if self.from_logits else ops.log(ops.maximum(predictions, 1e-30))
        gumbel = -ops.log(-ops.log(noise(ops.shape(predictions))))
        label = ops.argmax(logits + gumbel, axis=-1)
        drawn = ops.one_hot(label, predictions.shape[-1], dtype=predictions.dtype)
        if self.from_logits:
            found = ops.softmax(predictions) - drawn
        else:
            found = 1 / ops.sum(predictions, axis=-1, keepdims=True) - drawn / ops.maximum(predictions, 1e-30)
        return ops.moveaxis(found, last, self.axis) if self.axis % (last + 1) != last else found

    def get_config(self) -> Config:
        return {"from_logits": self.from_logits, "axis": self.axis}


@keras.saving.register_keras_serializable("keras_ngd")
class Bernoulli(Likelihood):
    """Yes or no, for each entry by itself: that of binary cross-entropy, a mean over the `D` entries of the last axis.

        y ~ Bernoulli(p), p = sigmoid(z),      gradient = (p - y) / sqrt(D)

    with respect to logits `z`; with respect to probabilities `p` it is `(p - y) / (p (1 - p) sqrt(D))`.

    Args:
        from_logits: whether predictions are logits. Default False: probabilities.
        axis: that which is averaged over. Default -1.
    """

    def __init__(self, from_logits: bool = False, axis: int = -1) -> None:
        self.from_logits, self.axis = bool(from_logits), int(axis)

    def gradient(self, predictions: Tensor, noise: Noise) -> Tensor:
        p = ops.sigmoid(predictions) if self.from_logits else predictions
        label = ops.cast(noise(ops.shape(predictions)) < p, p.dtype)
        found = p - label
        if not self.from_logits:
            # Of what is certain nothing else is drawn: 0 / 0.
            variance = p * (1 - p)
            found = ops.where(variance > 0, found / ops.where(variance > 0, variance, 1.0), 0.0)
        return found / _root(ops.shape(predictions)[self.axis], p.dtype)

    def get_config(self) -> Config:
        return {"from_logits": self.from_logits, "axis": self.axis}


@keras.saving.register_keras_serializable("keras_ngd")
class Gaussian(Likelihood):
    """A number with noise of the same size everywhere: that of squared errors, a mean over the `D` entries of the last axis.

        gradient = sqrt(2 / D) noise,      noise ~ N(0, I)

    Args:
        curvature: the second derivative of a loss value with respect to each of its entries. Default None: `2 / D`, that of the
            mean of the squared errors; 2 for their sum, 1 for half of that.
    """

    def __init__(self, curvature: float | None = None) -> None:
        self.curvature = None if curvature is None else float(curvature)

    def gradient(self, predictions: Tensor, noise: Noise) -> Tensor:
        # Of float32 numbers in (0, 1) none is so near to an end that this is not finite.
        normal = ops.erfinv(2 * noise(ops.shape(predictions)) - 1) * 2**0.5
        if self.curvature is not None:
            return normal * self.curvature**0.5
        return normal * 2**0.5 / _root(ops.shape(predictions)[-1], normal.dtype)

    def get_config(self) -> Config:
        return {"curvature": self.curvature}


# What `likelihood=` may be by name.
NAMED: dict[str, type[Likelihood]] = {"categorical": Categorical, "bernoulli": Bernoulli, "gaussian": Gaussian}


def positions(likelihood: Likelihood, predictions: Tensor) -> Shape:
    """The shape of the values of a loss with this likelihood."""
    shape, axis = list(ops.shape(predictions)), likelihood.axis % len(predictions.shape)
    return tuple(shape[:axis] + shape[axis + 1 :])


def checked(value: Any) -> Any:
    """The argument `likelihood`: None, a `Likelihood`, or a dict or list of these, from what it was given as.

    Raises:
        ValueError: if it is none.
    """
    if value is None or isinstance(value, Likelihood):
        return value
    if isinstance(value, str) and value in NAMED:
        return NAMED[value]()
    if isinstance(value, dict) and "class_name" in value:
        return keras.saving.deserialize_keras_object(value)
    if isinstance(value, dict):
        return {name: checked(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [checked(one) for one in value]
    raise ValueError(
        f"`likelihood` must be one of {tuple(NAMED)}, a `keras_ngd.fisher.Likelihood` (such as "
        "`keras_ngd.fisher.Categorical(from_logits=True)`), a dict of these by the names of the outputs, or a list of them in "
        f"the order of the losses. Received: likelihood={value!r}"
    )


def serialized(value: Any) -> Any:
    """What `checked` takes, as configs have it."""
    if isinstance(value, dict):
        return {name: serialized(one) for name, one in value.items()}
    if isinstance(value, list):
        return [serialized(one) for one in value]
    return None if value is None else keras.saving.serialize_keras_object(value)


def _root(size: Any, dtype: str) -> Tensor:
    return ops.sqrt(ops.cast(size, dtype))
