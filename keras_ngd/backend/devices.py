"""The devices that what is traced is for, which need not be this machine's."""

import contextlib
import contextvars

import keras

from keras_ngd.backend.running import name

# The mesh of devices that what is being traced is compiled for, in place of this machine's.
_COMPILED_FOR = contextvars.ContextVar("keras_ngd_compiled_for", default=None)


@contextlib.contextmanager
def compiling_for(mesh):
    """A context in which what is traced is compiled for accelerators that this machine need not have.

    Args:
        mesh: a `jax.sharding.Mesh` of them, on which a step's state is replicated; on TensorFlow, any name of them.
    """
    token = _COMPILED_FOR.set(mesh)
    try:
        yield
    finally:
        _COMPILED_FOR.reset(token)


def compiled_for():
    """What `compiling_for` was given; None outside of it."""
    return _COMPILED_FOR.get()


def on_every_device(tensors):
    """`tensors`, whole on every device of the mesh that is compiled for; as they are where there is none.

    A compiler that divides a program among devices would leave what it makes inside a conditional divided as the batch is,
    and bring it together where it is used: outside, at every step.
    """
    if compiled_for() is None or name() != "jax":
        return list(tensors)
    import jax

    everywhere = jax.sharding.NamedSharding(compiled_for(), jax.sharding.PartitionSpec())
    return [jax.lax.with_sharding_constraint(tensor, everywhere) for tensor in tensors]


def on_accelerator():
    """Whether what is being traced will not run on a CPU: by the default device, unless `compiling_for` says so."""
    if compiled_for() is not None:
        return True
    if name() == "jax":
        import jax

        return jax.default_backend() != "cpu"
    import tensorflow as tf

    return bool(on_tpu() or tf.config.get_visible_devices("GPU") or tf.config.get_visible_devices("TPU"))


def for_tpus():
    """Whether what is being traced is for TPUs, of which this machine need not have any."""
    if name() == "jax" and compiled_for() is None:
        import jax

        return jax.default_backend() == "tpu"
    return compiled_for() is not None or on_tpu()


def on_tpu():
    """Whether a `TPUStrategy` is active."""
    if name() != "tensorflow":
        return False
    import tensorflow as tf

    return isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)


def serves_distributions():
    """Whether variables lie as a `keras.distribution` has them."""
    return name() == "jax"


def device_name():
    """What computes: the backend and its first device."""
    return f"{name()} on {keras.distribution.list_devices()[0]}"


def compute_on_cpu():
    """On JAX, has all that is computed from now on computed by the CPU, even where there is an accelerator."""
    import jax

    jax.config.update("jax_platforms", "cpu")
