"""Inverses of batches of symmetric positive definite matrices."""

from collections.abc import Sequence

import numpy as np
from keras import ops

from keras_ngd import backend, sharding
from keras_ngd.linalg.batching import of_chosen
from keras_ngd.typing import Tensor

NEWTON_SCHULZ_STEPS = 7  # 0.9 ** 2**7 is 1e-6
_GUARD_STEPS = 8
_GUARD_RADIUS = 0.9
_CONVERGED = 1e-3
_ACCEPTED = 1e-2
_RETRIES = 3


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


def cholesky_inverse(matrices: Tensor) -> Tensor:
    """`[k, d, d]` inverses by Cholesky factorization; NaN where a matrix is not positive definite."""
    size = matrices.shape[-1]
    if size == 1:
        return ops.where(matrices > 0, 1 / matrices, ops.full_like(matrices, float("nan")))
    whole = _whole_size(size)
    return _gram_of_lower(_inverse_root(matrices, whole), whole)


def _whole_size(size: int) -> int:
    """Up to which size factorizations are left whole.

    LAPACK's are good at some hundred rows. XLA's own walk through a matrix column by column and cost several times as much at a
    hundred rows; splitting further costs compile time.
    """
    if backend.factorizes_by_column():
        return 64 if size <= 512 else 128
    return 640


