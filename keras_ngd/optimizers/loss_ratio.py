"""The loss's own scale: what statistics are multiplied with to be the curvature of the loss that is differentiated."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_ngd import schedules
from keras_ngd.optimizers import compiled_loss
from keras_ngd.optimizers.blocks import Block
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import AddVariable, LossesPerExample, Tensor, Variable

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient


def check_losses_per_example(value: Any) -> LossesPerExample:
    """`value` as `"auto"` or a float."""
    if isinstance(value, str) and value == "auto":
        return value
    if not schedules.is_number(value) or not 0 < value < float("inf"):
        raise ValueError(
            f"`losses_per_example` must be a number above 0, or 'auto'. Received: losses_per_example={value!r}"
        )
    return float(value)


class LossRatio:
    """Reads from the compiled loss how statistics, which take it for a mean over the examples, are to be scaled.

    With `c_j` the coefficient of each single loss value in the total, and `g_j` the gradient of that value,

        the batch's Fisher matrix is     sum over j of c_j g_j g_j^T,
        and statistics hold              B * sum over j of c_j^2 g_j g_j^T

    for a layer that sees `B` examples, so that the trace is right once they are multiplied with

        ratio = (sum over j of c_j) / (B * sum over j of c_j^2).

    That is 1 for a mean over the examples, `T` for a mean over `T` values of each, `1 / B` for a sum, `1 / w` where all have the
    weight `w`. Both sums are averaged over batches with the weights that the statistics are.

    Where labels are drawn from the model, `fisher="sampled"`, statistics are in the units of the loss and the ratio is 1.

    Args:
        optimizer: whose statistics they are: where its `losses_per_example` is not `"auto"`, it is the number that statistics
            take for it, and there is no ratio. Its `fisher_scale` is looked at, too.
    """

    def __init__(self, optimizer: "NaturalGradient") -> None:
        self._optimizer = optimizer
        # Whether a compiled loss was ever heard of.
        self.heard_losses = False
        self._heard = compiled_loss.Heard(optimizer.labels if optimizer.fisher == "sampled" else None)
        self._sums: Variable | None = None
        self._blocks: Sequence[Block] = ()

    def build(self, blocks: Sequence[Block], add: AddVariable) -> None:
        """Creates the averages of every block's `sum of c_j` and `B * sum of c_j^2`, and its ratio before the last batch."""
        self._blocks = blocks
        if self._optimizer.losses_per_example == "auto":
            self._sums = add((3, len(blocks)), "ones", "float32", "loss_sums")

    def read(self) -> float:
        """The largest ratio, a float; 1 where there is none."""
        if self._sums is None:
            return 1.0
        absolute, squares, _ = ops.convert_to_numpy(ops.convert_to_tensor(self._sums))
        return float(np.max(absolute / squares))

    def listen(self, model: keras.Model | None) -> None:
        """Has the losses that a model (or None) is compiled with tell what they make of each loss value, in this trace."""
        if self._optimizer.losses_per_example != "auto" and self._optimizer.fisher == "empirical":
            return
        self._heard.forget()
        for loss in compiled_loss.compiled_losses(model):
            compiled_loss.listen(loss, self._heard)

    def of_batch(self, examples: Tensor) -> Tensor | None:
        """`[1 + blocks]`, this batch's sums: the first is the same for all blocks. None where there is no ratio.

        Args:
            examples: `[blocks]`, how many each layer has seen.
        """
        if self._optimizer.losses_per_example != "auto":
            return None
        told = self._heard.take()
        if told is None:
            return ops.ones((1 + len(self._blocks),), "float32")
        self.heard_losses = True
        # Gradients of labels that are drawn are in these units already. Of a batch of one there are none.
        sampled = self._optimizer.fisher == "sampled"
        absolute, squares, whole = (ops.cast(ops.convert_to_tensor(t), "float32") for t in told)
        of_all, of_blocks = ops.reshape(absolute, (1,)), examples * squares + whole
        if sampled:
            of_blocks = ops.where(examples > 1, ops.broadcast_to(of_all, ops.shape(of_blocks)), of_blocks)
        return ops.concatenate([of_all, of_blocks])

    def take_in(self, sums: Tensor | None, recorded: Tensor) -> None:
        """Takes a batch's sums into the averages of the layers that recorded it, `[blocks]` booleans."""
        if sums is None:
            return
        new = ops.stack([ops.broadcast_to(sums[:1], (len(self._blocks),)), sums[1:]])
        gates = ops.minimum(ops.stack([block.statistics.gate.value for block in self._blocks]), 1.0)
        # A batch whose weights are all zero says nothing.
        recorded = recorded & ops.all(ops.isfinite(new) & (new > 0), axis=0)
        state = ops.convert_to_tensor(self._sums)
        old, before = state[:2], state[2]
        mixing = ops.where(recorded, gates, 0.0)
        new = (1 - mixing) * old + mixing * ops.where(recorded, new, old)
        before = ops.where(recorded, old[0] / old[1], before)
        self._optimizer.assign(self._sums, ops.concatenate([new, before[None]]))

    def of(self, statistics: Statistics, factor: Tensor, dtype: str = "float32", before: bool = False) -> Tensor:
        """What a block's statistics are multiplied with: the ratio and a further `factor`, in one scalar tensor.

        Args:
            statistics: the block's.
            factor: scalar.
            dtype: of the result.
            before: whether the ratio is to be that which was known before the last batch was recorded, to its probes.
        """
        if self._sums is None:
            return ops.cast(factor, dtype)
        number = next(i for i, block in enumerate(self._blocks) if block.statistics is statistics)
        absolute, squares, old = ops.unstack(ops.convert_to_tensor(self._sums)[:, number], num=3)
        ratio = old if before else absolute / squares
        if self._optimizer.fisher_scale == "loss":
            # The loss that the Fisher matrix is divided by is a mean: without the coefficients' sum.
            ratio = ratio * absolute
        return ops.cast(factor * ratio, dtype)
