"""Newton and Schulz's iteration for inverses of symmetric positive definite matrices: matrix products only.

`X <- X (2I - M X)` squares `I - M X` in every step, so it converges if the spectral radius of that is below 1.
"""

import numpy as np
from keras import ops

from keras_ngd import backend
from keras_ngd.linalg.symmetric import add_diagonal, all_finite, symmetrize
from keras_ngd.typing import Tensor

_STEPS = 7  # 0.9 ** 2**7 is 1e-6
_GUARD_STEPS = 8
_GUARD_RADIUS = 0.9
_CONVERGED = 1e-3
_ACCEPTED = 1e-2

# Steps beyond those in which the error of the smallest eigenvalue that rounding leaves halves: until it is small, from how much
# further away the iteration begins, and some to spare.
_FURTHER_STEPS = 14


def newton_schulz_inverse(matrices: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses refined from `start`, where that is near enough; the size of the last step decides in the end.

    Args:
        matrices: `[k, d, d]`, symmetric positive definite.
        start: `[k, d, d]`, inverses of similar matrices.

    Returns:
        `(inverses, accepted)`: `[k, d, d]` and `[k]`; inverses that are not accepted are meaningless.
    """
    promising = _promising(matrices, start)
    inverses, converged = _refined(matrices, start, promising, _STEPS)
    return inverses, promising & converged


def newton_schulz_from_anywhere(matrices: Tensor, start: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses refined from `start` where that is near enough and `allowed`, and from a multiple of the identity elsewhere.

    From there the iteration converges for every positive definite matrix: what is missing for an eigenvalue halves until it is
    small, and squares from then on, some `log2` of the condition and six steps. Of what is not positive definite in working
    precision nothing is accepted.

    Args:
        matrices: `[k, d, d]`, symmetric.
        start: `[k, d, d]`.
        allowed: scalar boolean.

    Returns:
        As `newton_schulz_inverse`.
    """
    # The largest sum of a row's entries is no less than the largest eigenvalue.
    largest = ops.max(ops.sum(ops.abs(matrices), axis=2), axis=1)
    promising = ops.reshape(_promising(matrices, start) & allowed, (-1, 1, 1))
    start = ops.where(promising, start, add_diagonal(ops.zeros_like(matrices), 1 / largest))
    digits = -np.log2(np.finfo(backend.dtype_name(matrices)).eps)
    return _refined(matrices, start, ops.ones((matrices.shape[0],), "bool"), int(digits) + _FURTHER_STEPS)


def _promising(matrices: Tensor, start: Tensor) -> Tensor:
    """`[k]`, whether the iteration is to converge from `start`, by an estimate of the spectral radius from a few power steps."""
    size = matrices.shape[-1]
    vector = np.random.default_rng(size).standard_normal((1, size, 1))
    vector = ops.broadcast_to(ops.cast(vector / np.linalg.norm(vector), matrices.dtype), (matrices.shape[0], size, 1))

    def unfinished(step: Tensor, vector: Tensor, radius: Tensor) -> Tensor:
        return step < _GUARD_STEPS

    def power_step(step: Tensor, vector: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vector = vector - backend.matmul(matrices, backend.matmul(start, vector))
        # Once it is not finite, what it is divided by makes zeros of the vector.
        new = ops.sqrt(ops.sum(ops.square(vector), axis=(1, 2)))
        radius = ops.where(ops.isfinite(radius), new, radius)
        return step + 1, vector / ops.maximum(ops.reshape(radius, (-1, 1, 1)), 1e-30), radius

    # A loop: compilers for accelerators would make a program of its own of each product.
    radius = ops.zeros((matrices.shape[0],), matrices.dtype)
    *_, radius = ops.while_loop(unfinished, power_step, (ops.convert_to_tensor(0), vector, radius))
    return ops.isfinite(radius) & (radius < _GUARD_RADIUS)


def _refined(matrices: Tensor, start: Tensor, promising: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """What at most so many steps make of `start`, and `[k]`, where they have converged; only those that are promising count."""

    def unfinished(step: Tensor, inverses: Tensor, change: Tensor) -> Tensor:
        return (step < steps) & ops.any(ops.where(promising, change, 0.0) > _CONVERGED)

    def refine(step: Tensor, inverses: Tensor, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        new = 2 * inverses - backend.matmul(inverses, backend.matmul(matrices, inverses))
        new = symmetrize(new)
        size_of = ops.sqrt(ops.sum(ops.square(inverses), axis=(1, 2)))
        return step + 1, new, ops.sqrt(ops.sum(ops.square(new - inverses), axis=(1, 2))) / size_of

    unknown = ops.full((matrices.shape[0],), float("inf"), dtype=matrices.dtype)
    _, inverses, change = ops.while_loop(unfinished, refine, (ops.convert_to_tensor(0), start, unknown))
    return inverses, all_finite(inverses) & (change < _ACCEPTED)
