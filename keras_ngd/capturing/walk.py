"""The layers of a model, at any depth."""

from collections.abc import Iterator

import keras

from keras_ngd import keras_private, layers
from keras_ngd.statistics import Statistics

WRAPPERS = (keras.layers.Wrapper, keras.layers.Bidirectional, keras.layers.RNN)


def layers_with_weights(
    layer: keras.layers.Layer, wrapper: keras.layers.Layer | None = None, seen: set[int] | None = None
) -> Iterator[tuple[keras.layers.Layer, keras.layers.Layer | None]]:
    """Yields every layer below `layer` that owns weights (or may), once, with the outermost wrapper it is inside of."""
    seen = set() if seen is None else seen
    if wrapper is None and isinstance(layer, WRAPPERS):
        wrapper = layer
    for sub in keras_private.sub_layers(layer):
        if id(sub) in seen or isinstance(sub, (Statistics, keras.Metric)):
            continue
        seen.add(id(sub))
        if keras_private.own_weights(sub) or isinstance(sub, tuple(layers.CAPTURED_KINDS)):
            yield sub, wrapper
        yield from layers_with_weights(sub, wrapper, seen)


def path_of(layer: keras.layers.Layer) -> str:
    """A layer's name in reports and patterns."""
    return layer.path or layer.name
