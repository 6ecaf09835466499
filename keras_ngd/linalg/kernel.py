"""Fisher blocks as sums of few rank-one terms: the kernel matrix, and the Sherman-Morrison-Woodbury identity.

A block is `F = U^T U`, where row `j` of `U` is the flattened outer product of row `j` of `a`, `[k, n, input_dim]`, and row `j` of
`g`, `[k, n, output_dim]`. Nothing of the size of `F` or `U` is ever formed.
"""

from keras import ops

from keras_ngd import backend
from keras_ngd.linalg import inverse, symmetric
from keras_ngd.typing import Tensor


def kernel_matrix(a: Tensor, g: Tensor) -> Tensor:
    """`U U^T = (a a^T) o (g g^T)`, `[k, n, n]` (HyLo, eq. 7, without the damping)."""
    return backend.matmul(a, a, transpose_b=True) * backend.matmul(g, g, transpose_b=True)


def mean_eigenvalues(a: Tensor, g: Tensor) -> Tensor:
    """`tr(U U^T) / n`, `[k]`, with `n` the rows that are not zero; 1 where all are."""
    squares = ops.sum(a * a, axis=2) * ops.sum(g * g, axis=2)
    counts = ops.cast(ops.sum(ops.cast(squares > 0, "int32"), axis=1), squares.dtype)
    return ops.where(counts > 0, ops.sum(squares, axis=1) / ops.maximum(counts, 1.0), 1.0)


def products(a: Tensor, g: Tensor, v: Tensor) -> Tensor:
    """`U vec(v)`: `a_j^T v g_j` for each row, `[k, n]`, of `v`, `[k, input_dim, output_dim]`."""
    return ops.sum(backend.matmul(a, v) * g, axis=2)


def combination(a: Tensor, g: Tensor, c: Tensor) -> Tensor:
    """`U^T c` as a matrix: the sum of `c_j a_j g_j^T`, `[k, input_dim, output_dim]`, of `c`, `[k, n]`."""
    return backend.matmul(a, ops.expand_dims(c, 2) * g, transpose_a=True)


def precondition(a: Tensor, g: Tensor, core: Tensor, damping: Tensor, v: Tensor) -> Tensor:
    """`(v - U^T core U v) / damping` (eq. 7): with `core = (U U^T + damping I)^-1`, this is `(F + damping I)^-1 v`.

    Args:
        core: `[k, n, n]`.
        damping: `[k]`.
        v: `[k, input_dim, output_dim]`.
    """
    c = ops.squeeze(backend.matmul(core, ops.expand_dims(products(a, g, v), 2)), 2)
    return (v - combination(a, g, c)) / ops.reshape(damping, (-1, 1, 1))


def damped_core(kernel: Tensor, damping: Tensor) -> Tensor:
    """`(kernel + damping I)^-1`, `[k, n, n]`; zero where that fails.

    Args:
        kernel: `[k, n, n]`.
        damping: `[k]`.
    """
    return inverse.damped_inverse(kernel, damping)


def interpolated_core(kernel: Tensor, weights: Tensor, damping: Tensor) -> Tensor:
    """`(kernel + damping weights^-1)^-1`, the core of rows that stand for more rows than themselves; zero where it fails.

    Computed as `L (L^T kernel L + damping I)^-1 L^T` with `weights = L L^T`: the kernel, which is singular where rows repeat, is
    never inverted (eq. 8 written so loses all digits there).

    Args:
        kernel: `[k, r, r]`.
        weights: `[k, r, r]`, no smaller than the identity.
        damping: `[k]`.
    """
    root = backend.cholesky(symmetric.symmetrize(weights))
    good = ops.reshape(symmetric.all_finite(root), (-1, 1, 1))
    root = ops.where(good, root, ops.zeros_like(root))
    inner = backend.matmul(backend.matmul(root, kernel, transpose_a=True), root)
    core = damped_core(inner, damping)
    return symmetric.symmetrize(backend.matmul(backend.matmul(root, core), root, transpose_b=True))
