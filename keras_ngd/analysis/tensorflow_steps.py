"""TensorFlow's training step as it is handed to XLA. Of that backend alone."""

from typing import Any

import keras
from keras import tree

from keras_ngd import backend, keras_private


def tensorflow_step_hlo(model: keras.Model, x: Any, y: Any) -> str:
    """The training step of a model on the TensorFlow backend, traced for accelerators, as text of XLA's HLO, not yet optimized.

    What is in it is what a TPU would be asked to do, though TensorFlow's wheel has no compiler for TPUs: `keras_ngd.analysis.hlo`
    reads it. Compilers for CPUs put calls of their own libraries in place of some of it later.

    Args:
        model: a built and compiled model, captured if its optimizer asks for it. What its optimizer keeps is created if it is not
            yet.
        x, y: one batch, whose sizes are those of the step.

    Returns:
        A string.

    Raises:
        RuntimeError: if the backend is not TensorFlow.
        ValueError: if the model is not built or not compiled.
    """
    if backend.name() != "tensorflow":
        raise RuntimeError(
            f"This is about TensorFlow's step, but KERAS_BACKEND={backend.name()!r}. `keras_ngd.analysis.tpu_compile` compiles "
            "JAX's."
        )
    if not isinstance(model, keras.Model) or not model.built or not model.compiled or model.optimizer is None:
        name = getattr(model, "name", model)
        raise ValueError(f"`model` must be a built and compiled keras.Model. Received: model={name!r}")
    import tensorflow as tf

    batch = tree.map_structure(tf.convert_to_tensor, (x, y))
    keras_private.build_for_training(model, batch)

    @tf.function(jit_compile=True, autograph=False)
    def step(x, y):
        with backend.compiling_for("TPU"):
            return model.train_step((x, y))

    return step.experimental_get_compiler_ir(*batch)(stage="hlo")
