"""The Kronecker-factored Fisher block with its factors given by rows, of all layers of one shape at once."""

from collections.abc import Callable, Iterable, Sequence
from typing import Self

from keras import ops

from keras_ngd import backend
from keras_ngd.curvature.curvature import Slot, TracedCurvature, where_chosen
from keras_ngd.curvature.kronecker import factor_dampings
from keras_ngd.linalg import inverse
from keras_ngd.linalg.batching import batched_by_size
from keras_ngd.linalg.diagonal import identities
from keras_ngd.typing import Shape, Tensor


class WoodburyCurvature(TracedCurvature):
    """Damped inverse Kronecker factors of `k` blocks of one shape, those of rows by Woodbury's identity.

        P = (A + dA I)^-1 V (G + dG I)^-1,       (X^T X + d I)^-1 V = (V - X^T (X X^T + d I)^-1 X V) / d

    A factor's state is the inverse of the smaller matrix, `X X^T + d I`, `[k, n, n]`, and `d`, `[k]`; the rows `X` are
    its inputs and stay where they are. Of a factor that is an input itself it is the damped inverse, as in
    `KroneckerCurvature`. Before the first refresh P = V; where a refresh fails, so does the factor's part in it.

    Args:
        count: `k`.
        sides: for the input and the output side `(n, d)`: the shape of its rows, or `(d, d)` of its factor.
        dtype: of the rows.
        damping_mode: as for `kronecker.factor_dampings`.
    """

    def __init__(self, count: int, sides: Iterable[Shape], dtype: str, damping_mode: str) -> None:
        self.count, self.sides, self.dtype, self.damping_mode = count, tuple(sides), dtype, damping_mode

    @property
    def slots(self) -> tuple[Slot, ...]:
        found = []
        for name, (rows, size) in zip(("input", "output"), self.sides, strict=True):
            initializer = identities if rows == size else "zeros"
            found.append(Slot(f"{name}_inverse_{rows}_{size}", (self.count, rows, rows), initializer, self.dtype))
            found.append(Slot(f"{name}_damping_{rows}_{size}", (self.count,), "ones", self.dtype))
        return tuple(found)

    @property
    def refresh_cost(self) -> float:
        return self.count * sum(rows**2 * (rows + (size if rows < size else 0)) for rows, size in self.sides)

    @property
    def size(self) -> int:
        return self.sides[0][1] * self.sides[1][1]

    def _traces(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The traces of `A` and of `G`, each `[k]`."""
        return [
            backend.trace(side) if rows == size else ops.sum(side * side, axis=(1, 2))
            for side, (rows, size) in zip(inputs, self.sides, strict=True)
        ]

    def trace(self, inputs: Sequence[Tensor]) -> Tensor:
        trace_a, trace_g = self._traces(inputs)
        return trace_a * trace_g

    def dampings(self, inputs: Sequence[Tensor], damping: Tensor) -> tuple[Tensor, Tensor]:
        """`dA` and `dG`, each `[k]`."""
        means = [trace / size for trace, (_, size) in zip(self._traces(inputs), self.sides, strict=True)]
        return factor_dampings(means[0], means[1], damping, self.damping_mode)

    def precondition(
        self, v: Tensor, damping: Tensor, state: Sequence[Tensor], inputs: Callable[[], Sequence[Tensor]]
    ) -> Tensor:
        (inverse_a, damping_a, inverse_g, damping_g), (x, y) = state, inputs()
        if self.sides[0][0] == self.sides[0][1]:
            v = backend.matmul(inverse_a, v)
        else:
            inner = backend.matmul(inverse_a, backend.matmul(x, v))
            v = (v - backend.matmul(x, inner, transpose_a=True)) / ops.reshape(damping_a, (-1, 1, 1))
        if self.sides[1][0] == self.sides[1][1]:
            return backend.matmul(v, inverse_g)
        inner = backend.matmul(backend.matmul(v, y, transpose_b=True), inverse_g)
        return (v - backend.matmul(inner, y)) / ops.reshape(damping_g, (-1, 1, 1))

    @classmethod
    def refresh_all(
        cls,
        curvatures: Sequence[Self],
        inputs: Sequence[Sequence[Tensor]],
        damping: Tensor,
        states: Sequence[Sequence[Tensor]],
        chosen: Sequence[Tensor] | None = None,
    ) -> list[list[Tensor]]:
        """As `Curvature.refresh_all`; inputs are the rows, or the factor, of the input and of the output side."""
        work, sides = [], [side for curvature in curvatures for side in curvature.sides]
        for curvature, of_curvature in zip(curvatures, inputs, strict=True):
            dampings = curvature.dampings(of_curvature, damping)
            for side, of_side, (rows, size) in zip(of_curvature, dampings, curvature.sides, strict=True):
                matrix = side if rows == size else backend.matmul(side, side, transpose_b=True)
                work.append([matrix, of_side])
        found = []
        for (rows, size), (inverses, dampings, failed) in zip(sides, batched_by_size(_inverses, work), strict=True):
            if rows == size:
                eye = ops.eye(rows, dtype=backend.dtype_name(inverses))
                inverses = ops.where(ops.reshape(failed, (-1, 1, 1)), eye, inverses)
            found += [inverses, dampings]
        new = [found[i : i + 4] for i in range(0, len(found), 4)]
        return where_chosen(chosen, new, states)


def _inverses(matrices: Tensor, dampings: Tensor) -> list[Tensor]:
    """Damped inverses, what they are divided by, and where they failed."""
    # Nothing to fall back on: the rows of the last inverse are gone. Then a factor counts as the identity.
    inverses = inverse.damped_inverse(matrices, dampings)
    failed = ops.all(inverses == 0, axis=(1, 2))
    return [inverses, ops.where(failed, ops.ones_like(dampings), dampings), failed]
