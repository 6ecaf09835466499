"""Inverses of matrices of many sizes in few batches: compilers write out a factorization for every size that there is."""

from collections.abc import Iterable, Sequence

import numpy as np
from keras import ops

from keras_ngd import backend, sharding
from keras_ngd.linalg import inverse
from keras_ngd.linalg.batching import batched_by_size
from keras_ngd.typing import Tensor

# Matrices of so many rows take no longer than what surrounds them; of larger ones a batch may have so much more to do.
_SMALL, _MORE = 80, 1.1


def common_sizes(sizes: Iterable[int]) -> dict[int, int]:
    """For each size the one that its matrices are filled up to, the largest of those that are worked on in one batch."""
    found, largest = {}, 0
    for size in sorted(set(sizes), reverse=True):
        if largest > _SMALL and largest**3 > _MORE * size**3 or not largest:
            largest = size
        found[size] = largest
    return found


def damped_inverses(work: Sequence[Sequence[Tensor]], method: str) -> list[Tensor]:
    """`inverse.damped_inverse_of` of many batches, those of about one size at once.

    Matrices are filled up with rows and columns of zeros and a damping of 1: the inverse of a matrix beside an identity is its
    inverse beside an identity.

    Args:
        work: for each batch its factors `[k, d, d]`, dampings `[k]`, the inverses in use `[k, d, d]`, and, if not all of them
            are to be inverted, which are: `[k]` booleans.
        method: as for `inverse.damped_inverse`.
    """
    sizes = [factors.shape[-1] for factors, *_ in work]
    if sharding.is_dividing():
        # Devices of a `keras.distribution` share matrices out as they are stored.
        common = {size: size for size in sizes}
    else:
        common = common_sizes(sizes)
        if backend.under_xla_for_cpus():
            # The parts of matrices of different sizes are then worked on by the same loops, which are compiled once.
            common = {size: inverse.halved_evenly(whole) for size, whole in common.items()}
    # Then all dampings are `[k, d]`: those of one batch have one shape.
    fills_up = any(size != whole for size, whole in common.items())

    def filled(matrices: Tensor, diagonal: bool) -> Tensor:
        size = matrices.shape[-1]
        if (missing := common[size] - size) == 0:
            return matrices
        matrices = ops.pad(matrices, [(0, 0), (0, missing), (0, missing)])
        return backend.add_to_diagonal(matrices, _tail(size, common[size], matrices)) if diagonal else matrices

    def dampings_of(dampings: Tensor, size: int) -> Tensor:
        if not fills_up:
            return dampings
        tail = _tail(size, common[size], dampings)
        return ops.expand_dims(dampings, 1) * (1 - tail) + tail

    def inverses(factors: Tensor, dampings: Tensor, previous: Tensor, chosen: Tensor | None = None) -> list[Tensor]:
        if chosen is None:
            return [inverse.damped_inverse(factors, dampings, previous, method)]
        return [inverse.damped_inverse_of(factors, dampings, previous, chosen, method)]

    # An iteration begins with the inverse in use.
    iterates = method == "newton-schulz"
    batches = [
        [filled(factors, False), dampings_of(dampings, size), filled(previous, iterates), *chosen]
        for size, (factors, dampings, previous, *chosen) in zip(sizes, work, strict=True)
    ]
    found = batched_by_size(inverses, batches)
    return [matrices[:, :size, :size] for size, (matrices,) in zip(sizes, found, strict=True)]


def _tail(size: int, whole: int, like: Tensor) -> Tensor:
    """`[1, whole]`: 0 up to a size, 1 beyond."""
    return ops.cast((np.arange(whole) >= size)[None].astype("float32"), like.dtype)
