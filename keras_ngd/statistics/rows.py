"""One row per example: what a layer saw of it, and what the loss said about what came out."""

import keras
from keras import ops

from keras_ngd import backend, schedules
from keras_ngd.statistics.statistics import Statistics


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

    Args:
        batch_size: int, how many rows there is room for.
        losses_per_example: `N` is the batch size times this. Default 1.
    """

    def __init__(self, batch_size, losses_per_example=1, **kwargs):
        self.batch_size = schedules.check_count("batch_size", batch_size)
        self.losses_per_example = schedules.check_positive_number("losses_per_example", losses_per_example)
        super().__init__(**kwargs)

    adds_up = False

    def create(self, rows, dtype):
        return self._add_rows(rows, self.batch_size, dtype)

    def _add_rows(self, rows, count, dtype):
        return [
            self._add("input_rows", (rows.groups, count, rows.input_dim), "zeros", dtype),
            self._add("gradient_rows", (rows.groups, count, rows.output_dim), "zeros", dtype),
        ]

    def check(self, rows, x):
        if x.shape[0] is not None and x.shape[0] > self.batch_size:
            path = self.owner().path
            raise ValueError(
                f"Layer {path!r} sees {x.shape[0]} examples in a batch, but was captured for {self.batch_size}. Set the "
                "optimizer's `batch_size` to the batch size you train with and capture again, or leave the layer out: "
                f"`skip=[{path!r}]`."
            )

    def _checked(self, x, ds):
        """`x` and `ds` as they are, of no more examples than there is room for, where their number is known only now."""
        if x.shape[0] is not None:
            return x, ds
        message = (
            f"A batch has more examples than the optimizer's `batch_size`, {self.batch_size}: set it to the size you train with "
            "and capture again."
        )
        return backend.check_at_most(ops.shape(x)[0], self.batch_size, message, (x, ds))

    def observe(self, rows, x, ds, weights, controls, dtype):
        x, ds = self._checked(x, ds)
        divisor = ops.cast(ops.shape(x)[0], dtype) * self.losses_per_example
        x, ds = ops.cast(x, dtype), ops.cast(ds, dtype)
        a, g = rows.input_means(x, weights), ops.sqrt(divisor) * rows.gradient_sums(ds)
        observed = [filled_up(a, self.batch_size), filled_up(g, self.batch_size)]
        return observed, sum(ops.sum(t) for t in observed)

    def merge(self, averages, observed, controls, finite, gate):
        return observed, controls

    def get_config(self):
        return {
            **super().get_config(),
            "batch_size": self.batch_size,
            "losses_per_example": self.losses_per_example,
        }


def filled_up(rows, count):
    """`[groups, n, d]` as `[groups, count, d]`, with rows of zeros."""
    if rows.shape[1] == count:
        return rows
    missing = count - (rows.shape[1] if rows.shape[1] is not None else ops.shape(rows)[1])
    return ops.reshape(ops.pad(rows, [(0, 0), (0, missing), (0, 0)]), (rows.shape[0], count, rows.shape[2]))
