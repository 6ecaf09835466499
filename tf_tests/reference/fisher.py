"""Exact Fisher blocks from per-example gradients."""

import numpy as np


def per_example_gradients(a, ghat, divisor):
    """Gradients `[groups, n, input_dim, output_dim]` of each example's own loss, from rows of the mean loss."""
    return divisor * np.einsum("knti,knto->knio", a, ghat)


def fisher_blocks(a, ghat, divisor):
    """`[groups, dA dG, dA dG]`: the mean of the outer products of the per-example gradients."""
    gradients = per_example_gradients(a, ghat, divisor)
    flat = gradients.reshape(*gradients.shape[:2], -1)
    return np.einsum("kni,knj->kij", flat, flat) / divisor


def gauss_newton_blocks(weights, x):
    """Per layer, the mean of `J^T J` of a deep linear network `x W1 W2 ...` (matrices, no biases)."""
    blocks = []
    for index, weight in enumerate(weights):
        before, after = x, np.eye(weight.shape[1])
        for other in weights[:index]:
            before = before @ other
        for other in weights[index + 1 :]:
            after = after @ other
        block = np.zeros((weight.size, weight.size))
        for row in before:
            jacobian = np.kron(row[:, None], after)  # d output / d weight, row-major
            block += jacobian @ jacobian.T / len(x)
        blocks.append(block)
    return blocks
