"""Gradients of our own making, and what TensorFlow's tapes are told of them."""

from keras_ngd.backend.running import name
from keras_ngd.backend.sparse_gradients import is_sparse


def identity_with_gradient(gradient):
    """The function `(s, *arguments) -> s` whose derivative is `gradient`.

    Args:
        gradient: takes the gradient of the result and `*arguments`, and returns the gradients of `s` and of each argument, None
            for zeros. A graph keeps it, so it is not to hold tensors or a model.
    """
    if name() == "tensorflow":
        return lambda s, *arguments: _tensorflow_identity(gradient, s, arguments)
    import jax

    @jax.custom_vjp
    def identity(s, *arguments):
        return s

    identity.defvjp(lambda s, *arguments: (s, arguments), lambda arguments, ds: tuple(gradient(ds, *arguments)))
    return identity


def _tensorflow_identity(gradient, s, arguments):
    """What `tf.custom_gradient` does, which registers every graph it was used in for ever."""
    import tensorflow as tf

    # Private: what tapes are told by, and the gradient that an operation of a graph has of its own (functions' calls have).
    from tensorflow.python.eager import record

    # Keras hands variables on as they are.
    arguments = [tf.convert_to_tensor(argument) for argument in arguments]
    with record.stop_recording():
        if tf.executing_eagerly():
            result = tf.identity(s)
        else:
            result, *_ = tf.identity_n([s, *arguments])
            result.op._gradient_function = lambda operation, ds, *_: gradient(ds, *operation.inputs[1:])
    record.record_operation("IdentityWithGradient", [result], [s, *arguments], lambda ds: gradient(ds, *arguments))
    return result


def of_known_shape(gradient, shape):
    """A gradient whose static shape is its variable's; None and sparse ones as they are.

    TensorFlow infers less: of the gradient of a product over `[batch, time, d]` it knows the rank alone where the batch is not
    static.
    """
    if name() != "tensorflow" or gradient is None or is_sparse(gradient):
        return gradient
    import tensorflow as tf

    return tf.ensure_shape(gradient, shape) if gradient.shape != tuple(shape) else gradient
