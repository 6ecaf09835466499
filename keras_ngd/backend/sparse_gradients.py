"""Sparse tensors: gradients of embeddings, which are TensorFlow's `IndexedSlices`, and layers' inputs."""

from keras_ngd.backend.running import name


def is_sparse(gradient):
    """Whether a gradient is TensorFlow's `IndexedSlices` (an embedding's), which only the update rule may touch."""
    return hasattr(gradient, "indices") and hasattr(gradient, "values") and hasattr(gradient, "dense_shape")


def sparse_zero_unless(ok, gradient):
    """The sparse `gradient` where the scalar `ok` holds, one with zero values elsewhere."""
    import tensorflow as tf

    values = tf.where(ok, gradient.values, tf.zeros_like(gradient.values))
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)


def dense(gradient):
    """A sparse gradient as a tensor."""
    import tensorflow as tf

    return tf.convert_to_tensor(gradient)


def sparse(values, indices, like):
    """A sparse gradient of the shape of the sparse gradient `like`."""
    import tensorflow as tf

    return tf.IndexedSlices(values, indices, like.dense_shape)


def is_sparse_tensor(x):
    """Whether a layer's input is a sparse tensor: TensorFlow's `SparseTensor` or JAX's `BCOO`."""
    if name() == "tensorflow":
        import tensorflow as tf

        return isinstance(x, tf.SparseTensor)
    from jax.experimental import sparse

    return isinstance(x, sparse.JAXSparse)
