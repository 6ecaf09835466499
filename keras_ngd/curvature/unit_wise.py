"""The Fisher block of scales and offsets, feature by feature, of all layers of one shape at once."""

from collections.abc import Callable, Sequence
from typing import Self

from keras import ops

from keras_ngd import backend
from keras_ngd.curvature.curvature import Slot, TracedCurvature, where_chosen
from keras_ngd.linalg.diagonal import identities
from keras_ngd.typing import Tensor


class UnitWiseCurvature(TracedCurvature):
    """Damped inverses of the blocks of each feature's scale and offset, of `k` layers of one shape.

    The state is `(F_c + d I)^-1` of each feature `c`, `[k, features, n, n]` with `n` of 2, or 1 where there is one of the two
    alone, and

        P_c = (F_c + d I)^-1 V_c

    (Osawa et al. 2019, section 4.2). Of factors with dampings `dA` and `dG`, `dA dG` is what is added where both are zero; so
    it is here: `d` is the damping, or its square where it is added to each factor (`"factor"`), or that square times the mean
    eigenvalue of all blocks of a layer (`"relative"`). Before the first refresh P = V. A refresh that fails keeps the
    previous state.

    Args:
        count: `k`.
        parameters: `n`.
        features: how many there are.
        dtype: of the statistics.
        damping_mode: as for `kronecker.factor_dampings`.
        damping_factor: what the damping is multiplied with. Default 1.
    """

    def __init__(
        self,
        count: int,
        parameters: int,
        features: int,
        dtype: str,
        damping_mode: str,
        damping_factor: float = 1.0,
    ) -> None:
        self.count, self.parameters, self.features, self.dtype = count, parameters, features, dtype
        self.damping_mode, self.damping_factor = damping_mode, damping_factor

    @property
    def slots(self) -> tuple[Slot, ...]:
        shape = (self.count, self.features, self.parameters, self.parameters)
        return (Slot(f"unit_inverse_{self.parameters}_{self.features}", shape, identities, self.dtype),)

    @property
    def refresh_cost(self) -> float:
        return self.count * self.features * self.parameters**3

    @property
    def size(self) -> int:
        return self.features * self.parameters

    def trace(self, inputs: Sequence[Tensor]) -> Tensor:
        return ops.sum(backend.trace(inputs[0]), axis=1)

    def _damping(self, blocks: Tensor, damping: Tensor) -> Tensor:
        """`d`, `[k]`."""
        damping = ops.cast(damping, self.dtype) * self.damping_factor
        if self.damping_mode == "relative":
            mean = self.trace([blocks]) / self.size
            # Where nothing arrives nothing is known: the block counts as the identity. (What is not finite is to fail.)
            return ops.where(ops.equal(mean, 0), 1.0, damping**2 * mean)
        return (damping**2 if self.damping_mode == "factor" else damping) * ops.ones_like(blocks[:, 0, 0, 0])

    @classmethod
    def refresh_all(
        cls,
        curvatures: Sequence[Self],
        inputs: Sequence[Sequence[Tensor]],
        damping: Tensor,
        states: Sequence[Sequence[Tensor]],
        chosen: Sequence[Tensor] | None = None,
    ) -> list[list[Tensor]]:
        """As `Curvature.refresh_all`; inputs are the blocks, `[k, features, n, n]`."""
        new = []
        for curvature, (blocks,), (old,) in zip(curvatures, inputs, states, strict=True):
            added = ops.reshape(curvature._damping(blocks, damping), (-1, 1, 1))
            inverses = _inverses(backend.add_to_diagonal(blocks, added))
            finite = ops.all(ops.isfinite(inverses), axis=(2, 3), keepdims=True)
            new.append([ops.where(finite, inverses, old)])
        return where_chosen(chosen, new, states)

    def precondition(
        self, v: Tensor, damping: Tensor, state: Sequence[Tensor], inputs: Callable[[], Sequence[Tensor]]
    ) -> Tensor:
        # `[k, features, 1, n]`: a product for each feature would take a device longer than sums of two products.
        by_feature = ops.expand_dims(ops.transpose(v, (0, 2, 1)), 2)
        return ops.transpose(ops.sum(state[0] * by_feature, axis=3), (0, 2, 1))


def _inverses(blocks: Tensor) -> Tensor:
    """The inverses of the positive definite `[..., n, n]` for `n` of 1 or 2; not finite where one is not."""
    if blocks.shape[-1] == 1:
        return ops.where((blocks > 0) & ops.isfinite(blocks), 1 / blocks, float("nan"))
    # Products of the entries themselves may be larger or smaller than any number of their dtype.
    trace = backend.trace(blocks)
    blocks = blocks / trace[..., None, None]
    p, q, w = blocks[..., 0, 0], blocks[..., 0, 1], blocks[..., 1, 1]
    determinant = p * w - q * q
    rows = [ops.stack([w, -q], axis=-1), ops.stack([-q, p], axis=-1)]
    # Of a block that is as good as singular, rounding decides on the sign.
    divisor = ops.where((trace > 0) & (determinant > 0), determinant * trace, float("nan"))
    return ops.stack(rows, axis=-2) / divisor[..., None, None]
