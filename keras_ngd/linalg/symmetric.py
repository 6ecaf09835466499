"""What batches of symmetric matrices are made to be, and asked for."""

from keras import ops

from keras_ngd import backend
from keras_ngd.typing import Tensor


def symmetrize(matrices: Tensor) -> Tensor:
    """`(X + X^T) / 2` over the last two axes."""
    if matrices.shape[-1] == 1:
        # TensorFlow's optimizer of graphs makes `2 X` of `X + X`, and in conditionals a broken graph of that.
        return matrices
    return (matrices + ops.swapaxes(matrices, -1, -2)) / 2


def add_diagonal(matrices: Tensor, values: Tensor) -> Tensor:
    """`matrices[i] + values[i] I`, or with `[k, d]` values `matrices[i] + diag(values[i])`."""
    return backend.add_to_diagonal(matrices, ops.expand_dims(values, -1) if values.ndim == 1 else values)


def all_finite(matrices: Tensor) -> Tensor:
    """Per matrix, whether all its entries are finite."""
    return ops.all(ops.isfinite(matrices), axis=(1, 2))


def checksum(matrices: Tensor) -> Tensor:
    """A number that is not finite if an entry of the matrices, which are positive semi-definite, is not."""
    if backend.under_xla():
        # XLA's CPU compiler has a routine for it, where it writes out four loops for a trace.
        return ops.sum(matrices)
    # An entry that is not finite makes a diagonal entry of its row not finite, since these are sums of squares.
    return ops.sum(backend.trace(matrices))
