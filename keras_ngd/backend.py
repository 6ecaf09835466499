"""The few calls that `keras.ops` lacks, for TensorFlow and for JAX.

Everything else in the package is written with `keras.ops`, so this is the only module that asks which backend runs.
"""

import contextlib
import contextvars
import itertools
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


def cholesky(matrices):
    """Lower Cholesky factors; NaN where a matrix is not positive definite.

    (`keras.ops.cholesky` stops the program there on TensorFlow, unless XLA compiles it.)
    """
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.linalg.cholesky(matrices)
    import jax.numpy as jnp

    return _one_by_one_on_cpus(jnp.linalg.cholesky, matrices)


def eigh(matrices):
    """Eigenvalues, ascending, and eigenvectors of symmetric matrices."""
    if name() == "tensorflow":
        return ops.linalg.eigh(matrices)
    import jax.numpy as jnp

    return _one_by_one_on_cpus(lambda matrix: tuple(jnp.linalg.eigh(matrix)), matrices)


def _one_by_one_on_cpus(function, matrices):
    """JAX's `function` of a matrix or of matrices `[k, d, d]`; of one after the other where a CPU computes it.

    There a call for a batch shares its work out among the threads that run the program, and waits in one of them: as many
    such calls at a time as there are threads wait for ever.
    """
    import jax

    if matrices.ndim == 2:
        return function(matrices)
    return jax.lax.platform_dependent(matrices, cpu=lambda batch: jax.lax.map(function, batch), default=function)


def triangular_inverse(lower):
    """Inverses of the lower triangular matrices `[k, d, d]`."""
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.linalg.triangular_solve(
            lower, tf.eye(lower.shape[-1], dtype=lower.dtype)[None] + tf.zeros_like(lower)
        )
    import jax

    identity = jax.numpy.eye(lower.shape[-1], dtype=lower.dtype)

    def inverse(matrix):
        return jax.scipy.linalg.solve_triangular(matrix, identity, lower=True)

    # On the CPU JAX calls LAPACK for one matrix but has XLA write out a batch's solution, which takes minutes to compile.
    return inverse(lower) if lower.ndim == 2 else jax.lax.map(inverse, lower)


def joined(tensors):
    """Tensors one after the other; one alone as it is."""
    return tensors[0] if len(tensors) == 1 else ops.concatenate(tensors)


def parts(stacked, counts):
    """A tensor's parts, so many long, as a list. (`keras.ops.split` computes its places in the graph on TensorFlow.)"""
    if len(counts) == 1:
        return [stacked]
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.split(stacked, counts)
    return ops.split(stacked, list(itertools.accumulate(counts))[:-1])


def filter_gradient(inputs, upstream, kernel_size):
    """TensorFlow's gradient of a `valid`, stride-1, two-dimensional convolution with respect to its kernel.

    Args:
        inputs: `[n, h + kernel_size[0] - 1, w + kernel_size[1] - 1, c_in]`.
        upstream: `[n, h, w, c_out]`, the gradient of the convolution's output.
        kernel_size: two ints.

    Returns:
        `[kernel_size[0], kernel_size[1], c_in, c_out]` with
        `result[u, v] = sum over n, y, x of inputs[n, y + u, x + v, :] upstream[n, y, x, :]^T`.
    """
    import tensorflow as tf

    shape = (*kernel_size, inputs.shape[-1], upstream.shape[-1])
    return tf.raw_ops.Conv2DBackpropFilter(
        input=inputs, filter_sizes=shape, out_backprop=upstream, strides=[1, 1, 1, 1], padding="VALID"
    )


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


def value_read(variable, read):
    """A variable's value in this trace, `read` having been it in a part of the trace that this one need not see into."""
    # TensorFlow's functions called from this one have graphs of their own; JAX's inner traces see what the outer ones do.
    return ops.convert_to_tensor(variable) if name() == "tensorflow" else read


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


def under_xla():
    """Whether the computation being traced will be compiled by XLA as a whole."""
    if name() == "jax":
        return True
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


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


def on_tpu():
    """Whether a `TPUStrategy` is active."""
    if name() != "tensorflow":
        return False
    import tensorflow as tf

    return isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)


@contextlib.contextmanager
def outside_trace():
    """A context for assignments and for variables that are to be made once and now, though a function may be being traced.

    TensorFlow traces a function twice that makes variables while it is traced, unless they are made like this.
    """
    if name() == "jax":
        yield
        return
    import tensorflow as tf

    def now(next_creator, **arguments):
        return next_creator(**{**arguments, "experimental_enable_variable_lifting": False})

    with tf.init_scope(), tf.variable_creator_scope(now):
        yield


def traced_once(function):
    """`function` of tensors, traced once for each combination of their shapes and dtypes however often it is called.

    A graph on TensorFlow, compiled by XLA on JAX, as a training step is.

    The layers of a deep network come in few shapes, and tracing the operations of one takes longer than running them.
    """
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False)
    import jax

    return jax.jit(function)


def compiled(function):
    """`function` of tensors of static shapes, compiled by XLA even where what is around it is not."""
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False, jit_compile=True)
    import jax

    return jax.jit(function)


