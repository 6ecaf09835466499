"""Diagonal blocks of the Kronecker factors of a layer's Fisher block."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_ngd import schedules
from keras_ngd.linalg import diagonal
from keras_ngd.statistics.kronecker_factors import KroneckerStatistics
from keras_ngd.typing import Config, Parts, Tensor, Variable


@keras.saving.register_keras_serializable("keras_ngd")
class SplitStatistics(KroneckerStatistics):
    """The diagonal blocks of the factors `A` and `G`, and nothing else of them (THOR, eq. 10).

    Inputs and outputs are cut into blocks of `split`, the last one smaller where `split` does not divide; a bias is a
    block of its own. A factor no larger than `split` stays whole. Work and memory fall from `d^2` to `d split`.

    Args:
        split: int of at least 1, the size of the blocks; None leaves the factors whole.
        **kwargs: `KroneckerStatistics`'.
    """

    def __init__(
        self,
        split: int | None,
        weight_sharing: str = "expand",
        losses_per_example: float = 1,
        statistics_fraction: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(weight_sharing, losses_per_example, statistics_fraction, **kwargs)
        self.split = schedules.check_split("split", split)

    def partitions(self, geometry: Any) -> tuple[Parts, Parts]:
        """The parts of the input and of the output dimension."""
        return geometry.partitions(self.split)

    @property
    def input_parts(self) -> int:
        return len(self.partitions(self.geometry)[0])

    def create(self, geometry: Any, dtype: str) -> list[Variable]:
        return [
            self._add(f"{side}_blocks_{i}", (geometry.groups, count, size, size), "zeros", dtype)
            for side, parts in zip(("input", "output"), self.partitions(geometry), strict=True)
            for i, (count, size) in enumerate(parts)
        ]

    def _expanded(
        self, geometry: Any, x: Tensor, ds: Tensor, weights: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        return geometry.factor_blocks(x, ds, self.partitions(geometry), weights)

    def _of_rows(self, geometry: Any, a: Tensor, g: Tensor) -> Sequence[list[Tensor]]:
        return [diagonal.gram_blocks(*side) for side in zip((a, g), self.partitions(geometry), strict=True)]

    def get_config(self) -> Config:
        return {**super().get_config(), "split": self.split}
