"""The loss's own scale: what statistics are multiplied with to be the curvature of the loss that is differentiated."""

import numpy as np
from keras import ops

from keras_ngd import schedules
from keras_ngd.optimizers import compiled_loss


def check_losses_per_example(value):
    """`value` as `"auto"` or a float."""
    if isinstance(value, str) and value == "auto":
        return value
    if not schedules.is_number(value) or not 0 < value < float("inf"):
        raise ValueError(
            f"`losses_per_example` must be a number above 0, or 'auto'. Received: losses_per_example={value!r}"
        )
    return float(value)


class LossRatio:
    """Mixin: reads from the compiled loss how statistics, which take it for a mean over the examples, are to be scaled.

    With `c_j` the coefficient of each single loss value in the total, and `g_j` the gradient of that value,

        the batch's Fisher matrix is     sum over j of c_j g_j g_j^T,
        and statistics hold              B * sum over j of c_j^2 g_j g_j^T

    for a layer that sees `B` examples, so that the trace is right once they are multiplied with

        ratio = (sum over j of c_j) / (B * sum over j of c_j^2).

    That is 1 for a mean over the examples, `T` for a mean over `T` values of each, `1 / B` for a sum, `1 / w` where all have the
    weight `w`. Both sums are averaged over batches with the weights that the statistics are.

    The attribute `losses_per_example` is `"auto"`, or the number that statistics take for it; then there is no ratio.
    """

    losses_per_example = 1.0
    _loss_sums = None
    # Whether a compiled loss was ever heard of.
    heard_losses = False

    @property
    def losses_in_statistics(self):
        """The argument of that name of this optimizer's statistics."""
        return 1 if self.losses_per_example == "auto" else self.losses_per_example

    @property
    def loss_ratio(self):
        """What statistics are multiplied with: how many loss values each example has, as the compiled loss weighs them.

        A number; of layers that see more examples than the batch has (windows of an image), theirs is as much smaller. 1 before
        the first step, where `losses_per_example` was given, and in training without a compiled loss.
        """
        if self._loss_sums is None or not self.built:
            return 1.0
        absolute, squares, _ = ops.convert_to_numpy(ops.convert_to_tensor(self._loss_sums))
        return float(np.max(absolute / squares))

    def add_loss_ratio(self):
        """Creates the averages of every block's `sum of c_j` and `B * sum of c_j^2`, and its ratio before the last batch."""
        if self.losses_per_example == "auto":
            self._loss_sums = self._add_state((3, len(self.layout.blocks)), "ones", "float32", "loss_sums")

    @property
    def _heard(self):
        # Out of sight of Keras, which looks into what optimizers have as attributes.
        if "_heard_of_losses" not in self.__dict__:
            object.__setattr__(self, "_heard_of_losses", compiled_loss.Heard())
        return self._heard_of_losses

    def called(self, statistics, x):
        """Told that a captured layer is called with `x`, before its statistics' weights are looked at."""
        if self.losses_per_example != "auto":
            return
        self._heard.forget()
        for loss in compiled_loss.compiled_losses(None if self._model is None else self._model()):
            compiled_loss.listen(loss, self._heard)

    def loss_sums(self, arrived):
        """`[1 + blocks]`, this batch's sums: the first is the same for all blocks. None where there is no ratio."""
        if self.losses_per_example != "auto":
            return None
        blocks = self.layout.blocks
        told = self._heard.take()
        if told is None:
            return ops.ones((1 + len(blocks),), "float32")
        self.heard_losses = True
        absolute, squares, whole = (ops.cast(ops.convert_to_tensor(t), "float32") for t in told)
        return ops.concatenate([ops.reshape(absolute, (1,)), arrived.examples * squares + whole])

    def average_loss_sums(self, sums, arrived):
        """Takes a batch's sums into the averages, of the layers that recorded it."""
        if sums is None:
            return
        new = ops.stack([ops.broadcast_to(sums[:1], (len(self.layout.blocks),)), sums[1:]])
        gates = ops.stack([ops.minimum(block.statistics.gate, 1.0) for block in self.layout.blocks])
        # A batch whose weights are all zero says nothing.
        recorded = arrived.recorded & ops.all(ops.isfinite(new) & (new > 0), axis=0)
        state = ops.convert_to_tensor(self._loss_sums)
        old, before = state[:2], state[2]
        mixing = ops.where(recorded, gates, 0.0)
        new = (1 - mixing) * old + mixing * ops.where(recorded, new, old)
        before = ops.where(recorded, old[0] / old[1], before)
        self.assign(self._loss_sums, ops.concatenate([new, before[None]]))

    def ratio_of(self, statistics, dtype="float32", before=False):
        """What a block's statistics are multiplied with, the ratio and the `fisher_factor` in one: a scalar tensor.

        Args:
            before: whether it is to be that which was known before the last batch was recorded, to its probes.
        """
        factor = self.fisher_factor
        if self._loss_sums is None:
            return ops.cast(factor, dtype)
        number = next(i for i, block in enumerate(self.layout.blocks) if block.statistics is statistics)
        absolute, squares, old = ops.unstack(ops.convert_to_tensor(self._loss_sums)[:, number], num=3)
        ratio = old if before else absolute / squares
        if self.fisher_scale == "loss":
            # The loss that the Fisher matrix is divided by is a mean: without the coefficients' sum.
            ratio = ratio * absolute
        return ops.cast(factor * ratio, dtype)