def split_in_four(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The corner, what is below it, and the last quarter of `[k, d, d]`."""
    half = matrices.shape[-1] // 2
    return matrices[:, :half, :half], matrices[:, half:, :half], matrices[:, half:, half:]


def _join(corner: Tensor, lower_left: Tensor, lower_right: Tensor, upper_right: Tensor) -> Tensor:
    left = ops.concatenate([corner, lower_left], axis=1)
    return ops.concatenate([left, ops.concatenate([upper_right, lower_right], axis=1)], axis=2)


def _inverse_root(matrices: Tensor, whole: int) -> Tensor:
    """`R` of `[k, d, d]`, lower triangular, with `R M R^T = I`: the inverse Cholesky factors.

    Large matrices by halves, with `L21 = M21 R11^T`, `R22` of the Schur complement `M22 - L21 L21^T`, and
    `R21 = -R22 L21 R11`: products run several times faster than factorizations and triangular solutions.
    """
    if matrices.shape[-1] <= whole:
        return backend.triangular_inverse(backend.cholesky(matrices))
    corner, below, last = split_in_four(matrices)
    first = _inverse_root(corner, whole)
    below = backend.matmul(below, first, transpose_b=True)
    second = _inverse_root(last - backend.matmul(below, below, transpose_b=True), whole)
    return _join(
        first,
        -backend.matmul(second, backend.matmul(below, first)),
        second,
        ops.zeros((matrices.shape[0], first.shape[-1], second.shape[-1]), first.dtype),
    )


def _gram_of_lower(lower: Tensor, whole: int) -> Tensor:
    """`R^T R` of lower triangular matrices `[k, d, d]`, without most of the products with zeros."""
    if lower.shape[-1] <= whole:
        return backend.matmul(lower, lower, transpose_a=True)
    first, below, second = split_in_four(lower)
    lower_left = backend.matmul(second, below, transpose_a=True)
    return _join(
        _gram_of_lower(first, whole) + backend.matmul(below, below, transpose_a=True),
        lower_left,
        _gram_of_lower(second, whole),
        ops.swapaxes(lower_left, 1, 2),
    )


def newton_schulz_inverse(matrices: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses refined from `start` by `X <- X (2I - M X)`, matrix products only.

    `I - M X` squares in every step, so the iteration converges iff its spectral radius is below 1; a few power steps
    estimate it before the first, and the size of the last step decides in the end.

    Args:
        matrices: `[k, d, d]`, symmetric positive definite.
        start: `[k, d, d]`, inverses of similar matrices.

    Returns:
        `(inverses, accepted)`: `[k, d, d]` and `[k]`; inverses that are not accepted are meaningless.
    """
    size = matrices.shape[-1]
    vector = np.random.default_rng(size).standard_normal((1, size, 1))
    vector = ops.broadcast_to(ops.cast(vector / np.linalg.norm(vector), matrices.dtype), (matrices.shape[0], size, 1))
    radius = ops.zeros((matrices.shape[0],), matrices.dtype)
    for _ in range(_GUARD_STEPS):
        vector = vector - backend.matmul(matrices, backend.matmul(start, vector))
        radius = ops.sqrt(ops.sum(ops.square(vector), axis=(1, 2)))
        vector = vector / ops.maximum(ops.reshape(radius, (-1, 1, 1)), 1e-30)
    promising = ops.isfinite(radius) & (radius < _GUARD_RADIUS)

    def unfinished(step: Tensor, inverses: Tensor, change: Tensor) -> Tensor:
        return (step < NEWTON_SCHULZ_STEPS) & ops.any(ops.where(promising, change, 0.0) > _CONVERGED)

    def refine(step: Tensor, inverses: Tensor, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        new = 2 * inverses - backend.matmul(inverses, backend.matmul(matrices, inverses))
        new = symmetrize(new)
        size_of = ops.sqrt(ops.sum(ops.square(inverses), axis=(1, 2)))
        return step + 1, new, ops.sqrt(ops.sum(ops.square(new - inverses), axis=(1, 2))) / size_of

    unknown = ops.full((matrices.shape[0],), float("inf"), dtype=matrices.dtype)
    _, inverses, change = ops.while_loop(unfinished, refine, (ops.convert_to_tensor(0), start, unknown))
    return inverses, promising & all_finite(inverses) & (change < _ACCEPTED)


def damped_inverse(
    factors: Tensor, damping: Tensor, previous: Tensor | None = None, method: str = "cholesky"
) -> Tensor:
    """`(factor + damping I)^-1`, or the previous inverse (zero, if there is none) where that fails.

    Where Cholesky meets a matrix that is not positive definite in working precision, it is tried again with ten, a
    hundred and a thousand times the damping.

    Args:
        factors: `[k, d, d]`, symmetric positive semi-definite.
        damping: `[k]`, positive; or `[k, d]`, another for each row.
        previous: `[k, d, d]`, the inverses in use: the starting point of `"newton-schulz"`, which needs one, and what is
            kept on failure. Default None.
        method: `"cholesky"` (default) or `"newton-schulz"`.

    Returns:
        `[k, d, d]`, finite and symmetric wherever `previous` is.
    """
    if sharding.is_dividing():
        start = ops.zeros_like(factors) if previous is None else previous
        return damped_inverse_of(factors, damping, start, ops.ones((factors.shape[0],), "bool"), method)
    factors = symmetrize(factors)
    inverses, good = factors if previous is None else previous, ops.zeros((factors.shape[0],), "bool")
    if method == "newton-schulz":
        refined, good = newton_schulz_inverse(add_diagonal(factors, damping), previous)
        inverses = ops.where(ops.reshape(good, (-1, 1, 1)), refined, previous)

    def unfinished(attempt: Tensor, inverses: Tensor, good: Tensor) -> Tensor:
        return (attempt <= _RETRIES) & ops.logical_not(ops.all(good))

    def factorize(attempt: Tensor, inverses: Tensor, good: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raised = damping * ops.power(ops.cast(10.0, damping.dtype), ops.cast(attempt, damping.dtype))
        new = cholesky_inverse(add_diagonal(factors, raised))
        succeeded = all_finite(new)
        taken = succeeded & ops.logical_not(good)
        return attempt + 1, ops.where(ops.reshape(taken, (-1, 1, 1)), new, inverses), good | succeeded

    # A loop rather than attempts written out: compilers expand each factorization into hundreds of operations.
    _, inverses, good = ops.while_loop(unfinished, factorize, (ops.convert_to_tensor(0), inverses, good))
    return ops.where(ops.reshape(good, (-1, 1, 1)), inverses, 0.0) if previous is None else inverses


def damped_inverse_of(factors: Tensor, damping: Tensor, previous: Tensor, chosen: Tensor, method: str) -> Tensor:
    """`damped_inverse` of the chosen matrices, the previous inverses of all others.

    The chosen are brought together, so that the work is theirs alone, whatever their number.

    Args:
        factors, damping, previous, method: as for `damped_inverse`.
        chosen: `[k]` booleans.
    """

    if not sharding.is_dividing():
        return _damped_inverse_of(factors, damping, previous, chosen, method)

    def inverses(
        known: Tensor, state: Sequence[Tensor], factors: Tensor, damping: Tensor, chosen: Tensor
    ) -> list[Tensor]:
        return [_damped_inverse_of(factors, damping, state[0], known & chosen, method)]

    return sharding.divided(inverses, [previous], factors, damping, chosen)[0]


def _damped_inverse_of(factors: Tensor, damping: Tensor, previous: Tensor, chosen: Tensor, method: str) -> Tensor:
    def invert(factors: Tensor, damping: Tensor, old: Tensor) -> Tensor:
        return damped_inverse(factors, damping, old, method)

    return of_chosen(invert, chosen, [factors, damping], previous)
