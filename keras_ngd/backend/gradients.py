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


def identities_with_gradient(gradient):
    """The function `(tensors, *arguments) -> tensors`, of a list of tensors, whose derivative is `gradient`.

    Args:
        gradient: takes the list of the gradients of all results and `*arguments`, and returns the list of the gradients of the
            tensors and those of the arguments, None for zeros. As for `identity_with_gradient`, it is not to hold tensors.
    """
    if name() == "tensorflow":
        return lambda tensors, *arguments: _tensorflow_identities(gradient, tensors, arguments)
    import jax

    @jax.custom_vjp
    def identities(tensors, *arguments):
        return tensors

    def backward(arguments, ds):
        return tuple(gradient(ds, *arguments))

    identities.defvjp(lambda tensors, *arguments: (tensors, arguments), backward)
    return identities


def _tensorflow_identities(gradient, tensors, arguments):
    import tensorflow as tf
    from tensorflow.python.eager import record

    count = len(tensors)

    def of_all(ds, arguments):
        first, *others = gradient(list(ds), *arguments)
        return [*first, *others]

    tensors, arguments = ([tf.convert_to_tensor(t) for t in those] for those in (tensors, arguments))
    with record.stop_recording():
        if tf.executing_eagerly():
            results = [tf.identity(t) for t in tensors]
        else:
            results = tf.identity_n([*tensors, *arguments])[:count]
            results[0].op._gradient_function = lambda operation, *ds: of_all(ds[:count], operation.inputs[count:])
    record.record_operation(
        "IdentitiesWithGradient", results, [*tensors, *arguments], lambda *ds: of_all(ds, arguments)
    )
    return results


def gradients_of(function, tensors, upstream):
    """The gradients of `function(*tensors)` with respect to all of these, where that of what it gives is `upstream`: a list.

    What the function computes on the way is computed again where that is needed for them, and nowhere else once it is compiled.
    """
    if name() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            result = function(*tensors)
        return tape.gradient(result, tensors, upstream, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    import jax

    return list(jax.vjp(function, *tensors)[1](upstream))


def of_known_shape(gradient, shape):
    """A gradient whose static shape is its variable's; None and sparse ones as they are.

    TensorFlow infers less: of the gradient of a product over `[batch, time, d]` it knows the rank alone where the batch is not
    static.
    """
    if name() != "tensorflow" or gradient is None or is_sparse(gradient):
        return gradient
    import tensorflow as tf

    return tf.ensure_shape(gradient, shape) if gradient.shape != tuple(shape) else gradient
