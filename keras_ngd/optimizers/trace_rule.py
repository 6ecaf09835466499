"""THOR's trace rule: which layers' inverses a refresh renews, and which are left alone for good."""

from keras import ops

from keras_ngd.typing import Tensor

KEEP, UPDATE, STOP = 0, 1, 2
DECISIONS = ("keep", "update", "stop")

# One row each, one column per layer.
STATE = ("reference", "stop_hits", "stopped", "trace", "change_rate", "decision")


def initial_state(layers: int) -> Tensor:
    """The state before the first refresh: no reference, nothing stopped."""
    return ops.stack([ops.full((layers,), -1.0 if name == "reference" else 0.0) for name in STATE])


def decide(state: Tensor, traces: Tensor, omega: tuple[float, float], patience: int) -> Tensor:
    """One refresh (THOR, eq. 9), for all layers at once.

    With `change = |trace - reference| / |reference|`, the reference being the trace at the layer's last update:

        update  change > omega1, or there is no reference yet:  new inverses; the trace becomes the reference
        keep    omega2 <= change <= omega1:                     the inverses stay
        stop    change < omega2, `patience` times running:      the inverses stay for good

    A trace that is not finite keeps. A stopped layer keeps for ever.

    Args:
        state: `[6, layers]`, see `STATE`.
        traces: `[layers]`.
        omega: `(omega1, omega2)`.
        patience: int.

    Returns:
        The new state. Its `decision` is one of `KEEP`, `UPDATE`, `STOP`; its `trace` and `change_rate` are what the
        decision came from (those of a stopped layer stay as they were; a first change is infinite).
    """
    reference, hits, stopped, old_trace, old_change, _ = ops.unstack(state, num=len(STATE))
    traces = ops.cast(traces, reference.dtype)
    active, known = stopped == 0, reference > 0
    change = ops.abs(traces - reference) / ops.where(known, reference, 1.0)
    change = ops.where(known, change, float("inf"))
    finite = ops.isfinite(traces)
    update = active & finite & (change > omega[0])
    hit = active & finite & (change < omega[1])
    hits = ops.where(active & finite, ops.where(hit, hits + 1, 0.0), hits)
    stop = hit & (hits >= patience)
    decision = ops.where(update, float(UPDATE), ops.where(stop, float(STOP), float(KEEP)))
    return ops.stack(
        [
            ops.where(update, traces, reference),
            hits,
            ops.where(stop, 1.0, stopped),
            ops.where(active, traces, old_trace),
            ops.where(active, change, old_change),
            decision,
        ]
    )
