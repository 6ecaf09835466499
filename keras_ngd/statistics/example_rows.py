"""One row per example: what a layer saw of it, and what the loss said about what came out."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ngd import backend, schedules
from keras_ngd.fisher import sampled_rows
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import Config, Store, Tensor, Variable


@keras.saving.register_keras_serializable("keras_ngd")
class RowStatistics(Statistics):
    """The rows `a` and `g` of a batch, one of each per example.

    Of an example `j` whose layer sees the inputs `a_jt` (a one appended if there is a bias) at positions `t`, with gradients
    `g_jt` of the mean loss with respect to the pre-activation:

        a_j = mean over t of a_jt,      g_j = sqrt(N) * sum over t of g_jt,

    `N` being the number of loss values averaged. Then the Fisher block is about `sum over j of (a_j (x) g_j) (a_j (x)
    g_j)^T`: the empirical Fisher matrix itself for layers with one position, HyLo's eq. 11 for convolutions (which sums
    both `a` and `g`, and is too large by the squared number of positions). Nothing is averaged over batches: rows are those
    of the last batch recorded. Rows that a batch lacks are zero, which contributes nothing.

    Of a batch larger than there is room for, the leading examples are recorded, with `g_j` times the square root of how many
    times as many there are: batches are shuffled, so the sum stays unbiased.

    Args:
        batch_size: int, how many rows there is room for.
        losses_per_example: `N` is the batch size times this. Default 1.
        strict: whether a batch larger than that is an error instead. Default True.
    """

    def __init__(self, batch_size: int, losses_per_example: float = 1, strict: bool = True, **kwargs: Any) -> None:
        self.batch_size = schedules.check_count("batch_size", batch_size)
        self.strict = strict
        # Whether the room is that of a checkpoint, whose rows it is for.
        self.loaded = False
        self.losses_per_example = schedules.check_positive_number("losses_per_example", losses_per_example)
        super().__init__(**kwargs)

    adds_up = False

    def create(self, geometry: Any, dtype: str) -> list[Variable]:
        return self._add_rows(geometry, self.batch_size, dtype)

    def _add_rows(self, geometry: Any, count: int, dtype: str) -> list[Variable]:
        return [
            self._add("input_rows", (geometry.groups, count, geometry.input_dim), "zeros", dtype),
            self._add("gradient_rows", (geometry.groups, count, geometry.output_dim), "zeros", dtype),
        ]

    def check(self, geometry: Any, x: Tensor) -> None:
        if not self.strict or x.shape[0] is None:
            return
        count = x.shape[0] if self.sampled_fraction is None else sampled_rows.observed(x, self.sampled_fraction)[0]
        if count > self.batch_size:
            path = self.owner().path
            raise ValueError(
                f"Layer {path!r} sees {count} examples in a batch, but was captured for {self.batch_size}. Set the "
                "optimizer's `batch_size` to the batch size you train with and capture again, or leave the layer out: "
                f"`skip=[{path!r}]`."
            )

    def _within_capacity(
        self, x: Tensor, ds: Tensor, weights: Tensor | None, dtype: str
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """What there is room for of `x`, `ds` and `weights`, and `N`, times what the rest of the batch is to the part."""
        if self.strict:
            x, ds = self._checked(x, ds)
        examples = ops.cast(ops.shape(x)[0], dtype)
        divisor = examples * self.losses_per_example
        if not self.strict and (x.shape[0] is None or x.shape[0] > self.batch_size):
            x, ds = x[: self.batch_size], ds[: self.batch_size]
            weights = None if weights is None else weights[: self.batch_size]
            divisor = divisor * (examples / ops.cast(ops.maximum(ops.shape(x)[0], 1), dtype))
        return ops.cast(x, dtype), ops.cast(ds, dtype), weights, divisor

    def _checked(self, x: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
        """`x` and `ds` as they are, of no more examples than there is room for, where their number is known only now."""
        if x.shape[0] is not None:
            return x, ds
        message = (
            f"A batch has more examples than the optimizer's `batch_size`, {self.batch_size}: set it to the size you train with "
            "and capture again."
        )
        return backend.check_at_most(ops.shape(x)[0], self.batch_size, message, (x, ds))

    def observe(
        self, geometry: Any, x: Tensor, ds: Tensor, weights: Tensor | None, controls: Sequence[Tensor], dtype: str
    ) -> tuple[Sequence[Tensor], Tensor]:
        x, ds, weights, divisor = self._within_capacity(x, ds, weights, dtype)
        a, g = geometry.input_means(x, weights), ops.sqrt(divisor) * geometry.gradient_sums(ds)
        observed = [filled_up(a, self.batch_size), filled_up(g, self.batch_size)]
        return observed, sum(ops.sum(t) for t in observed)

    def merge(
        self,
        averages: Sequence[Tensor],
        observed: Sequence[Tensor],
        controls: Sequence[Tensor],
        finite: Tensor,
        gate: Tensor,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return observed, controls

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "batch_size": self.batch_size,
            "losses_per_example": self.losses_per_example,
            **({} if self.strict else {"strict": False}),
        }

    # What the weights' shapes depend on besides the layer.
    sizes: tuple[str, ...] = ("batch_size",)

    def resize(self, sizes: Sequence[int]) -> None:
        """Makes all weights anew, for other values of the attributes `sizes`."""
        if sizes != [getattr(self, name) for name in self.sizes]:
            for name, size in zip(self.sizes, sizes, strict=True):
                setattr(self, name, int(size))
            self.recreate()

    def save_own_variables(self, store: Store) -> None:
        super().save_own_variables(store)
        store["capacity"] = np.array([getattr(self, name) for name in self.sizes], "int32")

    def load_own_variables(self, store: Store) -> None:
        saved = {key: store[key] for key in store.keys()}
        capacity = saved.pop("capacity", None)
        if capacity is not None and not self.strict:
            self.resize([int(size) for size in capacity])
            self.loaded = True
        super().load_own_variables(saved)


def filled_up(rows: Tensor, count: int) -> Tensor:
    """`[groups, n, d]` as `[groups, count, d]`, with rows of zeros."""
    if rows.shape[1] == count:
        return rows
    missing = count - (rows.shape[1] if rows.shape[1] is not None else ops.shape(rows)[1])
    return ops.reshape(ops.pad(rows, [(0, 0), (0, missing), (0, 0)]), (rows.shape[0], count, rows.shape[2]))
