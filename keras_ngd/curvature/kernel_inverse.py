"""A Fisher block as the sum of a few rank-one terms, `F = U^T U`, of all layers of one shape at once."""

from collections.abc import Callable, Sequence
from typing import Self

from keras import ops

from keras_ngd.curvature.curvature import Curvature, Slot, where_chosen
from keras_ngd.linalg import kernel
from keras_ngd.linalg.batching import batched_by_size
from keras_ngd.typing import Tensor

KERNEL_DAMPING_MODES = ("relative", "absolute")


class KernelCurvature(Curvature):
    """The inverse kernel matrices of `k` blocks of one shape.

    The state is a core `C`, `[k, n, n]`, and the damping it was made with, `[k]`; the rows `a` and `g`, of which each pair
    is a rank-one term, are its inputs and stay where they are. Of rows that stand for themselves,

        C = (U U^T + damping I)^-1,                 P = (V - U^T C U V) / damping = (F + damping I)^-1 V

    (HyLo, eq. 7), and of rows with weights `Y`, which stand for others too, `C = (U U^T + damping Y^-1)^-1` (eq. 8). Before the
    first refresh, and where one fails, P = V.

    Args:
        count: `k`.
        rows: `n`.
        dtype: of the rows.
        row_length: length of a row `a` and a row `g` together, which only the cost of a refresh depends on.
        damping_mode: one of `KERNEL_DAMPING_MODES`: whether the damping of rows without weights is in units of the mean
            eigenvalue of `U U^T`.
    """

    def __init__(self, count: int, rows: int, dtype: str, row_length: int = 0, damping_mode: str = "absolute") -> None:
        self.count, self.rows, self.dtype, self.row_length = count, rows, dtype, row_length
        self.damping_mode = damping_mode

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (
            Slot(f"kernel_inverse_{self.rows}", (self.count, self.rows, self.rows), "zeros", self.dtype),
            Slot(f"kernel_damping_{self.rows}", (self.count,), "ones", self.dtype),
        )

    @property
    def refresh_cost(self) -> float:
        return self.count * self.rows**2 * (self.rows + self.row_length)

    @classmethod
    def refresh_all(
        cls,
        curvatures: Sequence[Self],
        inputs: Sequence[Sequence[Tensor]],
        damping: Tensor,
        states: Sequence[Sequence[Tensor]],
        chosen: Sequence[Tensor] | None = None,
    ) -> list[list[Tensor]]:
        """As `Curvature.refresh_all`; inputs are the rows `a` and `g`, or `a`, `g`, the rows' weights `Y` and their damping."""

        def cores(matrices: Tensor, *others: Tensor) -> list[Tensor]:
            *weights, dampings = others
            core = kernel.interpolated_core(matrices, *others) if weights else kernel.damped_core(matrices, dampings)
            failed = ops.all(core == 0, axis=(1, 2))
            return [core, ops.where(failed, ops.ones_like(dampings), dampings)]

        work = []
        for curvature, (a, g, *weighted) in zip(curvatures, inputs, strict=True):
            if not weighted:
                weighted = [damping_of(a, g, damping, curvature.damping_mode)]
            work.append([kernel.kernel_matrix(a, g), *weighted])
        return where_chosen(chosen, batched_by_size(cores, work), states)

    def precondition(
        self, v: Tensor, damping: Tensor, state: Sequence[Tensor], inputs: Callable[[], Sequence[Tensor]]
    ) -> Tensor:
        core, used = state
        a, g = inputs()[:2]
        return kernel.precondition(a, g, core, used, v)


def damping_of(a: Tensor, g: Tensor, damping: Tensor, mode: str) -> Tensor:
    """The damping of the blocks of rows `a` and `g`, `[k]`, in the units of the blocks."""
    damping = ops.cast(damping, a.dtype)
    return damping * (kernel.mean_eigenvalues(a, g) if mode == "relative" else ops.ones_like(a[:, 0, 0]))
