"""Inverses of batches of symmetric positive definite matrices."""

import functools
from collections.abc import Sequence

from keras import ops

from keras_ngd import backend, sharding
from keras_ngd.linalg.batching import at_once, of_chosen
from keras_ngd.linalg.halved_products import (
    inner,
    join,
    join_symmetric,
    lower_times,
    outer,
    split_in_four,
    times_lower,
    times_transposed_lower,
)
from keras_ngd.linalg.newton_schulz import newton_schulz_from_anywhere, newton_schulz_inverse
from keras_ngd.linalg.symmetric import add_diagonal, all_finite, symmetrize
from keras_ngd.typing import Tensor

_RETRIES = 3


def cholesky_inverse(matrices: Tensor) -> Tensor:
    """`[k, d, d]` inverses by Cholesky factorization; NaN where a matrix is not positive definite."""
    size = matrices.shape[-1]
    if size == 1:
        return ops.where(matrices > 0, 1 / matrices, ops.full_like(matrices, float("nan")))
    return _inverse(matrices, _whole_size(size))


def _whole_size(size: int) -> int:
    """Up to which size factorizations are left whole.

    LAPACK's are good at some hundred rows. XLA's own walk through a matrix column by column and cost several times as much at a
    hundred rows; splitting further costs compile time.
    """
    if backend.factorizes_by_column():
        return 64 if size <= 512 else 128
    return 640


def halved_evenly(size: int) -> int:
    """The size up to which matrices are filled up before they are halved, so that all halves are of one size."""
    parts, whole = 1, _whole_size(size)
    while size > parts * whole:
        parts *= 2
    return -(-size // parts) * parts


def _inverse(matrices: Tensor, whole: int) -> Tensor:
    """Inverses of `[k, d, d]`, symmetric up to roundings.

    Large matrices by halves, with `R11` the inverse root of the corner, `L21 = M21 R11^T`, `Y = L21 R11` and the inverse `Q` of
    the Schur complement `M22 - L21 L21^T`:

        M^-1 = [R11^T R11 + Y^T Q Y,  -Y^T Q;  -Q Y,  Q]

    What is subtracted from `M22` is made of the root: made of the corner's inverse, it would cost half of the digits.
    """
    if matrices.shape[-1] <= whole:
        return _gram_of_lower(_inverse_root(matrices, whole), whole)
    corner, below, last = split_in_four(matrices)
    root = _inverse_root(corner, whole)
    below = times_transposed_lower(below, root)
    second = _inverse(last - outer(below), whole)
    below = times_lower(below, root)
    lower_left = -backend.matmul(second, below)
    return join_symmetric(_gram_of_lower(root, whole) - inner(below, lower_left), lower_left, second)


def _inverse_root(matrices: Tensor, whole: int) -> Tensor:
    """`R` of `[k, d, d]`, lower triangular, with `R M R^T = I`: the inverse Cholesky factors.

    Large matrices by halves, with `L21 = M21 R11^T`, `R22` of the Schur complement `M22 - L21 L21^T`, and
    `R21 = -R22 L21 R11`: products run several times faster than factorizations and triangular solutions.
    """
    if matrices.shape[-1] <= whole:
        return backend.triangular_inverse(backend.cholesky(matrices))
    corner, below, last = split_in_four(matrices)
    first = _inverse_root(corner, whole)
    below = times_transposed_lower(below, first)
    second = _inverse_root(last - outer(below), whole)
    return join(
        first,
        -lower_times(second, times_lower(below, first)),
        second,
        ops.zeros((matrices.shape[0], first.shape[-1], second.shape[-1]), first.dtype),
    )


def _gram_of_lower(lower: Tensor, whole: int) -> Tensor:
    """`R^T R` of lower triangular matrices `[k, d, d]`, without most of the products with zeros."""
    if lower.shape[-1] <= whole:
        return backend.matmul(lower, lower, transpose_a=True)
    first, below, second = split_in_four(lower)
    return join_symmetric(
        _gram_of_lower(first, whole) + inner(below, below),
        backend.matmul(second, below, transpose_a=True),
        _gram_of_lower(second, whole),
    )


def _one_by_one(size: int) -> bool:
    """Whether matrices of this size are inverted one after the other: programs for XLA are then those of a single one.

    Products of large matrices are no faster together, and loops over the parts of one are compiled once for all sizes of which
    these are parts.
    """
    return backend.under_xla_for_cpus() and at_once(size) == 1


def damped_inverse(
    factors: Tensor, damping: Tensor, previous: Tensor | None = None, method: str = "cholesky"
) -> Tensor:
    """`(factor + damping I)^-1`, or the previous inverse (zero, if there is none) where that fails.

    Where a matrix is not positive definite in working precision, it is tried again with ten, a hundred and a thousand times
    the damping.

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
    if factors.shape[0] > 1 and _one_by_one(factors.shape[-1]):
        each = [ops.expand_dims(t, 1) for t in (factors, damping, previous) if t is not None]
        one = functools.partial(damped_inverse, method=method)
        return ops.map(lambda matrix: one(*matrix)[0], tuple(each))
    factors = symmetrize(factors)
    inverses, good = factors if previous is None else previous, ops.zeros((factors.shape[0],), "bool")
    # Compiled for a TPU each factorization is a large program, and products are what it is made for: all attempts are one, the
    # first of which may begin at the inverse in use.
    products = method == "newton-schulz" and backend.for_tpus()
    if method == "newton-schulz" and not products:
        refined, good = newton_schulz_inverse(add_diagonal(factors, damping), previous)
        inverses = ops.where(ops.reshape(good, (-1, 1, 1)), refined, previous)

    def unfinished(attempt: Tensor, inverses: Tensor, good: Tensor) -> Tensor:
        return (attempt <= _RETRIES) & ops.logical_not(ops.all(good))

    def invert(attempt: Tensor, inverses: Tensor, good: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raised = damping * ops.power(ops.cast(10.0, damping.dtype), ops.cast(ops.maximum(attempt, 0), damping.dtype))
        matrices = add_diagonal(factors, raised)
        if products:
            new, succeeded = newton_schulz_from_anywhere(matrices, previous, attempt < 0)
        else:
            new = cholesky_inverse(matrices)
            succeeded = all_finite(new)
        taken = succeeded & ops.logical_not(good)
        return attempt + 1, ops.where(ops.reshape(taken, (-1, 1, 1)), new, inverses), good | succeeded

    # A loop rather than attempts written out: compilers expand each factorization into hundreds of operations.
    _, inverses, good = ops.while_loop(
        unfinished, invert, (ops.convert_to_tensor(-1 if products else 0), inverses, good)
    )
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
