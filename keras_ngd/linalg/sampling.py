"""Choosing rows at random by their importance, with static shapes."""

from keras import ops

from keras_ngd.typing import Tensor

SAMPLINGS = ("priority", "paper", "replacement")


def importance(a: Tensor, g: Tensor, power: float) -> Tensor:
    """Probabilities `[k, n]` proportional to `(|a_j| |g_j|)^power`, the size of each row's outer product (HyLo, Alg. 3).

    All zero where all rows are.
    """
    scores = ops.sqrt(ops.sum(a * a, axis=2)) * ops.sqrt(ops.sum(g * g, axis=2))
    largest = ops.max(scores, axis=1, keepdims=True)
    scores = ops.power(scores / ops.where(largest > 0, largest, ops.ones_like(largest)), power)
    total = ops.sum(scores, axis=1, keepdims=True)
    return scores / ops.where(total > 0, total, ops.ones_like(total))


def draw(probabilities: Tensor, rank: int, uniform: Tensor, sampling: str) -> tuple[Tensor, Tensor]:
    """Indices of `rank` rows, and by what each row's outer product with itself is to be multiplied.

        priority     without replacement, the largest of the keys p / u; weights max(p, t) / p, with t the largest key left
                     out. The weighted sum is unbiased (Duffield et al. 2007), and exact if rank rows are all there are.
        paper        without replacement, probabilities proportional to p; weights 1: the sum is too small.
        replacement  weights 1 / (rank p), unbiased; rows may repeat.

    Rows of probability 0 have weight 0.

    Args:
        probabilities: `[k, n]`.
        rank: int of at most `n`.
        uniform: `[k, n]` (for `replacement`, `[k, rank]`), uniform in (0, 1).
        sampling: one of `SAMPLINGS`.

    Returns:
        `[k, rank]` integers and `[k, rank]` weights.
    """
    if sampling == "replacement":
        return _with_replacement(probabilities, rank, uniform)
    # The largest of p / Exp(1) are a sample without replacement.
    keys = probabilities / (uniform if sampling == "priority" else -ops.log(uniform))
    keys = ops.concatenate([keys, ops.zeros_like(keys[:, :1])], axis=1)
    largest, chosen = ops.top_k(keys, rank + 1)
    threshold, chosen = largest[:, rank:], ops.minimum(chosen[:, :rank], probabilities.shape[1] - 1)
    p = ops.take_along_axis(probabilities, chosen, axis=1)
    positive = p > 0
    if sampling == "paper":
        return chosen, ops.cast(positive, p.dtype)
    weights = ops.maximum(p, threshold) / ops.where(positive, p, ops.ones_like(p))
    return chosen, ops.where(positive, weights, ops.zeros_like(p))


def _with_replacement(probabilities: Tensor, rank: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    ends = ops.cumsum(probabilities, axis=1)
    below = ops.expand_dims(ends, 1) <= ops.expand_dims(uniform * ends[:, -1:], 2)
    chosen = ops.minimum(ops.sum(ops.cast(below, "int32"), axis=2), probabilities.shape[1] - 1)
    p = ops.take_along_axis(probabilities, chosen, axis=1)
    positive = p > 0
    return chosen, ops.where(positive, 1 / (rank * ops.where(positive, p, ops.ones_like(p))), ops.zeros_like(p))
