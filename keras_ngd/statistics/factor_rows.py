"""Kronecker factors as the rows that they are made of."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd import backend, schedules
from keras_ngd.statistics.draws import Draws
from keras_ngd.statistics.emission import mixed
from keras_ngd.statistics.example_rows import RowStatistics, filled_up
from keras_ngd.typing import Config, Tensor, Variable

CONVOLUTIONS = ("reduce", "subsample")


@keras.saving.register_keras_serializable("keras_ngd")
class WoodburyStatistics(Draws, RowStatistics):
    """Rows `X` and `Y` with `A = X^T X` and `G = Y^T Y`: the Kronecker factors of a batch (SKFAC).

    Of a layer with one position, `X` has the rows `a / sqrt(n)` and `Y` the rows `sqrt(N) g`. Of others,

        reduce:     one row per example, the mean over its positions of `a` and the sum of `g` ("Reduce Sum")
        subsample:  `positions` of a convolution's T output positions, drawn anew for each example and batch, all of them
                    rows, `G` scaled by T / positions ("Spatial Subsampling"); with all T positions, KFAC's "expand"

    so that `A` and `G` are KFAC's, or unbiased estimates of them. A factor with no fewer rows than columns is kept itself,
    `[d, d]`, in place of its rows.

    With `history` the rows of the last batches stay as well, those of age `k` with weight proportional to `decay^k`, the
    weights summing to 1; factors kept themselves are running averages of all batches.

    Controls: `draw`, see `Draws`.

    Args:
        batch_size, losses_per_example: as for `RowStatistics`.
        convolution: `"reduce"` or `"subsample"`.
        positions: int, for `"subsample"`.
        history: int of at least 1, how many batches.
        decay: in (0, 1), for a history of more than one.
    """

    several_calls = False

    def __init__(
        self,
        batch_size: int,
        losses_per_example: float = 1,
        convolution: str = "reduce",
        positions: int = 4,
        history: int = 1,
        decay: float = 0.95,
        **kwargs: Any,
    ) -> None:
        if convolution not in CONVOLUTIONS:
            raise ValueError(f"`convolution` must be one of {CONVOLUTIONS}. Received: convolution={convolution!r}")
        super().__init__(batch_size, losses_per_example, **kwargs)
        self.convolution, self.decay = convolution, float(decay)
        self.positions = schedules.check_count("positions", positions)
        self.history = schedules.check_count("history", history)

    def _samples(self, geometry: Any) -> bool:
        return self.convolution == "subsample" and hasattr(geometry, "rows_at")

    def batch_rows(self, geometry: Any) -> int:
        """Rows of one batch."""
        return self.batch_size * (self.positions if self._samples(geometry) else 1)

    def keeps_rows(self, geometry: Any) -> tuple[bool, bool]:
        """For the input's and the gradient's side: whether its rows are kept rather than its factor."""
        count = self.history * self.batch_rows(geometry)
        return count < geometry.input_dim, count < geometry.output_dim

    def create(self, geometry: Any, dtype: str) -> list[Variable]:
        weights = []
        for name, size, as_rows in zip(
            ("input", "gradient"), (geometry.input_dim, geometry.output_dim), self.keeps_rows(geometry), strict=True
        ):
            count = self.history * self.batch_rows(geometry) if as_rows else size
            kind = "rows" if as_rows else "factor"
            weights.append(self._add(f"{name}_{kind}", (geometry.groups, count, size), "zeros", dtype))
        if self.history > 1:
            weights.append(self._add("history_weights", (self.history,), "zeros", dtype))
        return weights

    def create_controls(self) -> list[Variable]:
        return [self.create_draw()]

    def observe(
        self, geometry: Any, x: Tensor, ds: Tensor, weights: Tensor | None, controls: Sequence[Tensor], dtype: str
    ) -> tuple[Sequence[Tensor], Tensor]:
        if self._samples(geometry):
            a, g = self._sampled(geometry, ops.cast(x, dtype), ops.cast(ds, dtype), controls[0], dtype)
        else:
            (a, g), _ = super().observe(geometry, x, ds, weights, controls, dtype)
            a = a / ops.sqrt(self._recorded(x, dtype))
        observed = []
        for side, as_rows in zip((a, g), self.keeps_rows(geometry), strict=True):
            side = (
                filled_up(side, self.batch_rows(geometry)) if as_rows else backend.matmul(side, side, transpose_a=True)
            )
            observed.append(side)
        return observed, sum(ops.sum(t) for t in observed)

    def _sampled(self, geometry: Any, x: Tensor, ds: Tensor, draw: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
        x, ds, _, divisor = self._within_capacity(x, ds, None, dtype)
        examples, total = ops.shape(x)[0], geometry.outputs(ds)
        static = isinstance(total, int)
        kept = min(self.positions, total) if static else ops.minimum(self.positions, total)
        if not static or kept < total:
            noise = self.uniform(draw, (self.batch_size, total), dtype)
            positions = ops.cast(ops.top_k(noise, kept)[1], "int32")
        else:
            positions = ops.broadcast_to(ops.arange(total, dtype="int32"), (self.batch_size, total))
        a, g = geometry.rows_at(x, ds, positions[:examples])
        examples, total, kept = (ops.cast(n, dtype) for n in (examples, total, kept))
        return a / ops.sqrt(examples * kept), g * ops.sqrt(divisor * total / kept)

    def _recorded(self, x: Tensor, dtype: str) -> Tensor:
        """How many of a batch's examples are recorded."""
        examples = ops.shape(x)[0]
        return ops.cast(examples if self.strict else ops.minimum(examples, self.batch_size), dtype)

    def merge(
        self,
        averages: Sequence[Tensor],
        observed: Sequence[Tensor],
        controls: Sequence[Tensor],
        finite: Tensor,
        gate: Tensor,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        controls = self.next_controls(controls)
        if self.history == 1:
            return observed, controls
        new = []
        for average, value in zip(averages[:2], observed, strict=True):
            if are_rows(average):
                new.append(ops.concatenate([value, average[:, : -value.shape[1]]], axis=1))
            else:
                new.append(mixed(average, value, gate))
        new.append(ops.concatenate([ops.ones_like(averages[2][:1]), self.decay * averages[2][:-1]]))
        return new, controls

    def next_controls(self, controls: Sequence[Tensor]) -> Sequence[Tensor]:
        return [self.next_draw(controls[0])]

    def scaled(self, averages: Sequence[Tensor]) -> Sequence[Tensor]:
        """The two sides, rows with their weights in the history."""
        if self.history == 1:
            return averages[:2]
        weights = averages[2] / ops.maximum(ops.sum(averages[2]), 1e-30)
        weights = ops.reshape(ops.repeat(ops.sqrt(weights), self.batch_rows(self.geometry)), (1, -1, 1))
        return [side * weights if are_rows(side) else side for side in averages[:2]]

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "convolution": self.convolution,
            "positions": self.positions,
            "history": self.history,
            "decay": self.decay,
        }


def are_rows(side: Tensor) -> bool:
    """Whether one side of a layer is kept as rows, of which there are fewer than columns."""
    return side.shape[1] < side.shape[2]
