"""Methods in the eigenbases of Kronecker factors, in float64 and one matrix at a time."""

import numpy as np


def bases(a, g):
    """The eigenvectors of both factors."""
    return np.linalg.eigh(a)[1], np.linalg.eigh(g)[1]


def rotated(v, a, g):
    """`QA^T V QG`."""
    qa, qg = bases(a, g)
    return qa.T @ v @ qg


def rotated_back(v, a, g):
    """`QA V QG^T`."""
    qa, qg = bases(a, g)
    return qa @ v @ qg.T


def residual(matrix, basis):
    """How far a basis is from diagonalizing a matrix: `|offdiag(Q^T F Q)| / |F|`."""
    inside = basis.T @ matrix @ basis
    return np.linalg.norm(inside - np.diag(np.diag(inside))) / np.linalg.norm(matrix)


class Soap:
    """SOAP for one matrix (Vyas et al. 2024, algorithm 3), whose averages and bases know of a step's gradient before it is taken.

    The first bases are eigenvectors, later ones steps of power iteration (algorithm 4), the largest eigenvalue first.
    """

    def __init__(self, shape, frequency, decay, **adam):
        self.adam, self.frequency, self.decay, self.steps = Adam(shape, **adam), frequency, decay, 0
        self.factors, self.bases = [np.zeros((size, size)) for size in shape], [None, None]

    def direction(self, v):
        """What becomes of a gradient."""
        for i, square in enumerate((v @ v.T, v.T @ v)):
            self.factors[i] = self.decay * self.factors[i] + (1 - self.decay) * square
            if self.steps % self.frequency == 0:
                self.bases[i] = self._basis(self.factors[i], self.bases[i])
        self.steps += 1
        return self.adam.direction(v, *self.bases)

    @staticmethod
    def _basis(factor, basis):
        if basis is None:
            return np.linalg.eigh(factor)[1][:, ::-1]
        order = np.argsort(-np.diag(basis.T @ factor @ basis))
        new = np.empty_like(basis)
        new[:, order] = np.linalg.qr(factor @ basis[:, order])[0]
        return new


class Adam:
    """Adam's rule in bases that may change from step to step."""

    def __init__(self, shape, beta_1=0.9, beta_2=0.95, epsilon=1e-8):
        self.first, self.second, self.steps = np.zeros(shape), np.zeros(shape), 0
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def direction(self, v, qa, qg):
        """`P` of a gradient `V`."""
        self.steps += 1
        self.first = self.beta_1 * self.first + (1 - self.beta_1) * v
        self.second = self.beta_2 * self.second + (1 - self.beta_2) * (qa.T @ v @ qg) ** 2
        mean = self.first / (1 - self.beta_1**self.steps)
        deviation = np.sqrt(self.second / (1 - self.beta_2**self.steps))
        return qa @ ((qa.T @ mean @ qg) / (deviation + self.epsilon)) @ qg.T
