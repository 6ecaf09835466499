"""HyLo's gradient-based switch: which epochs need the accurate decomposition, and which can do with samples."""

from keras import ops

from keras_ngd.statistics.low_rank import KID, KIS
from keras_ngd.typing import Tensor

# The mode of the present epoch, how many are over, the norms of the last two sums of gradients (the last first), and the
# learning rates at the start of the present and of the previous epoch.
STATE = ("mode", "epochs", "norm", "previous_norm", "rate", "previous_rate")


def initial_state(mode: float = KID) -> Tensor:
    """The state before the first step."""
    return ops.stack(
        [ops.cast(mode, "float32"), *ops.unstack(ops.convert_to_tensor([0.0, 0.0, 0.0, -1.0, -1.0], "float32"))]
    )


def after_epoch(state: Tensor, norm: Tensor, rate: Tensor, eta: float, decay_ratio: float) -> Tensor:
    """The state after an epoch.

    With `D` the sum of the gradients of all steps of an epoch, the next epoch is KID where

        | |D| - |D_before| | / |D_before| >= eta,     or the learning rate decayed: rate <= decay_ratio * the last epoch's,

    and KIS otherwise (HyLo, eq. 10 and Alg. 1, with the absolute value that its line 2 leaves out). The first two epochs are
    KID, and so is one after a sum that is zero or not finite.

    Args:
        state: `[6]`, see `STATE`.
        norm: scalar, `|D|` of the epoch that ends.
        rate: scalar, the learning rate of the one that begins, as far as is known.
        eta, decay_ratio: floats.
    """
    _, epochs, before, _, last_rate, _ = ops.unstack(state, num=len(STATE))
    known = (epochs >= 1) & (before > 0)
    change = ops.abs(norm - before) / ops.where(known, before, 1.0)
    settled = known & (change < eta)
    mode = ops.where(settled & ~_decayed(rate, last_rate, decay_ratio), KIS, KID)
    return ops.stack([mode, epochs + 1, norm, before, rate, last_rate])


def at_first_step(state: Tensor, rate: Tensor, decay_ratio: float) -> Tensor:
    """The state once the first step of an epoch shows its learning rate: callbacks set it after the last epoch's end."""
    mode, *rest, _, last_rate = ops.unstack(state, num=len(STATE))
    mode = ops.where(_decayed(rate, last_rate, decay_ratio), KID, mode)
    return ops.stack([mode, *rest, rate, last_rate])


def _decayed(rate: Tensor, before: Tensor, ratio: float) -> Tensor:
    return (before > 0) & (rate <= ratio * before)
