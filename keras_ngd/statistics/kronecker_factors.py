"""Kronecker factors of a layer's Fisher block."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd import backend, schedules
from keras_ngd.linalg import symmetric
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import Config, Tensor, Variable

WEIGHT_SHARING = ("expand", "reduce")


@keras.saving.register_keras_serializable("keras_ngd")
class KroneckerStatistics(Statistics):
    """The factors `A` (inputs) and `G` (gradients) of a layer's Fisher block `F ~ A (x) G`.

    With `a` the rows of the input (a one appended if there is a bias), `g` the gradient of the mean loss with respect to
    the pre-activation, and `N` the number of loss values averaged:

        expand:  A = mean over rows of a a^T,                  G = N * sum over rows of g g^T
        reduce:  A = mean over examples of abar abar^T,        G = N * sum over examples of gsum gsum^T
                 with abar the mean, gsum the sum over an example's positions

    (Martens & Grosse 2015; Grosse & Martens 2016 for convolutions, whose Omega (x) Gamma is `expand`; Eschenhagen et
    al. 2023 for the two treatments of shared weights.) Rows hidden by a mask do not count in `A`. A layer called
    several times per step has the mean over the calls of `A` and `N` times the sum of `g g^T`.

    Args:
        weight_sharing: `"expand"` (default) or `"reduce"`.
        losses_per_example: `N` is the batch size times this. Default 1, right for one loss value per example; set the
            number of positions for a loss averaged over positions too.
        statistics_fraction: in (0, 1], the leading share of each batch's examples that is observed (at least one).
            Batches are shuffled, so the factors stay unbiased; their cost falls with it. Default 1.
    """

    def __init__(
        self,
        weight_sharing: str = "expand",
        losses_per_example: float = 1,
        statistics_fraction: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if weight_sharing not in WEIGHT_SHARING:
            raise ValueError(f"`weight_sharing` must be one of {WEIGHT_SHARING}. Received: {weight_sharing!r}")
        losses_per_example = schedules.check_positive_number("losses_per_example", losses_per_example)
        if not schedules.is_number(statistics_fraction) or not 0 < statistics_fraction <= 1:
            raise ValueError(f"`statistics_fraction` must be in (0, 1]. Received: {statistics_fraction!r}")
        super().__init__(**kwargs)
        self.weight_sharing = weight_sharing
        self.losses_per_example = losses_per_example
        self.statistics_fraction = float(statistics_fraction)

    def create(self, geometry: Any, dtype: str) -> list[Variable]:
        groups, inputs, outputs = geometry.groups, geometry.input_dim, geometry.output_dim
        self.input_factor = self._add("input_factor", (groups, inputs, inputs), "zeros", dtype)
        self.output_factor = self._add("output_factor", (groups, outputs, outputs), "zeros", dtype)
        return [self.input_factor, self.output_factor]

    @property
    def input_parts(self) -> int:
        """How many of the averages are about the inputs; the others are about the gradients."""
        return 1

    def observe(
        self, geometry: Any, x: Tensor, ds: Tensor, weights: Tensor | None, controls: Sequence[Tensor], dtype: str
    ) -> tuple[Sequence[Tensor], Tensor]:
        x, ds, weights, divisor = self.leading(x, ds, weights, dtype)
        x, ds = ops.cast(x, dtype), ops.cast(ds, dtype)
        if self.weight_sharing == "expand":
            a, g = self._expanded(geometry, x, ds, weights)
        else:
            means, sums = geometry.input_means(x, weights), geometry.gradient_sums(ds)
            a, g = self._of_rows(geometry, means, sums)
            a = [t / ops.cast(ops.shape(means)[1], dtype) for t in a]
        observed = [*a, *(t * divisor for t in g)]
        return observed, sum(symmetric.checksum(t) for t in observed)

    def leading(
        self, x: Tensor, ds: Tensor, weights: Tensor | None, dtype: str
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The examples that are observed, and what their sums are multiplied with."""
        examples = ops.cast(ops.shape(x)[0], dtype)
        divisor = examples * self.losses_per_example
        if self.statistics_fraction < 1:
            kept = ops.maximum(ops.cast(ops.floor(examples * self.statistics_fraction), "int32"), 1)
            kept = kept if x.shape[0] is None else max(int(x.shape[0] * self.statistics_fraction), 1)
            x, ds = x[:kept], ds[:kept]
            weights = None if weights is None else weights[:kept]
            divisor = divisor * examples / ops.cast(kept, dtype)
        return x, ds, weights, divisor

    def _expanded(
        self, geometry: Any, x: Tensor, ds: Tensor, weights: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Lists of what is averaged about the inputs and about the gradients, all positions being rows."""
        a, g = geometry.second_moments(x, ds, weights)
        return [a], [g]

    def _of_rows(self, geometry: Any, a: Tensor, g: Tensor) -> Sequence[list[Tensor]]:
        """The same as sums over rows `[groups, n, input_dim]` and `[groups, n, output_dim]`."""
        return [backend.matmul(a, a, transpose_a=True)], [backend.matmul(g, g, transpose_a=True)]

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "weight_sharing": self.weight_sharing,
            "losses_per_example": self.losses_per_example,
            "statistics_fraction": self.statistics_fraction,
        }
