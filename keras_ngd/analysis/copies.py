"""Copies of a model to measure on."""

import keras

from keras_ngd import analysis, keras_private
from keras_ngd.capturing import capture, release


def captured_copy(model, inputs, optimizer, data=None, compiled=False):
    """A copy of a model with the same weights, captured for `optimizer`; the model stays as it is.

    Args:
        model: as for `keras_ngd.capture`; copied with `keras.models.clone_model`.
        inputs: a batch of its inputs.
        optimizer, data: as for `keras_ngd.capture`.
        compiled: whether to compile the copy as the model is, with this optimizer. Default False.

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
    capture(copy, optimizer, None, None, data, analysis)
    if compiled:
        _compile_like(copy, model, optimizer)
    return copy


def plain_copy(model, optimizer):
    """A copy of a built and compiled model, compiled with another optimizer; captured layers become plain ones.

    Its weights are new ones.
    """
    copy = keras.models.clone_model(model)
    release(copy)
    _compile_like(copy, model, optimizer)
    return copy


def _compile_like(copy, model, optimizer):
    arguments = keras_private.compile_arguments(model)
    kept = {name: arguments[name] for name in ("loss", "loss_weights", "metrics", "weighted_metrics")}
    copy.compile(optimizer=optimizer, **kept, jit_compile=True)