def dtype_name(tensor):
    """A tensor's dtype as a string."""
    return keras.backend.standardize_dtype(tensor.dtype)


def itemsize(dtype):
    """Bytes of one number of what is kept of the curvature: of float64, or of float32."""
    return 8 if dtype == "float64" else 4


def uniform(shape, seed, dtype):
    """Uniform random numbers in (0, 1), the same whenever they are drawn with the same seed.

    (On TensorFlow, other ones where XLA compiles them.)

    Args:
        shape: static shape.
        seed: `[2]`, int32.
        dtype: of the result.
    """
    smallest = 1e-7
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.random.stateless_uniform(shape, seed, smallest, 1.0, dtype, alg="philox")
    import jax

    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed[0]), seed[1])
    return jax.random.uniform(key, shape, dtype, smallest, 1.0)


def check_at_most(count, limit, message, tensors=()):
    """Fails with `message` where `count`, a scalar tensor, is larger than `limit`.

    Returns `tensors`, which are had only where it does not: TensorFlow runs what does not wait for a check beside it, and
    might fail there first.
    """
    if name() == "tensorflow":
        import tensorflow as tf

        with tf.control_dependencies([tf.debugging.assert_less_equal(count, limit, message=message)]):
            return [tf.identity(t) for t in tensors]
    return list(tensors)


def graph():
    """TensorFlow's graph that is being traced; None where nothing is, and on JAX."""
    if name() == "jax":
        return None
    import tensorflow as tf

    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def within(outer):
    """Whether what is being traced now sees what was made in the graph `outer`, or outside of any (None)."""
    inner = graph()
    while inner is not None and inner is not outer:
        inner = getattr(inner, "outer_graph", None)
    return inner is outer


def usable(tensor):
    """Whether what is being traced or run now can compute with a tensor; one that a finished trace left behind cannot."""
    if isinstance(tensor, (int, float)):
        return True
    if name() == "tensorflow":
        return not hasattr(tensor, "graph") or within(tensor.graph)
    import jax

    try:
        jax.numpy.add(tensor, 0)
    except jax.errors.UnexpectedTracerError:
        return False
    return True


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


def unconverted(function):
    """`function`, which TensorFlow's AutoGraph is to leave as it is in a function of `tf.function` that calls it."""
    # Not `name`: importing the package fails on no backend.
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.autograph.experimental.do_not_convert(function)


def of_known_shape(gradient, shape):
    """A gradient whose static shape is its variable's; None and sparse ones as they are.

    TensorFlow infers less: of the gradient of a product over `[batch, time, d]` it knows the rank alone where the batch is not
    static.
    """
    if name() != "tensorflow" or gradient is None or is_sparse(gradient):
        return gradient
    import tensorflow as tf

    return tf.ensure_shape(gradient, shape) if gradient.shape != tuple(shape) else gradient


def is_sparse(gradient):
    """Whether a gradient is TensorFlow's `IndexedSlices` (an embedding's), which only the update rule may touch."""
    return hasattr(gradient, "indices") and hasattr(gradient, "values") and hasattr(gradient, "dense_shape")


def call_context():
    """What Keras knows of the call that is under way: its `entry_layer`, called first, and what that was told; or None."""
    # Keras has no public way to ask.
    from keras.src.backend.common import global_state

    return global_state.get_global_attribute("current_call_ctx")


def makes_variables():
    """Whether a variable made now, in a layer's call, is seen by the trainer that differentiates what the layer computes."""
    from keras.src.backend import in_stateless_scope

    return name() == "tensorflow" and not in_stateless_scope()


def mask_of(tensor):
    """The mask that Keras attached to a tensor, or None."""
    # Not an attribute of the tensor on JAX, whose tracers take none; Keras has no public way to ask.
    from keras.src.backend import get_keras_mask

    return get_keras_mask(tensor)


def sparse_zero_unless(ok, gradient):
    """The sparse `gradient` where the scalar `ok` holds, one with zero values elsewhere."""
    import tensorflow as tf

    values = tf.where(ok, gradient.values, tf.zeros_like(gradient.values))
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)


def is_sparse_tensor(x):
    """Whether a layer's input is a sparse tensor: TensorFlow's `SparseTensor` or JAX's `BCOO`."""
    if name() == "tensorflow":
        import tensorflow as tf

        return isinstance(x, tf.SparseTensor)
    from jax.experimental import sparse

    return isinstance(x, sparse.JAXSparse)


def dense(gradient):
    """A sparse gradient as a tensor."""
    import tensorflow as tf

    return tf.convert_to_tensor(gradient)


def sparse(values, indices, like):
    """A sparse gradient of the shape of the sparse gradient `like`."""
    import tensorflow as tf

    return tf.IndexedSlices(values, indices, like.dense_shape)


def several_processes():
    """Whether Horovod has started more than one process. It is not imported unless the user has."""
    horovod = sys.modules.get("horovod.tensorflow")
    return horovod is not None and horovod.is_initialized() and horovod.size() > 1
