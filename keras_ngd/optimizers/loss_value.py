"""The value of the loss, which travels to the optimizer as the gradient of a weight."""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from keras import ops

from keras_ngd import backend, replica
from keras_ngd.optimizers.blocks import Block, Signals
from keras_ngd.statistics.statistics import Statistics, reader_of_the_loss
from keras_ngd.typing import AddVariable, Tensor, Variable

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient

# Divisors are kept above it.
SMALLEST_LOSS = 1e-20


class LossCarrier:
    """Has the loss's value arrive as the gradient of a weight of one captured layer's statistics, `[2]`: the value and a 1.

    Where it does not arrive (a loop that does not call `scale_loss`) the loss counts as 1.
    """

    def __init__(self) -> None:
        self._first: weakref.ref[Statistics] | None = None
        self.blocks: Sequence[Block] = ()

    def carried_by(self, statistics: Statistics) -> None:
        """Makes it travel by these statistics, of the first captured layer of a model."""
        statistics.carries_loss = True
        self._first = weakref.ref(statistics)

    def _statistics(self) -> Statistics | None:
        found = [block.statistics for block in self.blocks]
        if not found and self._first is not None:
            found = [self._first()]
        return next((s for s in found if s is not None and s.trainable and s.loss is not None), None)

    @property
    def weight(self) -> Variable | None:
        """The weight whose gradient is the loss, or None."""
        statistics = self._statistics()
        return None if statistics is None else statistics.loss

    def put_into(self, loss: Tensor) -> Tensor:
        """The loss that is to be differentiated, whose value travels along."""
        unknown = self._first is None and not self.blocks
        statistics = reader_of_the_loss() if unknown else self._statistics()
        read = None if statistics is None else statistics.take_loss()
        if read is None:
            return loss
        # Keras divides the loss of a replica by how many there are.
        value = ops.stop_gradient(ops.cast(loss, "float32")) * replica.count()
        return backend.identity_with_gradient(_value_as_gradient)(loss, value, read)

    def taken_out(self, signals: Signals) -> Tensor:
        """The loss of the batch whose gradients are `signals`, a scalar."""
        if self.weight is None:
            return ops.ones((), "float32")
        # The value and a 1, whose quotient is the value whatever both were multiplied with on their way.
        value, count = ops.unstack(signals.of(self.weight), num=2)
        return ops.abs(ops.where(count > 0, value / ops.where(count > 0, count, 1.0), 1.0))


class MeanLoss:
    """The running average of the loss, over the batches and with the weights that the statistics' averages have.

    Args:
        optimizer: whose loss it is: its `factor_decay` is looked at.
        add: its `StateLayout.add`.
    """

    def __init__(self, optimizer: "NaturalGradient", add: AddVariable) -> None:
        self._optimizer = optimizer
        self.variable = add((), "ones", "float32", "mean_loss")

    def take_in(self, loss: Tensor, rate: Tensor, taken: Tensor) -> None:
        """Takes the loss of a batch in with a weight of `rate`, if `taken` and if it is finite."""
        mean = ops.convert_to_tensor(self.variable)
        taken = taken & ops.isfinite(loss)
        self._optimizer.assign(self.variable, ops.where(taken, (1 - rate) * mean + rate * loss, mean))

    def inverse(self) -> Tensor:
        """1 / the average, a scalar."""
        return 1 / ops.maximum(ops.convert_to_tensor(self.variable), SMALLEST_LOSS)


def average_weight(decay: Tensor, updates: Tensor) -> Tensor:
    """The weight with which a batch enters a running average that had `updates` before, a tensor of ints.

    With `(1 - decay) / (1 - decay^(updates + 1))` the weights of all batches in the average are proportional to
    `decay ** age` and sum to 1.
    """
    return (1 - decay) / (1 - ops.power(decay, ops.cast(updates, "float32") + 1))


def _value_as_gradient(upstream: Tensor, value: Tensor, carrier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return upstream, ops.zeros_like(value), ops.stack([value, ops.ones_like(value)])
