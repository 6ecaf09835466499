"""Bases in which the factors of Fisher blocks are diagonal, of all layers of one shape at once: what methods in them share."""

from collections.abc import Sequence
from typing import Self

from keras import ops

from keras_ngd.curvature.curvature import Slot, where_chosen
from keras_ngd.curvature.parts import PartsCurvature
from keras_ngd.linalg import diagonal, orthogonal_iteration
from keras_ngd.linalg.batching import batched_by_size
from keras_ngd.typing import Parts, Tensor


class EigenbasisCurvature(PartsCurvature):
    """Base of curvatures of `k` blocks whose gradients are rotated into the eigenbases `QA`, `QG` of both factors.

    The state begins with the bases: for each part of the input and then of the output dimension `[k, count, size, size]`, of the
    diagonal blocks of `A` and of `G`. Parts of size 1 have no basis: they are what they are. A refresh follows the factors, as
    `linalg.orthogonal_iteration.renewed` says; then comes `[k]`, how often one of a block's bases could not be renewed.

    Args:
        count: `k`.
        input_parts, output_parts: as `linalg.diagonal.partition` gives them.
        dtype: of the factors.
        decomposition: `"qr"`, one step of orthogonal iteration (but for the first basis), or `"eigh"`.
        tolerance: a basis stays while `|offdiag(Q^T F Q)| <= tolerance |F|`.
    """

    symmetric = False

    def __init__(
        self,
        count: int,
        input_parts: Parts,
        output_parts: Parts,
        dtype: str,
        decomposition: str = "qr",
        tolerance: float = 0.0,
    ) -> None:
        self.count, self.sides, self.dtype = count, (tuple(input_parts), tuple(output_parts)), dtype
        self.decomposition, self.tolerance = decomposition, tolerance

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of the gradients."""
        return self.count, diagonal.dimension(self.sides[0]), diagonal.dimension(self.sides[1])

    @property
    def suffix(self) -> str:
        """Of the names of variables."""
        return "_".join(map(str, self.shape[1:]))

    @property
    def slots(self) -> tuple[Slot, ...]:
        bases = (
            Slot(f"{side}_basis_{i}_{self.suffix}", (self.count, count, size, size), diagonal.identities, self.dtype)
            for side, parts in zip(("input", "output"), self.sides, strict=True)
            for i, (count, size) in enumerate(parts)
            if size > 1
        )
        return (*bases, Slot(f"failed_bases_{self.suffix}", (self.count,), "zeros", self.dtype), *self.own_slots)

    @property
    def own_slots(self) -> tuple[Slot, ...]:
        """The tensors of the state besides bases and failures."""
        return ()

    @property
    def with_bases(self) -> list[int]:
        """Which parts have a basis, by their numbers among all parts, the input's first."""
        return [i for i, (_, size) in enumerate(self.parts) if size > 1]

    @property
    def refresh_cost(self) -> float:
        return self.count * sum(count * size**3 for count, size in self.parts if size > 1)

    def failures(self, state: Sequence[Tensor]) -> Tensor:
        """`[k]`, how often one of each block's bases could not be renewed."""
        return state[len(self.with_bases)]

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
        work = []
        for curvature, blocks, state in zip(curvatures, inputs, states, strict=True):
            for part, basis in zip(curvature.with_bases, state, strict=False):
                block = blocks[part]
                none = ops.zeros((block.shape[0] * block.shape[1],), curvature.dtype)
                work.append([ops.reshape(t, (-1, *t.shape[2:])) for t in (block, basis)] + [none])

        def renewed(factors: Tensor, bases: Tensor, failures: Tensor) -> Sequence[Tensor]:
            return orthogonal_iteration.renewed(
                factors, bases, failures, curvatures[0].decomposition, curvatures[0].tolerance
            )

        found, new = iter(batched_by_size(renewed, work)), []
        for curvature, blocks, state in zip(curvatures, inputs, states, strict=True):
            bases, failures = [], curvature.failures(state)
            for old in state[: len(curvature.with_bases)]:
                basis, failed = next(found)
                bases.append(ops.reshape(basis, old.shape))
                failures = failures + ops.sum(ops.reshape(failed, old.shape[:2]), axis=1)
            new.append([*bases, failures, *curvature.refreshed_rest(blocks, state, bases)])
        return where_chosen(chosen, new, states)

    def refreshed_rest(
        self, blocks: Sequence[Tensor], state: Sequence[Tensor], bases: Sequence[Tensor]
    ) -> list[Tensor]:
        """What replaces the rest of what refreshes renew.

        Args:
            blocks: the inputs of the refresh.
            state: what refreshes renew of the state, as it was.
            bases: those that begin the new one.
        """
        return []

    def changed(self, state: Sequence[Tensor], bases: Sequence[Tensor]) -> Tensor:
        """`[k]`, whether one of a block's bases is another than that in the old state."""
        found = [ops.any(ops.not_equal(new, old), axis=(1, 2, 3)) for new, old in zip(bases, state, strict=False)]
        return ops.any(ops.stack(found), axis=0)

    # Rotations

    def _bases(self, state: Sequence[Tensor]) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """By side and part; None where there is none."""
        by_part = dict(zip(self.with_bases, state, strict=False))
        return self.divide([by_part.get(i) for i in range(len(self.parts))])

    def rotated(self, v: Tensor, state: Sequence[Tensor]) -> Tensor:
        """`QA^T V QG` of gradients `[k, input_dim, output_dim]`."""
        a, g = self._bases(state)
        return self._from_right(self._from_left(a, v, True), g, False)

    def rotated_back(self, v: Tensor, state: Sequence[Tensor]) -> Tensor:
        """`QA V QG^T`."""
        a, g = self._bases(state)
        return self._from_right(self._from_left(a, v, False), g, True)

    def _from_left(self, bases: Sequence[Tensor | None], v: Tensor, transpose: bool) -> Tensor:
        if all(basis is None for basis in bases):
            return v
        return diagonal.multiply(bases, v, self.sides[0], transpose)

    def _from_right(self, v: Tensor, bases: Sequence[Tensor | None], transpose: bool) -> Tensor:
        if all(basis is None for basis in bases):
            return v
        return diagonal.multiply_right(v, bases, self.sides[1], transpose)
