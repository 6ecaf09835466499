"""What of a model is captured, and why the rest is not."""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_ngd import keras_private, layers
from keras_ngd.capturing.walk import layers_with_weights, path_of, stood_for
from keras_ngd.optimizers.natural_gradient import NaturalGradient

# What `capture` takes to select layers: names and patterns, or a function of the layer.
Selection = str | Sequence[str] | Callable[[keras.layers.Layer], bool] | None

CONVOLUTIONAL_LSTMS = (keras.layers.ConvLSTM1D, keras.layers.ConvLSTM2D, keras.layers.ConvLSTM3D)

OF_ANOTHER = "not trainable here, and captured already: left as it is"


def layers_to_capture(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers of a built model that `capture` would capture."""
    return [layer for layer, reason in decide(list(layers_with_weights(model))) if not reason]


def decide(
    found: Sequence[tuple[keras.layers.Layer, keras.layers.Layer | None]],
    skipped: Callable[[keras.layers.Layer], bool] = lambda layer: False,
    included: Callable[[keras.layers.Layer], bool] = lambda layer: False,
) -> list[tuple[keras.layers.Layer, str]]:
    """Pairs of each layer that was found and the reason why it is not captured, an empty string if it is.

    Args:
        found: pairs of a layer and the outermost wrapper it is inside of, or None.
        skipped: function of a layer: whether it is left out.
        included: function of a layer: whether it is captured though layers of its kind are not by default.
    """
    owners = _owners(found)

    def reason(layer: keras.layers.Layer, wrapper: keras.layers.Layer | None) -> str:
        if skipped(layer):
            return "left out by `skip`"
        found = _reason_against(layer, wrapper, owners)
        if found or layers.kind_of(layer).by_default or included(layer):
            return found
        return "left to the rule of the rest by default; `include` captures it"

    return [(layer, reason(layer, wrapper)) for layer, wrapper in found]


def _owners(
    found: Sequence[tuple[keras.layers.Layer, keras.layers.Layer | None]],
) -> dict[int, list[keras.layers.Layer]]:
    """The layers that own each variable, by the variable's identity."""
    owners: dict[int, list[keras.layers.Layer]] = {}
    for layer, _ in found:
        for owner in (layer, *stood_for(layer)):
            for variable in keras_private.own_weights(owner):
                owners.setdefault(id(variable), []).append(layer)
    return owners


def _reason_against(
    layer: keras.layers.Layer, wrapper: keras.layers.Layer | None, owners: dict[int, list[keras.layers.Layer]]
) -> str:
    """Why a layer is not captured, or an empty string."""
    kind = layers.kind_of(layer)
    if kind is None:
        if isinstance(wrapper, CONVOLUTIONAL_LSTMS):
            return "inside a convolutional LSTM, whose steps are convolutions of inputs and state: not a captured kind"
        for plain in layers.CAPTURED_KINDS:
            if isinstance(layer, plain):
                return f"a subclass of {plain.__name__}, which may compute something else: see `keras_ngd.layers.keeps_call`"
        return "not a captured kind"
    if wrapper is not None and type(wrapper) is keras.layers.TimeDistributed:
        return (
            f"inside TimeDistributed {wrapper.name!r}, which maps it over steps of no fixed number; call dense layers on the "
            "whole sequence, or fix the number of steps"
        )
    if wrapper is not None:
        return f"inside {type(wrapper).__name__} {wrapper.name!r}, which calls it in its own way"
    if getattr(layer, "quantization_mode", None) is not None:
        return "quantized"
    if getattr(layer, "lora_enabled", False):
        return "LoRA is enabled: its kernel is not what is trained"
    parts = layers.parts_of(path_of(layer), kind, layer)
    if isinstance(parts, str):
        return parts
    kernel, *others = [variable for part in parts.values() for variable in part.parameters]
    if not layer.trainable and getattr(layer, "statistics", None) is not None:
        return OF_ANOTHER
    if not layer.trainable or not kernel.trainable:
        return "not trainable: unfreeze it, then capture again"
    for variable in others:
        if not variable.trainable:
            return f"its {variable.name} is not trainable, its {kernel.name} is"
    for variable in (kernel, *others):
        sharing = [other for other in owners[id(variable)] if other is not layer]
        if sharing:
            return f"shares its {variable.name} with {sharing[0].path!r}"
    return ""


def selector(
    name: str, selection: Selection, candidates: Sequence[keras.layers.Layer]
) -> Callable[[keras.layers.Layer], bool]:
    """A function of the layer that says whether the argument `name` of `capture` selects it, from what that is.

    Raises:
        TypeError: if it is of the wrong kind.
        ValueError: if it names none of the candidates.
    """
    if callable(selection) and not isinstance(selection, keras.layers.Layer):
        selects = selection
        return lambda layer: bool(selects(layer))
    selection = () if selection is None else selection
    patterns: list[Any] = list(selection) if isinstance(selection, (list, tuple, set, frozenset)) else [selection]

    def matches(layer: keras.layers.Layer, pattern: str) -> bool:
        return fnmatch.fnmatchcase(layer.name, pattern) or fnmatch.fnmatchcase(path_of(layer), pattern)

    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"`{name}` takes names, patterns or a function of the layer. Received: {pattern!r}")
        if not any(matches(layer, pattern) for layer in candidates):
            names = ", ".join(map(path_of, candidates))
            raise ValueError(f"`{name}` names {pattern!r}, which matches no layer with weights. There are: {names}")
    return lambda layer: any(matches(layer, p) for p in patterns)


def check_built(model: keras.Model, needed: Sequence[keras.layers.Layer]) -> None:
    """Raises a `ValueError` if a model or one of the layers that are needed has no weights yet."""
    unbuilt = [layer.name for layer in needed if not layer.built]
    if not model.built or unbuilt:
        what = f"its layer {unbuilt[0]!r} has" if model.built else "it has"
        raise ValueError(
            f"Model {model.name!r} is not built ({what} no weights yet), so its layers' shapes are unknown. Call it on a batch "
            "of data, or `model.build(input_shape)`, before `capture`."
        )


def check_float16(optimizer: NaturalGradient, captured: Sequence[keras.layers.Layer]) -> None:
    """Raises a `ValueError` if layers compute in float16 whose loss scale the optimizer is not told."""
    if optimizer.loss_scale_factor is not None:
        return
    for layer in captured:
        if layer.compute_dtype == "float16":
            raise ValueError(
                f"Layer {layer.path!r} computes in float16, where Keras scales the loss dynamically; the statistics would carry "
                "the square of a scale the optimizer is not told. Use the `mixed_bfloat16` policy, or "
                "keras_ngd.KFAC(..., loss_scale_factor=1024.0) with model.compile(..., auto_scale_loss=False)."
            )
