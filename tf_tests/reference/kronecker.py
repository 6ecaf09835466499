"""Kronecker factors, and dense solves with the matrices that they stand for."""

import numpy as np


def input_factor(a, sharing="expand", mask=None):
    """`A` of rows `[groups, n, positions, dim]`; `mask` is `[n, positions]`, 1 where a row counts."""
    mask = np.ones(a.shape[1:3]) if mask is None else np.asarray(mask, "float64")
    if sharing == "expand":
        return np.einsum("knti,kntj,nt->kij", a, a, mask) / mask.sum()
    mean = np.einsum("knti,nt->kni", a, mask) / mask.sum(axis=1)[None, :, None]
    return np.einsum("kni,knj->kij", mean, mean) / a.shape[1]


def output_factor(ghat, divisor, sharing="expand"):
    """`G` of rows of gradients of a mean over `divisor` loss values."""
    if sharing == "expand":
        return divisor * np.einsum("knti,kntj->kij", ghat, ghat)
    total = ghat.sum(axis=2)
    return divisor * np.einsum("kni,knj->kij", total, total)


def dampings(a, g, damping, mode):
    """What is added to the diagonals of one `A` and one `G`."""
    if mode == "factor":
        return damping, damping
    if mode == "sqrt":
        return damping**0.5, damping**0.5
    mean_a, mean_g = np.trace(a) / len(a), np.trace(g) / len(g)
    if mode == "relative":
        return tuple(damping * mean if mean > 0 else 1.0 for mean in (mean_a, mean_g))
    pi = np.sqrt(mean_a / mean_g) if mean_a > 1e-30 and mean_g > 1e-30 else 1.0
    return pi * damping**0.5, damping**0.5 / pi


def dense_preconditioned(a, g, v, damping, mode="pi"):
    """`P` of one block by solving with the `[dA dG, dA dG]` matrix itself."""
    if mode == "exact":
        fisher = np.kron(a, g) + damping * np.eye(v.size)
    else:
        damping_a, damping_g = dampings(a, g, damping, mode)
        fisher = np.kron(a + damping_a * np.eye(len(a)), g + damping_g * np.eye(len(g)))
    return np.linalg.solve(fisher, v.reshape(-1)).reshape(v.shape)


def running_average(history, decay):
    """Mean of a list (oldest first) with weights proportional to `decay ** age`."""
    weights = decay ** np.arange(len(history))[::-1].astype("float64")
    return sum(w * value for w, value in zip(weights / weights.sum(), history, strict=True))
