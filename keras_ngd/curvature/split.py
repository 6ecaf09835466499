"""The Kronecker-factored Fisher block whose factors are block diagonal, of all layers of one shape at once."""

from collections.abc import Callable, Sequence
from typing import Self

from keras import ops

from keras_ngd import backend
from keras_ngd.curvature.curvature import Slot
from keras_ngd.curvature.kronecker import factor_dampings, inversion_method
from keras_ngd.curvature.parts import PartsCurvature
from keras_ngd.linalg import diagonal
from keras_ngd.linalg.many_sizes import damped_inverses
from keras_ngd.typing import Parts, Tensor


class SplitCurvature(PartsCurvature):
    """Damped inverses of the diagonal blocks of the factors of `k` Fisher blocks of one shape.

    The state is, for each part of the input and then of the output dimension, `[k, count, size, size]`: the inverses of
    the blocks of `A + dA I` and of `G + dG I` as of the last refresh, and

        P = diag(A1 + dA I, A2 + dA I, ...)^-1 V diag(G1 + dG I, G2 + dG I, ...)^-1 .

    `dA` and `dG` are those of the unsplit factors: the trace of a matrix is that of its diagonal blocks. Before the first
    refresh P = V.

    Args:
        count: `k`.
        input_parts, output_parts: as `linalg.diagonal.partition` gives them.
        dtype: of the factors.
        inverse_method: `"auto"`, `"cholesky"` or `"newton-schulz"`.
        damping_mode: as for `kronecker.factor_dampings`.
        damping_factor: what the damping is multiplied with. Default 1.
    """

    def __init__(
        self,
        count: int,
        input_parts: Parts,
        output_parts: Parts,
        dtype: str,
        inverse_method: str,
        damping_mode: str,
        damping_factor: float = 1.0,
    ) -> None:
        self.count, self.sides, self.dtype = count, (tuple(input_parts), tuple(output_parts)), dtype
        self.inverse_method, self.damping_mode, self.damping_factor = inverse_method, damping_mode, damping_factor

    @property
    def slots(self) -> tuple[Slot, ...]:
        suffix = "_".join(str(diagonal.dimension(side)) for side in self.sides)
        return tuple(
            Slot(f"{side}_inverse_{i}_{suffix}", (self.count, count, size, size), diagonal.identities, self.dtype)
            for side, parts in zip(("input", "output"), self.sides, strict=True)
            for i, (count, size) in enumerate(parts)
        )

    @property
    def refresh_cost(self) -> float:
        return self.count * sum(count * size**3 for count, size in self.parts)

    def dampings(self, factors: Sequence[Tensor], damping: Tensor) -> tuple[Tensor, Tensor]:
        """`dA` and `dG`, each `[k]`."""
        means = [t / diagonal.dimension(s) for t, s in zip(self.traces(factors), self.sides, strict=True)]
        if self.damping_factor != 1:
            damping = damping * self.damping_factor
        return factor_dampings(means[0], means[1], damping, self.damping_mode)

    @classmethod
    def refresh_all(
        cls,
        curvatures: Sequence[Self],
        inputs: Sequence[Sequence[Tensor]],
        damping: Tensor,
        states: Sequence[Sequence[Tensor]],
        chosen: Sequence[Tensor] | None = None,
    ) -> list[list[Tensor]]:
        """As `Curvature.refresh_all`; inputs are the blocks of both factors, `[k, count, size, size]` by part."""
        method, work = inversion_method(curvatures[0].inverse_method), []
        if chosen is None:
            chosen = [ops.ones((curvature.count,), "bool") for curvature in curvatures]
        for curvature, blocks, state, renewed in zip(curvatures, inputs, states, chosen, strict=True):
            of_sides = [
                d for d, side in zip(curvature.dampings(blocks, damping), curvature.sides, strict=True) for _ in side
            ]
            for (count, size), block, side_damping, old in zip(curvature.parts, blocks, of_sides, state, strict=True):
                matrices = [ops.reshape(t, (-1, size, size)) for t in (block, old)]
                repeated = [backend.repeated(values, count) for values in (side_damping, renewed)]
                work.append([matrices[0], repeated[0], matrices[1], repeated[1]])

        found = iter(damped_inverses(work, method))
        return [
            [ops.reshape(next(found), (-1, count, size, size)) for count, size in curvature.parts]
            for curvature in curvatures
        ]

    def precondition(
        self, v: Tensor, damping: Tensor, state: Sequence[Tensor], inputs: Callable[[], Sequence[Tensor]]
    ) -> Tensor:
        a, g = self.divide(state)
        return diagonal.multiply_right(diagonal.multiply(a, v, self.sides[0]), g, self.sides[1])
