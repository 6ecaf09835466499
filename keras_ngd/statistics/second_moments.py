"""Second moments of each example's gradient, in the eigenbasis of the factors."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd.linalg import diagonal
from keras_ngd.statistics.factor_blocks import SplitStatistics
from keras_ngd.typing import Tensor, Variable

# Examples are worked on so many at a time that their gradients have this many numbers.
_CHUNK_ENTRIES = 2**21


@keras.saving.register_keras_serializable("keras_ngd")
class SecondMomentStatistics(SplitStatistics):
    """`SplitStatistics`, and the diagonal `S` of the Fisher block in bases that the optimizer gives.

    With `a` the rows of the input, `g` the gradient of the mean loss, and `N` the number of loss values averaged,

        S = N * sum over examples of (QA^T (sum over positions of a g^T) QG) o (same)

    (George et al. 2018): the sum of `S` is the trace of the Fisher block. Of layers that see several positions a few examples are
    taken at a time, with the products of their positions.

    Controls: the bases `QA` and `QG`, for each part of more than one row as the factors' blocks are cut, at first the identity.
    An average is of batches in one basis: who changes a basis is to begin `S` anew.

    Args:
        **kwargs: `SplitStatistics`'.
    """

    def create(self, geometry: Any, dtype: str) -> list[Variable]:
        shape = (geometry.groups, geometry.input_dim * geometry.output_dim, 1)
        self._dtype_of_bases = dtype
        # Not as a matrix: it may be square, and workers send one triangle of what is.
        return [*super().create(geometry, dtype), self._add("second_moment", shape, "zeros", dtype)]

    def create_controls(self) -> list[Variable]:
        geometry, dtype = self.geometry, self._dtype_of_bases
        return [
            self._add(f"{side}_basis_{i}", (geometry.groups, count, size, size), diagonal.identities, dtype)
            for side, parts in zip(("input", "output"), self.partitions(geometry), strict=True)
            for i, (count, size) in enumerate(parts)
            if size > 1
        ]

    def observe(
        self, geometry: Any, x: Tensor, ds: Tensor, weights: Tensor | None, controls: Sequence[Tensor], dtype: str
    ) -> tuple[Sequence[Tensor], Tensor]:
        observed, total = super().observe(geometry, x, ds, weights, controls, dtype)
        x, ds, _, divisor = self.leading(x, ds, None, dtype)
        second = divisor * self._squares(geometry, ops.cast(x, dtype), ops.cast(ds, dtype), controls)
        return [*observed, ops.reshape(second, (geometry.groups, -1, 1))], total + ops.sum(second)

    def _squares(self, geometry: Any, x: Tensor, ds: Tensor, controls: Sequence[Tensor]) -> Tensor:
        """`[groups, input_dim, output_dim]`, summed over the examples."""
        bases, sides = iter(controls), self.partitions(geometry)
        by_side = [[next(bases) if size > 1 else None for _, size in parts] for parts in sides]

        def rotated(rows: Tensor, side: int) -> Tensor:
            """`rows Q` of `[groups, examples, positions, d]`."""
            groups, size = rows.shape[0], rows.shape[-1]
            columns = ops.transpose(ops.reshape(rows, (groups, -1, size)), (0, 2, 1))
            turned = diagonal.multiply(by_side[side], columns, sides[side], transpose=True)
            return ops.reshape(ops.transpose(turned, (0, 2, 1)), ops.shape(rows))

        def of_examples(x: Tensor, ds: Tensor) -> Tensor:
            a, g = rotated(geometry.rows_with_ones(x), 0), rotated(geometry.gradient_rows(ds), 1)
            if a.shape[2] == 1:
                squares = (ops.square(t[:, :, 0]) for t in (a, g))
                return ops.einsum("kni,kno->kio", *squares)
            return ops.sum(ops.square(ops.einsum("knti,knto->knio", a, g)), axis=1)

        if len(ds.shape) == 2:
            return of_examples(x, ds)
        size = geometry.groups * geometry.input_dim * geometry.output_dim
        chunk = max(_CHUNK_ENTRIES // size, 1)
        chunk = chunk if x.shape[0] is None else min(chunk, x.shape[0])
        examples = ops.shape(x)[0]

        def chunks(tensor: Tensor) -> Tensor:
            # What fills up the last one has no gradient.
            tensor = ops.pad(tensor, [(0, -examples % chunk), *[(0, 0)] * (len(tensor.shape) - 1)])
            return ops.reshape(tensor, (-1, chunk, *tensor.shape[1:]))

        x, ds = chunks(x), chunks(ds)

        def unfinished(number: Tensor, squares: Tensor) -> Tensor:
            return number * chunk < examples

        def work(number: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
            return number + 1, squares + of_examples(*(ops.take(t, number, axis=0) for t in (x, ds)))

        none = ops.zeros((geometry.groups, geometry.input_dim, geometry.output_dim), x.dtype)
        return ops.while_loop(unfinished, work, (ops.zeros((), "int32"), none))[1]
