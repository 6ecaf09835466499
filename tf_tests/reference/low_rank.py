"""Fisher blocks as sums of few rank-one terms, and a few of these that stand for all. Rows are `[n, dim]` here."""

import numpy as np


def example_rows(a, ghat, divisor, mask=None):
    """One row of `a` and `g` for each example, `[groups, n, dim]`, of rows of gradients of a mean over `divisor` values."""
    mask = np.ones(a.shape[1:3]) if mask is None else np.asarray(mask, "float64")
    means = np.einsum("knti,nt->kni", a, mask) / mask.sum(axis=1)[None, :, None]
    return means, np.sqrt(divisor) * ghat.sum(axis=2)


def terms(a, g):
    """`U`, `[n, dA dG]`: the outer products of the rows, flattened. The block is `U^T U`."""
    return np.einsum("ni,no->nio", a, g).reshape(len(a), -1)


def kernel(a, g):
    """`U U^T`."""
    return terms(a, g) @ terms(a, g).T


def dense_preconditioned(a, g, v, damping):
    """`(U^T U + damping I)^-1 v`, by solving with the matrix itself."""
    u = terms(a, g)
    return np.linalg.solve(u.T @ u + damping * np.eye(v.size), v.reshape(-1)).reshape(v.shape)


def pivoted_cholesky(matrix, rank):
    """`L` and the pivots, each the longest column of what is left, by subtracting outer products."""
    left, columns, chosen = np.array(matrix, "float64"), [], []
    threshold = 1e-12 * np.diag(matrix).max()
    for _ in range(rank):
        free = [i for i in range(len(left)) if i not in chosen]
        pivot = max(free, key=lambda i: np.linalg.norm(left[:, i]))
        value = left[pivot, pivot]
        column = left[:, pivot] / np.sqrt(value) if value > threshold else np.zeros(len(left))
        left = left - np.outer(column, column)
        columns.append(column)
        chosen.append(pivot)
    return np.stack(columns, axis=1), np.array(chosen)


def combinations(matrix, chosen):
    """`P` with `Q ~ P Q[S]`, the projection onto the columns `S`; `Q_SS` is regular."""
    return np.linalg.solve(matrix[np.ix_(chosen, chosen)], matrix[chosen]).T


def row_weights(matrix, chosen, damping, residual=True):
    """`damping P^T (R + damping I)^-1 P`, or `P^T P`."""
    p = combinations(matrix, chosen)
    left = matrix - p @ matrix[chosen] if residual else 0 * matrix
    return damping * p.T @ np.linalg.solve(left + damping * np.eye(len(matrix)), p)


def interpolated(a, g, v, damping, rank, residual=True):
    """What KID makes of `v`: with `U ~ P U_S`, `(v - U_S^T P^T (Q + damping I)^-1 P U_S v) / damping`."""
    q = kernel(a, g)
    _, chosen = pivoted_cholesky(q, rank)
    p, u = combinations(q, chosen), terms(a, g)[chosen]
    kept = q if residual else p @ q[np.ix_(chosen, chosen)] @ p.T
    core = p.T @ np.linalg.solve(kept + damping * np.eye(len(q)), p)
    return (v - (u.T @ core @ u @ v.reshape(-1)).reshape(v.shape)) / damping
