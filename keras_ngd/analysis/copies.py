"""Copies of a model to measure on."""

import keras

from keras_ngd.capture import capture


def captured_copy(model, inputs, optimizer):
    """A copy of a model with the same weights, captured for `optimizer`; the model stays as it is.

    Args:
        model: as for `keras_ngd.capture`; copied with `keras.models.clone_model`.
        inputs: a batch of its inputs.
        optimizer: as for `keras_ngd.capture`.

    Raises:
        ValueError: if the model is not built, or cannot be captured.
    """
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built, so it has no weights to measure with yet. Call it on a batch of data, or "
            "`model.build(input_shape)`."
        )
    copy = keras.models.clone_model(model)
    if not copy.built:
        copy(inputs)
    copy.set_weights(model.get_weights())
    capture(copy, optimizer)
    return copy
