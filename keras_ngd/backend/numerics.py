"""Products, factorizations and random numbers, the same on both backends where `keras.ops` is not."""

import itertools

import keras
from keras import ops

from keras_ngd.backend.running import name


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


def times_or_zero(tensor, factor):
    """`tensor * factor`, of the same dtype and broadcast; zeros where that is zero, whatever the tensor holds."""
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.math.multiply_no_nan(tensor, factor)
    return ops.where(factor != 0, tensor * factor, ops.zeros_like(tensor))


def cholesky(matrices):
    """Lower Cholesky factors of what the lower triangles say; NaN where a matrix is not positive definite.

    (`keras.ops.cholesky` stops the program there on TensorFlow, unless XLA compiles it.)
    """
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.linalg.cholesky(matrices)
    import jax

    def factor(matrix):
        return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)

    return _one_by_one_on_cpus(factor, matrices)


def eigh(matrices):
    """Eigenvalues, ascending, and eigenvectors of symmetric matrices."""
    if name() == "tensorflow":
        return ops.linalg.eigh(matrices)
    import jax.numpy as jnp

    return _one_by_one_on_cpus(lambda matrix: tuple(jnp.linalg.eigh(matrix)), matrices)


def _one_by_one(function, matrices):
    """JAX's `function` of a matrix, or of matrices `[k, d, d]` one after the other."""
    import jax

    if matrices.ndim == 2:
        return function(matrices)
    if matrices.shape[0] == 1:
        return jax.tree.map(lambda found: found[None], function(matrices[0]))
    return jax.lax.map(function, matrices)


def _one_by_one_on_cpus(function, matrices):
    """JAX's `function` of a matrix or of matrices `[k, d, d]`; of one after the other where a CPU computes it.

    There a call for a batch shares its work out among the threads that run the program, and waits in one of them: as many
    such calls at a time as there are threads wait for ever.
    """
    import jax

    if matrices.ndim == 2 or matrices.shape[0] == 1:
        return _one_by_one(function, matrices)
    return jax.lax.platform_dependent(matrices, cpu=lambda batch: _one_by_one(function, batch), default=function)


def trace(matrices):
    """The sums of the diagonals of `[..., d, d]`. (`keras.ops.trace` walks through all entries on TensorFlow.)"""
    if name() == "tensorflow":
        import tensorflow as tf

        # `tf.linalg.trace` puts eleven operations into the graph.
        return tf.reduce_sum(tf.raw_ops.MatrixDiagPart(input=matrices), -1)
    # JAX's own masks all entries, and its compiler for CPUs stores what comes of it.
    size = matrices.shape[-1]
    return ops.sum(ops.reshape(matrices, (*matrices.shape[:-2], -1))[..., :: size + 1], axis=-1)


def add_to_diagonal(matrices, values):
    """`matrices + diag(values)`, of `[..., d, d]` and what broadcasts to `[..., d]`."""
    if name() == "tensorflow":
        import tensorflow as tf

        # Without a matrix of ones and zeros, of which TensorFlow makes a constant for every size.
        return tf.linalg.set_diag(matrices, tf.linalg.diag_part(matrices) + values)
    import jax

    # Not by a matrix of ones and zeros, which the compiler would store for every size, to make it once for all turns of a loop.
    size = matrices.shape[-1]
    values = jax.numpy.broadcast_to(jax.numpy.asarray(values), matrices.shape[:-1])
    spread = [(0, 0, 0)] * (values.ndim - 1) + [(0, 0, size)]
    return matrices + jax.numpy.reshape(jax.lax.pad(values, values.dtype.type(0), spread), matrices.shape)


def triangular_inverse(lower):
    """Inverses of the lower triangular matrices `[k, d, d]`."""
    if name() == "tensorflow":
        import tensorflow as tf

        identity = tf.raw_ops.MatrixDiag(diagonal=tf.ones_like(lower[..., 0]))
        return tf.linalg.triangular_solve(lower, identity)
    import jax

    identity = jax.numpy.eye(lower.shape[-1], dtype=lower.dtype)

    def inverse(matrix):
        return jax.scipy.linalg.solve_triangular(matrix, identity, lower=True)

    # On the CPU JAX calls LAPACK for one matrix but has XLA write out a batch's solution, which takes minutes to compile.
    return _one_by_one(inverse, lower)


def rows_at(matrices, order):
    """The rows of `[k, d, n]` that the indices `[k, m]` name, one matrix after the other."""
    if name() == "tensorflow":
        import tensorflow as tf

        # `ops.take_along_axis` would look up each entry.
        return tf.gather(matrices, order, batch_dims=1)
    return ops.take_along_axis(matrices, ops.expand_dims(order, 2), axis=1)


def repeated(values, count):
    """Each of the `values`, `[k]`, so many times: `[k * count]`. (`keras.ops.repeat` is ten operations more on TensorFlow.)"""
    if count == 1:
        return values
    return ops.reshape(ops.tile(ops.reshape(values, (-1, 1)), (1, count)), (-1,))


def concatenated(tensors):
    """Tensors one after the other; one alone as it is."""
    return tensors[0] if len(tensors) == 1 else ops.concatenate(tensors)


def parts(stacked, counts, axis=0):
    """A tensor's parts, so many long, as a list. (`keras.ops.split` computes its places in the graph on TensorFlow.)"""
    if len(counts) == 1:
        return [stacked]
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.split(stacked, counts, axis)
    return ops.split(stacked, list(itertools.accumulate(counts))[:-1], axis)


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


def looks_behind_probabilities():
    """Whether a cross-entropy of probabilities takes the logits that these were made of where it sees them, as TensorFlow's."""
    return name() == "tensorflow"


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


def dtype_name(tensor):
    """A tensor's dtype as a string."""
    return keras.backend.standardize_dtype(tensor.dtype)


def itemsize(dtype):
    """Bytes of one number of what is kept of the curvature: of float64, or of float32."""
    return 8 if dtype == "float64" else 4
