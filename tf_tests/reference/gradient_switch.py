"""HyLo's switch between its two means, epoch by epoch, in float32 as the library has it."""

import numpy as np


def decayed(rate, before, ratio):
    return np.float32(rate) <= np.float32(ratio) * np.float32(before)


def settled(norms, eta):
    """Whether the last two sums of gradients are of about one length."""
    if len(norms) < 2 or not norms[-2] > 0:
        return False
    last, before = np.float32(norms[-1]), np.float32(norms[-2])
    with np.errstate(invalid="ignore"):
        return bool(np.abs(last - before) / before < np.float32(eta))


def modes(norms, announced, rates, eta, ratio):
    """`"kid"` or `"kis"` for each epoch, and the one after the last.

    Args:
        norms: of the sum of each epoch's gradients.
        announced: for each epoch the learning rate that its last step expects of the next.
        rates: for each epoch the learning rate that its first step finds.
        eta, ratio: the switch's.
    """
    found, carried = [], "kid"
    for epoch, rate in enumerate(rates):
        found.append("kid" if epoch and decayed(rate, rates[epoch - 1], ratio) else carried)
        calm = settled(norms[: epoch + 1], eta) and not decayed(announced[epoch], rate, ratio)
        carried = "kis" if calm else "kid"
    return [*found, carried]
