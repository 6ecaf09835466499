"""A few rows that stand for all rows of a batch."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd import backend, schedules
from keras_ngd.linalg import interpolative, inverse, kernel, sampling, symmetric
from keras_ngd.statistics.draws import Draws
from keras_ngd.statistics.example_rows import RowStatistics
from keras_ngd.typing import Config, Tensor, Variable

KIS, KID = 1.0, 2.0


@keras.saving.register_keras_serializable("keras_ngd")
class LowRankStatistics(Draws, RowStatistics):
    """`rank` of the rows of `RowStatistics`, compressed in the probe: only they leave it.

    An open gate of 2 takes the interpolative decomposition of the kernel matrix (HyLo's KID, Alg. 2 and eq. 8): with
    `Q = (A A^T) o (G G^T) = P Q_SS P^T + R`,

        As, Gs = the rows S of A and G,        Y = damping * P^T (R + damping I)^-1 P ,

    and a gate of 1 a sample by importance (KIS, Alg. 3): `Gs` the rows `S` of `G`, each times the square root of its
    weight (`linalg.sampling.draw`), and `Y = I`. `(Q + damping I)^-1` is then about `P' C P` on all rows, `C =
    (As As^T o Gs Gs^T + damping Y^-1)^-1` on the chosen ones.

    Controls: `draw` (see `Draws`), and `damping`, which the optimizer writes before every batch: in the units of the rows' outer
    products, or, if it is `relative_damping`, in those of the mean eigenvalue of `Q`.

    Args:
        rank: int in [1, batch_size].
        mode: `"both"`, or `"kid"` or `"kis"` if the gate will never ask for the other.
        sampling: `"priority"`, `"paper"` or `"replacement"`.
        power: samples follow the power of the rows' sizes.
        residual: whether KID keeps `R`; without it `Y = P^T P`.
        relative_damping: see above. Default False.
        **kwargs: `RowStatistics`'.
    """

    several_calls = False
    merges_together = True
    sizes = ("batch_size", "rank")

    def __init__(
        self,
        rank: int,
        batch_size: int,
        losses_per_example: float = 1,
        mode: str = "both",
        sampling: str = "priority",
        power: float = 2.0,
        residual: bool = True,
        relative_damping: bool = False,
        **kwargs: Any,
    ) -> None:
        self.relative_damping = relative_damping
        super().__init__(batch_size, losses_per_example, **kwargs)
        self.rank = schedules.check_count("rank", rank)
        self.mode, self.sampling, self.power, self.residual = mode, sampling, float(power), residual

    def create(self, geometry: Any, dtype: str) -> list[Variable]:
        return [
            *self._add_rows(geometry, self.rank, dtype),
            self._add("row_weights", (geometry.groups, self.rank, self.rank), "zeros", dtype),
            self._add("row_damping", (geometry.groups,), "ones", dtype),
        ]

    def create_controls(self) -> list[Variable]:
        self.damping = self._add("damping", (), "ones", "float32")
        return [self.damping, self.create_draw()]

    def merge(
        self,
        averages: Sequence[Tensor],
        observed: Sequence[Tensor],
        controls: Sequence[Tensor],
        finite: Tensor,
        gate: Tensor,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        a, g = (ops.where(finite, rows, ops.zeros_like(rows)) for rows in observed)
        damping, draw = controls
        alpha = ops.cast(damping, a.dtype) * ops.ones_like(a[:, 0, 0])
        if self.relative_damping:
            alpha = alpha * kernel.mean_eigenvalues(a, g)

        def interpolated() -> tuple[Tensor, Tensor, Tensor]:
            return self.interpolated(a, g, alpha)

        def sampled() -> tuple[Tensor, Tensor, Tensor]:
            return self.sampled(a, g, draw)

        if self.mode == "both":
            chosen = ops.cond(gate > (KIS + KID) / 2, interpolated, sampled)
        else:
            chosen = interpolated() if self.mode == "kid" else sampled()
        return [*chosen, alpha], self.next_controls(controls)

    def next_controls(self, controls: Sequence[Tensor]) -> Sequence[Tensor]:
        damping, draw = controls
        return [damping, self.next_draw(draw)]

    def interpolated(self, a: Tensor, g: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """KID of the rows `a` and `g` with the damping `alpha`, `[groups]`: `As`, `Gs` and `Y`."""
        q = kernel.kernel_matrix(a, g)
        chosen, combinations, residual = interpolative.interpolative_decomposition(q, self.rank)
        weighted = combinations
        if self.residual:
            scale = ops.reshape(alpha, (-1, 1, 1))
            identity = ops.eye(q.shape[-1], dtype=q.dtype) + ops.zeros_like(q)
            weighted = scale * backend.matmul(
                inverse.damped_inverse(residual, alpha, identity / scale, "cholesky"), combinations
            )
        weights = backend.matmul(combinations, weighted, transpose_a=True)
        return backend.rows_at(a, chosen), backend.rows_at(g, chosen), symmetric.symmetrize(weights)

    def sampled(self, a: Tensor, g: Tensor, draw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """KIS of the rows `a` and `g`: `As`, `Gs` and `Y`."""
        count = self.rank if self.sampling == "replacement" else self.batch_size
        uniform = self.uniform(draw, (a.shape[0], count), backend.dtype_name(a))
        chosen, weights = sampling.draw(sampling.importance(a, g, self.power), self.rank, uniform, self.sampling)
        identity = ops.eye(self.rank, dtype=a.dtype) + ops.zeros_like(a[:, : self.rank, :1])
        scaled = backend.rows_at(g, chosen) * ops.expand_dims(ops.sqrt(weights), 2)
        return backend.rows_at(a, chosen), scaled, identity

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "rank": self.rank,
            "mode": self.mode,
            "sampling": self.sampling,
            "power": self.power,
            "residual": self.residual,
            "relative_damping": self.relative_damping,
        }
