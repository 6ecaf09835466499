"""How long a step may be."""

from typing import TYPE_CHECKING

from keras import ops

from keras_ngd import schedules
from keras_ngd.typing import AddVariable, Tensor

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient

# From which share of the steps, and from how many, the user is told that they were clipped.
INERT_SHARE, INERT_STEPS = 0.95, 100

# Divisors are kept above it.
SMALLEST_LENGTH = 1e-30


def checked_clips(loss_clip: float | str | None, kl_clip: float | None) -> tuple[float | None, float | None]:
    """The arguments `loss_clip` and `kl_clip`; a `ValueError` names what is wrong."""
    if kl_clip is not None and not (schedules.is_number(kl_clip) and 0 < kl_clip < float("inf")):
        raise ValueError(f"`kl_clip` must be a positive float or None. Received: kl_clip={kl_clip!r}")
    if isinstance(loss_clip, str) and loss_clip == "auto":
        loss_clip = 1.0 if kl_clip is None else None
    if loss_clip is not None and not (schedules.is_number(loss_clip) and 0 < loss_clip < float("inf")):
        raise ValueError(f"`loss_clip` must be a positive float, None or 'auto'. Received: loss_clip={loss_clip!r}")
    return None if loss_clip is None else float(loss_clip), None if kl_clip is None else float(kl_clip)


class Bound:
    """The bounds of a step's length, and how often they shortened one.

    With `V` a gradient, `P` the preconditioned one and `<P, V>` their product over all blocks, the decrease of the loss that a
    step promises is about `learning_rate <P, V>`.

        loss_clip:   P <- nu P,   nu = min(1, loss_clip loss / <P, V>)                     at most such a share of the loss
        kl_clip:     P <- nu P,   nu = min(1, sqrt(kl_clip / (learning_rate^2 <P, V>)))    (Ba et al., 2017)

    The first holds for each block alone, too, before it does for all: so it does for blocks of the Fisher matrix itself, and one
    whose curvature is far too small (such as that of an attention's keys, whose gradients add up to zero over the positions, from
    rows that are such sums) leaves the others their steps.

    Under the second the learning rate has no say in the length of steps that are clipped; under the first it always has.

    Args:
        optimizer: whose steps they are: its `loss_clip`, `kl_clip` and `loss_scale` are looked at.
        add: its `StateLayout.add`.
    """

    def __init__(self, optimizer: "NaturalGradient", add: AddVariable) -> None:
        self._optimizer = optimizer
        self.clipped_steps = add((), "zeros", "int", "clipped_steps")
        self.sum_of_scales = add((), "zeros", "float32", "sum_of_step_scales")

    def read(self, name: str) -> float:
        """`"clipped_steps"`, an int, or `"mean_step_scale"`, the mean over all steps of `nu`, a float."""
        if name == "clipped_steps":
            return int(ops.convert_to_numpy(self.clipped_steps))
        steps = int(ops.convert_to_numpy(self._optimizer.iterations))
        return float(ops.convert_to_numpy(self.sum_of_scales)) / steps if steps else 1.0

    def notices(self) -> list[tuple[str, str]]:
        """Pairs of a key and a message, of what the user should know of."""
        clipped, steps = self.read("clipped_steps"), int(ops.convert_to_numpy(self._optimizer.iterations))
        kl_clip = self._optimizer.kl_clip
        if kl_clip is None or clipped < max(INERT_SHARE * steps, INERT_STEPS):
            return []
        return [
            (
                "clipped",
                f"`kl_clip={kl_clip:g}` shortened {clipped} of {steps} steps, to {self.read('mean_step_scale'):.2g} of their "
                "length in the mean, so that neither the learning rate nor its schedule had a say in them. Raise `kl_clip`, "
                "lower the rate, or leave `kl_clip` out: `loss_clip`, the default, leaves the learning rate its say.",
            )
        ]

    @property
    def is_of_blocks(self) -> bool:
        """Whether the step of each block is bounded, as `of_blocks` says."""
        return self._optimizer.loss_clip is not None

    def of_blocks(self, lengths: Tensor, loss: Tensor) -> Tensor:
        """`[blocks]`, what each block's step is multiplied with before the step of all is bounded.

        Args:
            lengths: `[blocks]`, the `<P, V>` of each.
            loss: scalar, this batch's.
        """
        return self._share_of_loss(ops.maximum(ops.abs(lengths / self._optimizer.loss_scale**2), SMALLEST_LENGTH), loss)

    def _share_of_loss(self, length: Tensor, loss: Tensor) -> Tensor:
        return ops.minimum(1.0, self._optimizer.loss_clip * ops.where(ops.isfinite(loss), loss, 0.0) / length)

    def scale(self, length: Tensor, loss: Tensor, finite: Tensor) -> Tensor:
        """`nu`, which is counted.

        Args:
            length: scalar, the sum of `<P, V>` over all blocks.
            loss: scalar, this batch's.
            finite: whether the step is to be taken at all.
        """
        optimizer = self._optimizer
        length = ops.maximum(ops.abs(length / optimizer.loss_scale**2), SMALLEST_LENGTH)
        nu = ops.ones((), "float32")
        if optimizer.loss_clip is not None:
            nu = self._share_of_loss(length, loss)
        if optimizer.kl_clip is not None:
            rate = ops.cast(optimizer.learning_rate, "float32")
            nu = ops.minimum(nu, ops.sqrt(optimizer.kl_clip / ops.maximum(rate * rate * length, SMALLEST_LENGTH)))
        optimizer.assign_add(self.clipped_steps, ops.cast(finite & (nu < 1), self.clipped_steps.dtype))
        optimizer.assign_add(self.sum_of_scales, ops.where(finite, nu, 1.0))
        return nu
