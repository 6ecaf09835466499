"""Keras's normalisation layers with a probe on what comes out: the scale and the offset of each feature."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd import keras_private
from keras_ngd.layers.captured import Captured, Part, register_kind
from keras_ngd.layers.contract import axes, gives
from keras_ngd.layers.geometry import Geometry, Structure
from keras_ngd.layers.learning import learned
from keras_ngd.layers.probe import probe
from keras_ngd.typing import Shape, Tensor, Variable


class ScaleGeometry(Geometry):
    """Scales and offsets of normalized inputs `xhat`, feature by feature: `s = gamma xhat + beta`, `V = [gamma; beta]`.

    This one is given inputs that are normalized already; subclasses normalize what the layer was given. That is done in the
    backward pass, where statistics are recorded, and not read from `s`, which says nothing of `xhat` where `gamma` is 0.

    Args:
        shape: of the parameters.
        axes: the axes of the input that are those of the parameters, which have them in ascending order.
        scale, center: whether there is a scale, and an offset.
    """

    structure = Structure.SCALE
    groups = 1

    def __init__(self, shape: Sequence[int], axes: Sequence[int], scale: bool, center: bool) -> None:
        self.shape: Shape = tuple(shape)
        self.axes = tuple(axes)
        self.scale, self.center = scale, center
        self.input_dim = int(scale) + int(center)
        self.output_dim = math.prod(self.shape)

    def to_matrix(self, parameters: Sequence[Tensor]) -> Tensor:
        return ops.expand_dims(ops.stack([ops.reshape(p, (self.output_dim,)) for p in parameters]), 0)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        return [ops.reshape(matrix[0, i], self.shape) for i in range(self.input_dim)]

    @gives(axes("input_dim", "examples", "output_dim"))
    def unit_rows(self, x: Tensor, ds: Tensor, weights: Tensor | None = None) -> Tensor:
        """For each example the gradients of the scales and of the offsets: sums over its positions of `g xhat` and of `g`.

        Args:
            x: the layer's input.
            ds: the gradient `g` of what comes out, of the same shape.
            weights: optional mask of the positions, as `normalized` takes it.

        Returns:
            `[input_dim, examples, features]`.
        """
        features = self._features(x)
        positions = tuple(axis for axis in range(1, len(x.shape)) if axis not in features)
        gradients = [self.normalized(x, weights) * ds] if self.scale else []
        gradients += [ds] if self.center else []
        sums = [ops.sum(g, axis=positions) if positions else g for g in gradients]
        return ops.stack([ops.reshape(s, (-1, self.output_dim)) for s in sums])

    def normalized(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """What the scales multiply, `xhat`, of the layer's input; `weights` is a mask, where the layer takes one."""
        return x

    def _features(self, x: Tensor) -> tuple[int, ...]:
        """The axes of the features, from the front."""
        return tuple(sorted(axis % len(x.shape) for axis in self.axes))


class BatchGeometry(ScaleGeometry):
    """Inputs are normalized feature by feature, by their moments over all examples and positions.

    `weights`, of one axis less than the input, is the mask of the positions that the moments are of.
    """

    def __init__(self, shape: Sequence[int], axes: Sequence[int], scale: bool, center: bool, epsilon: float) -> None:
        super().__init__(shape, axes, scale, center)
        self.epsilon = epsilon

    def normalized(self, x: Tensor, weights: Tensor | None) -> Tensor:
        features = self._features(x)
        axes = tuple(axis for axis in range(len(x.shape)) if axis not in features)
        visible = None
        if weights is not None:
            visible = ops.broadcast_to(ops.expand_dims(ops.not_equal(weights, 0), -1), ops.shape(x))
        centred = x - _mean(x, axes, visible)
        return centred * ops.rsqrt(_mean(ops.square(centred), axes, visible) + self.epsilon)

    def divisible(self, x: Tensor, weights: Tensor | None) -> tuple[Geometry, Tensor, Tensor | None]:
        x = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
        return self.of_normalized(), self.normalized(x, weights), None

    def of_normalized(self) -> ScaleGeometry:
        """The same of inputs that are normalized already."""
        return ScaleGeometry(self.shape, self.axes, self.scale, self.center)


class LayerGeometry(ScaleGeometry):
    """Inputs are normalized over their features, each position by itself.

    Args:
        centred: whether the mean is subtracted from what is divided, too; Keras's `rms_scaling` has it in the variance alone.
    """

    def __init__(
        self,
        shape: Sequence[int],
        axes: Sequence[int],
        scale: bool,
        center: bool,
        epsilon: float | None,
        centred: bool = True,
    ) -> None:
        super().__init__(shape, axes, scale, center)
        self.epsilon, self.centred = _epsilon(epsilon), centred

    def normalized(self, x: Tensor, weights: Tensor | None) -> Tensor:
        features = self._features(x)
        centred = x - _mean(x, features)
        inverse = ops.rsqrt(_mean(ops.square(centred), features) + self.epsilon)
        return (centred if self.centred else x) * inverse


