"""Fisher blocks of scales and offsets, feature by feature."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd import schedules
from keras_ngd.linalg import symmetric
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import Config, Tensor, Variable


@keras.saving.register_keras_serializable("keras_ngd")
class UnitWiseStatistics(Statistics):
    """The Fisher block of the scale and the offset of each feature (SP-NGD's unit-wise Fisher).

    Of an example `n` with gradients `g_nt` of the mean loss at positions `t`, and normalized inputs `xhat_nt`,

        u_n = (sum over t of g_nt xhat_nt, sum over t of g_nt),        F = N * sum over n of u_n u_n^T

    for each feature, `N` being the number of loss values averaged; without one of the two parameters, the other's entry alone.
    (Osawa et al. 2019, section 4.2.) A layer called several times per step has `N` times the sum over all calls.

    Args:
        losses_per_example: `N` is the batch size times this. Default 1.
    """

    def __init__(self, losses_per_example: float = 1, **kwargs: Any) -> None:
        self.losses_per_example = schedules.check_positive_number("losses_per_example", losses_per_example)
        super().__init__(**kwargs)

    # How many of the averages are about inputs alone.
    input_parts = 0

    def create(self, geometry: Any, dtype: str) -> list[Variable]:
        size = geometry.input_dim
        return [self._add("unit_blocks", (1, geometry.output_dim, size, size), "zeros", dtype)]

    def observe(
        self, geometry: Any, x: Tensor, ds: Tensor, weights: Tensor | None, controls: Sequence[Tensor], dtype: str
    ) -> tuple[Sequence[Tensor], Tensor]:
        u = geometry.unit_rows(ops.cast(x, dtype), ops.cast(ds, dtype), weights)
        divisor = ops.cast(ops.shape(x)[0], dtype) * self.losses_per_example
        blocks = ops.sum(ops.expand_dims(u, 0) * ops.expand_dims(u, 1), axis=2)
        observed = divisor * ops.transpose(blocks, (2, 0, 1))
        return [ops.expand_dims(observed, 0)], symmetric.checksum(observed)

    def get_config(self) -> Config:
        return {**super().get_config(), "losses_per_example": self.losses_per_example}
