"""The few calls that `keras.ops` lacks, for TensorFlow and for JAX.

Everything else in the package is written with `keras.ops`, so this is the only module that asks which backend runs.
"""

import sys

import keras
from keras import ops

BACKENDS = ("tensorflow", "jax")


def name():
    """The running Keras backend; a `RuntimeError` if it is one this package does not serve."""
    backend = keras.backend.backend()
    if backend not in BACKENDS:
        raise RuntimeError(
            f"keras_ngd runs on the Keras backends {BACKENDS}, but KERAS_BACKEND={backend!r}. "
            "Set KERAS_BACKEND before the first import of keras."
        )
    return backend


def matmul(a, b, transpose_a=False, transpose_b=False):
    """Matrix product over the last two axes, in the full precision of the operands' dtype.

    Accelerators round float32 operands of a product unless told otherwise, which the iterations and differences in
    this package do not survive. The transposes are flags because TensorFlow would materialise them.
    """
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.linalg.matmul(a, b, transpose_a=transpose_a, transpose_b=transpose_b)
    import jax.numpy as jnp

    a = jnp.swapaxes(a, -1, -2) if transpose_a else a
    b = jnp.swapaxes(b, -1, -2) if transpose_b else b
    return jnp.matmul(a, b, precision="highest")


def filter_gradient(inputs, upstream, kernel_size):
    """Gradient of a `valid`, stride-1, two-dimensional convolution with respect to its kernel.

    Args:
        inputs: `[n, h + kernel_size[0] - 1, w + kernel_size[1] - 1, c_in]`.
        upstream: `[n, h, w, c_out]`, the gradient of the convolution's output.
        kernel_size: two ints.

    Returns:
        `[kernel_size[0], kernel_size[1], c_in, c_out]` with
        `result[u, v] = sum over n, y, x of inputs[n, y + u, x + v, :] upstream[n, y, x, :]^T`.
    """
    shape = (*kernel_size, inputs.shape[-1], upstream.shape[-1])
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.raw_ops.Conv2DBackpropFilter(
            input=inputs, filter_sizes=shape, out_backprop=upstream, strides=[1, 1, 1, 1], padding="VALID"
        )
    import jax

    def convolve(kernel):
        return jax.lax.conv_general_dilated(
            inputs, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )

    return jax.linear_transpose(convolve, jax.ShapeDtypeStruct(shape, inputs.dtype))(upstream)[0]


def under_xla():
    """Whether the computation being traced will be compiled by XLA as a whole."""
    if name() == "jax":
        return True
    from tensorflow.python.ops import control_flow_util
    import tensorflow as tf

    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def on_accelerator():
    """Whether the default device is not a CPU."""
    if name() == "jax":
        import jax

        return jax.default_backend() != "cpu"
    import tensorflow as tf

    return bool(tf.config.get_visible_devices("GPU") or tf.config.get_visible_devices("TPU"))


def compiled(function):
    """`function` compiled by XLA by itself where the step around it is not."""
    if name() == "jax" or under_xla():
        return function
    import tensorflow as tf

    return tf.function(function, jit_compile=True, autograph=False)


def zero_unless(ok, function):
    """The tensors of `function()` where the scalar `ok` holds, zeros of their shapes elsewhere.

    XLA fuses a `where` into what consumes it but copies through a conditional; TensorFlow's runtime is the other way
    round.
    """
    if under_xla():
        return [ops.where(ok, t, ops.zeros_like(t)) for t in function()]
    if name() == "tensorflow":
        import tensorflow as tf

        if tf.executing_eagerly():
            tensors = function()
            return tensors if bool(ok) else [tf.zeros_like(t) for t in tensors]
    shapes = []

    def passed():
        tensors = function()
        shapes.extend((tensor.shape, tensor.dtype) for tensor in tensors)
        return tensors

    def blocked():
        return [ops.zeros(shape, dtype) for shape, dtype in shapes]

    return ops.cond(ok, passed, blocked)


def is_sparse(gradient):
    """Whether a gradient is TensorFlow's `IndexedSlices` (an embedding's), which only the update rule may touch."""
    return hasattr(gradient, "indices") and hasattr(gradient, "values") and hasattr(gradient, "dense_shape")


def parallel_workers():
    """A description of the multi-worker set-up that is active, or None on one worker."""
    horovod = sys.modules.get("horovod.tensorflow")
    if horovod is not None and horovod.is_initialized() and horovod.size() > 1:
        return f"Horovod with {horovod.size()} processes"
    if name() == "tensorflow":
        import tensorflow as tf

        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if replicas > 1:
            return f"{type(tf.distribute.get_strategy()).__name__} with {replicas} replicas"
    return None