class RootMeanSquareGeometry(ScaleGeometry):
    """Inputs are divided by their root mean square over the features, each position by itself."""

    def __init__(self, shape: Sequence[int], axes: Sequence[int], epsilon: float | None) -> None:
        super().__init__(shape, axes, True, False)
        self.epsilon = _epsilon(epsilon)

    def normalized(self, x: Tensor, weights: Tensor | None) -> Tensor:
        return x * ops.rsqrt(_mean(ops.square(x), self._features(x)) + self.epsilon)


class GroupGeometry(ScaleGeometry):
    """Inputs are normalized in groups of neighbouring features, over these and all positions, each example by itself.

    Args:
        parts: how many groups there are.
    """

    def __init__(
        self, shape: Sequence[int], axes: Sequence[int], scale: bool, center: bool, epsilon: float, parts: int
    ) -> None:
        super().__init__(shape, axes, scale, center)
        self.epsilon, self.parts = epsilon, parts

    def normalized(self, x: Tensor, weights: Tensor | None) -> Tensor:
        centred = x - self._group_mean(x)
        return centred * ops.rsqrt(self._group_mean(ops.square(centred)) + self.epsilon)

    def _group_mean(self, x: Tensor) -> Tensor:
        """The mean of each example and group, for each of its features."""
        [features] = self._features(x)
        positions = tuple(axis for axis in range(1, len(x.shape)) if axis != features)
        means = _mean(x, positions) if positions else x
        shape = (-1, *(1 if axis != features else self.output_dim for axis in range(1, len(x.shape))))
        size = self.output_dim // self.parts
        means = _mean(ops.reshape(means, (-1, self.parts, size)), (2,))
        return ops.reshape(ops.repeat(means, size, axis=2), shape)


def _mean(x: Tensor, axes: tuple[int, ...], visible: Tensor | None = None) -> Tensor:
    """The mean over some axes, which stay; where there are booleans `visible`, of what is, as Keras weighs it."""
    # Not `ops.mean`: Keras takes it in float32 on JAX.
    if visible is None:
        count = ops.cast(math.prod(ops.shape(x)[axis] for axis in axes), x.dtype)
        return ops.sum(x, axis=axes, keepdims=True) / count
    total = ops.sum(ops.where(visible, x, ops.zeros_like(x)), axis=axes, keepdims=True)
    count = ops.sum(ops.cast(visible, x.dtype), axis=axes, keepdims=True)
    return total / (count + keras.config.epsilon())


def _epsilon(epsilon: float | None) -> float:
    return keras.config.epsilon() if epsilon is None else epsilon


def _axes(layer: Any, last: bool = False) -> tuple[int, ...]:
    """The axes of a built layer's parameters.

    Raises:
        ValueError: where that of the examples is among them, or, with `last`, where they are not the last ones.
    """
    axes = (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis)
    built = layer.get_build_config()
    if built is None:
        return (
            axes  # A loaded layer has its statistics attached while it is built; it was looked at when it was captured.
        )
    rank = len(built["input_shape"])
    from_the_front = sorted(axis % rank for axis in axes)
    if 0 in from_the_front:
        raise ValueError(f"its axes, {axes}, have that of the examples among them: what it scales are no features")
    if last and from_the_front != list(range(rank - len(axes), rank)):
        raise ValueError(f"its axes, {axes}, are not the last ones, along which Keras scales all the same")
    return axes


def _check_parameters(layer: Any) -> None:
    if layer.gamma is None and layer.beta is None:
        raise ValueError("it has neither a scale nor an offset")


