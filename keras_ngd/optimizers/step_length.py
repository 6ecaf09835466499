"""How long a step may be, and in which units."""

import weakref

from keras import ops

from keras_ngd import backend, replica, schedules

FISHER_SCALES = ("loss", None)

# From which share of the steps, and from how many, the user is told that they were clipped.
INERT_SHARE, INERT_STEPS = 0.95, 100

# Divisors are kept above these.
SMALLEST_LOSS = 1e-20
SMALLEST_LENGTH = 1e-30


class StepLength:
    """Mixin: the running average of the loss, and the bounds of a step's length.

    With `V` a gradient, `P` the preconditioned one and `<P, V>` their product over all blocks, the decrease of the loss that a
    step promises is about `learning_rate <P, V>`.

        loss_clip:   P <- nu P,   nu = min(1, loss_clip loss / <P, V>)                     at most such a share of the loss
        kl_clip:     P <- nu P,   nu = min(1, sqrt(kl_clip / (learning_rate^2 <P, V>)))    (Ba et al., 2017)

    Under the second the learning rate has no say in the length of steps that are clipped; under the first it always has.

    The loss arrives as the gradient of a weight: see `scale_loss`. Where it does not (a loop that does not call `scale_loss`)
    it counts as 1.
    """

    _carrying = None

    @staticmethod
    def _checked_step_length(loss_clip, kl_clip, fisher_scale):
        """The argument `loss_clip`; a `ValueError` names what is wrong with it or with `fisher_scale`."""
        if isinstance(loss_clip, str) and loss_clip == "auto":
            loss_clip = 1.0 if kl_clip is None else None
        if loss_clip is not None and not (schedules.is_number(loss_clip) and 0 < loss_clip < float("inf")):
            raise ValueError(f"`loss_clip` must be a positive float, None or 'auto'. Received: loss_clip={loss_clip!r}")
        if fisher_scale not in FISHER_SCALES:
            raise ValueError(f"`fisher_scale` must be one of {FISHER_SCALES}. Received: fisher_scale={fisher_scale!r}")
        return None if loss_clip is None else float(loss_clip)

    def build_step_length(self):
        """Creates the running average of the loss, and counters."""
        self._mean_loss = self._add_state((), "ones", "float32", "mean_loss")
        self._clipped_steps = self._add_state((), "zeros", "int", "clipped_steps")
        self._sum_of_scales = self._add_state((), "zeros", "float32", "sum_of_step_scales")

    @property
    def clipped_steps(self):
        """How many steps a clip has shortened."""
        return self._read("_clipped_steps")

    @property
    def mean_step_scale(self):
        """The mean over all steps of what the clips multiplied a step with; 1 where they never did."""
        steps = int(ops.convert_to_numpy(self.iterations)) if self.built else 0
        return float(ops.convert_to_numpy(self._sum_of_scales)) / steps if steps else 1.0

    def notices(self):
        found, clipped = super().notices(), self.clipped_steps
        steps = int(ops.convert_to_numpy(self.iterations))
        if self.kl_clip is not None and clipped >= max(INERT_SHARE * steps, INERT_STEPS):
            found.append(
                (
                    "clipped",
                    f"`kl_clip={self.kl_clip:g}` shortened {clipped} of {steps} steps, to {self.mean_step_scale:.2g} of their "
                    "length in the mean, so that neither the learning rate nor its schedule had a say in them. Raise `kl_clip`, "
                    "lower the rate, or leave `kl_clip` out: `loss_clip`, the default, leaves the learning rate its say.",
                )
            )
        return found

    def scale_loss(self, loss):
        """The loss that is to be differentiated, as every Keras trainer asks for it; its value travels along.

        In a loop of one's own: `loss = optimizer.scale_loss(loss)` before it is differentiated, inside the tape.
        """
        statistics = self._carrying_statistics()
        carrier = None if statistics is None else statistics.take_loss()
        if carrier is not None:
            # Keras divides the loss of a replica by how many there are.
            value = ops.stop_gradient(ops.cast(loss, "float32")) * replica.count()
            loss = _with_value(loss, value, carrier)
        return super().scale_loss(loss)

    def carry_loss(self, statistics):
        """Makes the loss travel as the gradient of a weight of these statistics, the first of the model."""
        statistics.carries_loss = True
        # Out of sight of Keras, which looks into what optimizers have as attributes.
        object.__setattr__(self, "_carrying", weakref.ref(statistics))

    def _carrying_statistics(self):
        """The statistics with the weight whose gradient is the loss, or None."""
        found = [block.statistics for block in self.layout.blocks]
        if not found and self._carrying is not None:
            found = [self._carrying()]
        return next((s for s in found if s is not None and s.trainable and s.loss is not None), None)

    def _loss_carrier(self):
        """The weight whose gradient is the loss, or None."""
        statistics = self._carrying_statistics()
        return None if statistics is None else statistics.loss

    def arrived_loss(self, grads, index):
        """The loss of this batch, a scalar; 1 where it did not arrive."""
        carrier = self._loss_carrier()
        if carrier is None:
            return ops.ones((), "float32")
        # The value and a 1, whose quotient is the value whatever both were multiplied with on their way.
        value, count = ops.unstack(grads[index(carrier)], num=2)
        return ops.abs(ops.where(count > 0, value / ops.where(count > 0, count, 1.0), 1.0))

    def average_loss(self, loss, opened):
        """Takes the loss of a batch into the running average, if the batch's statistics were taken into theirs."""
        mean = ops.convert_to_tensor(self._mean_loss)
        # As the statistics' averages, of which the first update is the batch's own.
        updates = ops.cast(ops.convert_to_tensor(self._factor_updates), "float32")
        rate = (1 - self.factor_decay) / (1 - ops.power(self.factor_decay, updates + 1))
        taken = opened & ops.isfinite(loss)
        self.assign(self._mean_loss, ops.where(taken, (1 - rate) * mean + rate * loss, mean))

    @property
    def fisher_factor(self):
        """What the empirical Fisher matrix is to be multiplied with, a scalar."""
        if self.fisher_scale is None:
            return ops.ones((), "float32")
        return 1 / ops.maximum(ops.convert_to_tensor(self._mean_loss), SMALLEST_LOSS)

    def step_scale(self, length, loss, finite):
        """`nu` of the class, and counts it.

        Args:
            length: scalar, the sum of `<P, V>` over all blocks.
            loss: scalar, this batch's.
            finite: whether the step is to be taken at all.
        """
        length = ops.maximum(ops.abs(length / self.loss_scale**2), SMALLEST_LENGTH)
        nu = ops.ones((), "float32")
        if self.loss_clip is not None:
            nu = ops.minimum(nu, self.loss_clip * ops.where(ops.isfinite(loss), loss, 0.0) / length)
        if self.kl_clip is not None:
            rate = ops.cast(self.learning_rate, "float32")
            nu = ops.minimum(nu, ops.sqrt(self.kl_clip / ops.maximum(rate * rate * length, SMALLEST_LENGTH)))
        self.assign_add(self._clipped_steps, ops.cast(finite & (nu < 1), self._clipped_steps.dtype))
        self.assign_add(self._sum_of_scales, ops.where(finite, nu, 1.0))
        return nu


def _value_as_gradient(upstream, value, carrier):
    return upstream, ops.zeros_like(value), ops.stack([value, ops.ones_like(value)])


def _with_value(loss, value, carrier):
    """`loss`, of which the gradient with respect to `carrier`, `[2]`, is its `value` and a 1."""
    return backend.identity_with_gradient(_value_as_gradient)(loss, value, carrier)
