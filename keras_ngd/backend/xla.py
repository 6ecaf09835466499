"""XLA: what it compiles, and what is written in one way for it and in another for TensorFlow's runtime."""

from keras_ngd.backend.devices import on_accelerator
from keras_ngd.backend.running import name


def under_xla():
    """Whether the computation being traced will be compiled by XLA as a whole."""
    if name() == "jax":
        return True
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def under_xla_for_cpus():
    """Whether XLA will compile the computation being traced for a CPU, where it writes out each loop that is unlike others."""
    return under_xla() and not on_accelerator()


def compiled(function):
    """`function` of tensors of static shapes, compiled by XLA even where what is around it is not."""
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False, jit_compile=True)
    import jax

    return jax.jit(function)


def factorizes_by_column():
    """Whether what is being traced factorizes matrices by XLA's own routine: TensorFlow's does, JAX calls LAPACK on CPUs."""
    return name() == "tensorflow" and under_xla()


def quicker_compiled():
    """Whether even a few steps take less time if XLA compiles them: JAX is very slow without, TensorFlow compiles longer."""
    return name() == "jax"