class CapturedNormalization(Captured):
    """What the captured normalisation layers share: what comes out is probed, for nothing happens to it afterwards."""

    # Of Transformers' loss after a training, that with Adam for scales and offsets was measured to be a little lower.
    by_default = False

    def _probed(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        if self.statistics is None:
            return outputs
        outputs = self._learned(self._recomputed, outputs, inputs)
        return probe(outputs, inputs, self.statistics.geometry, self.statistics)

    def _learned(
        self, function: Callable[..., Tensor], outputs: Tensor, inputs: Tensor, constants: Sequence[Tensor] = ()
    ) -> Tensor:
        """Outputs that were computed of the inputs and these further tensors, as the method `function` computes them again."""
        statistics: Any = self.statistics
        parameters, others = self._own_variables()
        constants = [*map(ops.convert_to_tensor, others), *constants]
        return learned(function, inputs, parameters, statistics, constants, outputs, self.examples_alone)

    def _own_variables(self) -> tuple[list[Variable], list[Variable]]:
        """The layer's parameters, and its other weights, such as moving averages."""
        statistics: Any = self.statistics
        parameters = statistics.parameters()
        return parameters, [v for v in keras_private.own_weights(self) if all(v is not p for p in parameters)]

    # Whether each example is normalized by itself.
    examples_alone = True

    def _recomputed(self, inputs: Tensor, *tensors: Tensor, **arguments: Any) -> Tensor:
        """What the plain layer computes of the inputs, and of tensors in the place of its parameters and its other weights."""
        parameters, others = self._own_variables()
        variables = [*parameters, *others]
        # What is assigned to moving averages in it goes nowhere.
        with keras.StatelessScope(list(zip(variables, tensors, strict=False))):
            return self.plain.call(self, inputs, **arguments)


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class BatchNormalization(CapturedNormalization, keras.layers.BatchNormalization):
    """A `keras.layers.BatchNormalization` whose normalized inputs and output gradients natural-gradient methods observe.

    Same arguments, weights and results as `keras.layers.BatchNormalization`. `keras_ngd.capture(model, optimizer, include=...)`
    turns plain layers into this class. A call with `training=True` is observed with the moments of its batch, of what a mask does
    not hide where there is one, a call with `training=False` with the moving averages.

    Layers with `renorm=True`, which scale by moving averages that the same step changes, and with `synchronized=True`,
    whose moments are those of all replicas, are not captured.
    """

    plain = keras.layers.BatchNormalization

    def parts(self) -> dict[str, Part]:
        _check_parameters(self)
        if self.renorm:
            raise ValueError("`renorm=True`: it scales by moving averages that the same step changes")
        if self.synchronized:
            raise ValueError("`synchronized=True`: it normalizes with the moments of all replicas")
        shape = self.moving_mean.shape
        geometry = BatchGeometry(shape, _axes(self), self.scale, self.center, self.epsilon)
        return {"statistics": Part.of(geometry, self.gamma, self.beta)}

    def call(self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None) -> Tensor:
        outputs = super().call(inputs, training=training, mask=mask)
        if self.statistics is None:
            return outputs
        again = self._in_training if training else self._by_averages
        outputs = self._learned(again, outputs, inputs, [] if mask is None else [ops.cast(mask, "float32")])
        geometry: Any = self.statistics.geometry
        if training and self.trainable:
            return probe(outputs, inputs, geometry, self.statistics, mask)
        normalized = self._normalized(inputs, self.statistics.averages[0].dtype)
        return probe(outputs, normalized, geometry.of_normalized(), self.statistics)

    examples_alone = False

    def _in_training(self, inputs: Tensor, *tensors: Tensor) -> Tensor:
        count = len(keras_private.own_weights(self))
        mask = ops.cast(tensors[count], "bool") if len(tensors) > count else None
        return self._recomputed(inputs, *tensors[:count], training=True, mask=mask)

    def _by_averages(self, inputs: Tensor, *tensors: Tensor) -> Tensor:
        return self._recomputed(inputs, *tensors, training=False)

    def _normalized(self, inputs: Tensor, dtype: str) -> Tensor:
        """The inputs normalized by the moving averages."""
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        mean, variance = (ops.reshape(ops.cast(v, dtype), shape) for v in (self.moving_mean, self.moving_variance))
        return (ops.cast(inputs, dtype) - mean) * ops.rsqrt(variance + self.epsilon)


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class LayerNormalization(CapturedNormalization, keras.layers.LayerNormalization):
    """A `keras.layers.LayerNormalization` that natural-gradient methods observe; see `keras_ngd.layers.BatchNormalization`."""

    plain = keras.layers.LayerNormalization

    def parts(self) -> dict[str, Part]:
        _check_parameters(self)
        shape = next(v.shape for v in (self.gamma, self.beta) if v is not None)
        # Keras gives a layer with `rms_scaling=True` a scale, whatever `scale` and `center` are.
        geometry = LayerGeometry(
            shape, _axes(self), self.gamma is not None, self.beta is not None, self.epsilon, not self.rms_scaling
        )
        return {"statistics": Part.of(geometry, self.gamma, self.beta)}

    def call(self, inputs: Tensor) -> Tensor:
        return self._probed(super().call(inputs), inputs)


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class GroupNormalization(CapturedNormalization, keras.layers.GroupNormalization):
    """A `keras.layers.GroupNormalization` that natural-gradient methods observe; see `keras_ngd.layers.BatchNormalization`."""

    plain = keras.layers.GroupNormalization

    def parts(self) -> dict[str, Part]:
        _check_parameters(self)
        shape = next(v.shape for v in (self.gamma, self.beta) if v is not None)
        geometry = GroupGeometry(shape, _axes(self), self.scale, self.center, self.epsilon, self.groups)
        return {"statistics": Part.of(geometry, self.gamma, self.beta)}

    def call(self, inputs: Tensor) -> Tensor:
        return self._probed(super().call(inputs), inputs)


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class RMSNormalization(CapturedNormalization, keras.layers.RMSNormalization):
    """A `keras.layers.RMSNormalization` that natural-gradient methods observe; see `keras_ngd.layers.BatchNormalization`.

    Layers whose axes are not the last ones are not captured: Keras normalizes over these, and scales along the last ones.
    """

    plain = keras.layers.RMSNormalization

    def parts(self) -> dict[str, Part]:
        geometry = RootMeanSquareGeometry(self.scale.shape, _axes(self, last=True), self.epsilon)
        return {"statistics": Part.of(geometry, self.scale)}

    def call(self, x: Tensor) -> Tensor:
        return self._probed(super().call(x), x)
