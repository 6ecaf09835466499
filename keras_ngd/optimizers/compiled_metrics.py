"""Metrics that a model is compiled with, made outside of the first trace of its training step.

Keras makes them when they are first updated. On TensorFlow that is while the training step is traced, and a function that makes
variables while it is traced is traced once more. With a second-order step in it, that is most of the time before the first step.

`tf_tests/optimizers/test_one_trace.py` fails where that is done otherwise.
"""

import keras

from keras_ngd import backend, keras_private
from keras_ngd.typing import Tensor


def make_outside_of_traces(model: keras.Model | None) -> None:
    """Has the metrics of a compiled model (or None) make their variables outside of the trace in which they are first updated."""
    metrics = keras_private.compiled_metrics(model)
    if metrics is None or metrics.built or not backend.makes_variables() or "build" in metrics.__dict__:
        return
    build = metrics.build

    def built_outside(y_true: Tensor, y_pred: Tensor) -> None:
        # What is traced is looked at for its shapes alone.
        with backend.outside_trace():
            build(y_true, y_pred)
        del metrics.__dict__["build"]

    # Past Keras, which would track it.
    metrics.__dict__["build"] = built_outside
