"""The layers of a model, at any depth."""

from collections.abc import Iterator

import keras

from keras_ngd import keras_private, layers
from keras_ngd.statistics import Statistics

WRAPPERS = (keras.layers.Wrapper, keras.layers.Bidirectional, keras.layers.RNN)


def layers_with_weights(
    layer: keras.layers.Layer, wrapper: keras.layers.Layer | None = None, seen: set[int] | None = None
) -> Iterator[tuple[keras.layers.Layer, keras.layers.Layer | None]]:
    """Yields every layer below `layer` that owns weights (or may, or stands for a layer that does), once.

    With it comes the outermost wrapper it is inside of that calls it in its own way, or None.
    """
    seen = set() if seen is None else seen
    if wrapper is None and isinstance(layer, WRAPPERS) and not calls_plainly(layer):
        wrapper = layer
    for sub in keras_private.sub_layers(layer):
        if id(sub) in seen or isinstance(sub, (Statistics, keras.Metric)):
            continue
        seen.add(id(sub))
        inside = stood_for(sub)
        seen.update(map(id, inside))
        owns = inside if isinstance(sub, keras.layers.RNN) else isinstance(sub, tuple(layers.CAPTURED_KINDS))
        if keras_private.own_weights(sub) or owns:
            yield sub, wrapper
        yield from layers_with_weights(sub, wrapper, seen)


def stood_for(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers in a layer that are captured with it, if it is."""
    kind = layers.kind_of(layer)
    return [] if kind is None else kind.stands_for(layer)


def calls_plainly(wrapper: keras.layers.Layer) -> bool:
    """Whether a wrapper calls the layers in it as often as a model of one's own could: on whole batches, outside of loops."""
    if type(wrapper) is keras.layers.TimeDistributed:
        return steps_of(wrapper) is not None
    return type(wrapper) is keras.layers.Bidirectional


def steps_of(wrapper: keras.layers.TimeDistributed) -> int | None:
    """How many steps a built `TimeDistributed` calls its layer for, one by one; None where it maps over them instead."""
    shape = (wrapper.get_build_config() or {}).get("input_shape") or (None, None)
    return shape[1]


def path_of(layer: keras.layers.Layer) -> str:
    """A layer's name in reports and patterns."""
    return layer.path or layer.name
