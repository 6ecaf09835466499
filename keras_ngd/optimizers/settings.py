"""Settings that methods share."""

from collections.abc import Mapping
from typing import Any

from keras_ngd.typing import DampingLike

# Of methods with Kronecker factors: the damping of each mode that has a default.
FACTOR_DAMPINGS = {"global": 0.5, "relative": 1.0}

FISHER_SCALES = ("loss", None, "auto")

# The methods as their papers have them: nothing is relative to the loss, and all variables follow one rule.
PAPER_SETTINGS: dict[str, Any] = {
    "kl_clip": 1e-3,
    "loss_clip": None,
    "length_clip": None,
    "fisher_scale": None,
    "interval_growth": None,
    "rest": "sgd",
}


def check_fisher_scale(fisher_scale: str | None) -> None:
    """Raises a `ValueError` if it is none."""
    if fisher_scale not in FISHER_SCALES:
        raise ValueError(f"`fisher_scale` must be one of {FISHER_SCALES}. Received: fisher_scale={fisher_scale!r}")


def settled_damping(
    damping: DampingLike | None,
    mode: str | None,
    absolute: str,
    default: str,
    dampings: Mapping[str, float] = FACTOR_DAMPINGS,
) -> tuple[DampingLike, str]:
    """The damping and its mode, where one of them or both are not given.

    Args:
        damping: as it was given.
        mode: as it was given.
        absolute: the mode of a damping that is given without one.
        default: the mode where neither is given.
        dampings: for each mode that has a default its damping. Default: those of Kronecker factors.
    """
    if damping is not None:
        return damping, absolute if mode is None else mode
    mode = default if mode is None else mode
    if mode not in dampings:
        raise ValueError(
            f"`damping_mode={mode!r}` is in units of the curvature and needs a `damping`, such as 0.01. Received: "
            "damping=None"
        )
    return dampings[mode], mode
