"""Normalisation layers and the Fisher blocks of their features' scales and offsets, by explicit loops."""

import numpy as np


class Reference:
    """What a Keras layer makes of inputs of some shape, told by its arguments alone.

    Attributes:
        features: how many there are.
        scale, center: whether it has a scale, and an offset.
    """

    def __init__(self, layer, shape):
        self.kind, self.shape, config = type(layer).__name__, shape, layer.get_config()
        axes = config["axis"] if isinstance(config["axis"], (list, tuple)) else [config["axis"]]
        self.axes = sorted(axis % len(shape) for axis in axes)
        self.epsilon = config["epsilon"]
        self.groups = config.get("groups")
        self.uncentred = config.get("rms_scaling", False)
        if self.kind == "RMSNormalization":
            self.scale, self.center = True, False
        else:
            self.scale = config["scale"] or self.uncentred
            self.center = config["center"] and not self.uncentred
        self.features = int(np.prod([shape[axis] for axis in self.axes]))

    def feature(self, index):
        """The number of the feature of an entry of the input."""
        number = 0
        for axis in self.axes:
            number = number * self.shape[axis] + index[axis]
        return number

    def normalized_with(self, index):
        """What is the same for all entries that are normalized together."""
        if self.kind == "BatchNormalization":
            return self.feature(index)
        if self.kind == "GroupNormalization":
            return index[0], self.feature(index) * self.groups // self.features
        return tuple(i for axis, i in enumerate(index) if axis not in self.axes)

    def normalized(self, x, visible=None):
        """`xhat`; `visible` says of each entry whether moments are of it."""
        x, found, together = np.asarray(x, "float64"), np.zeros(self.shape), {}
        for index in np.ndindex(*self.shape):
            together.setdefault(self.normalized_with(index), []).append(index)
        for indices in together.values():
            values = np.array([x[i] for i in indices if visible is None or visible[i]])
            if self.kind == "RMSNormalization":
                shift, square = 0.0, np.mean(values**2)
            else:
                shift, square = values.mean(), values.var()
            for i in indices:
                found[i] = (x[i] - (0.0 if self.uncentred else shift)) / np.sqrt(square + self.epsilon)
        return found

    def outputs(self, xhat, parameters):
        """What comes out, of `[gamma, beta]` or one of them, each of any shape."""
        parameters = [np.ravel(np.asarray(p, "float64")) for p in parameters]
        gamma = parameters[0] if self.scale else np.ones(self.features)
        beta = parameters[-1] if self.center else np.zeros(self.features)
        found = np.zeros(self.shape)
        for index in np.ndindex(*self.shape):
            found[index] = gamma[self.feature(index)] * xhat[index] + beta[self.feature(index)]
        return found

    def unit_rows(self, xhat, ds):
        """`[n, examples, features]`: sums of `g xhat` and of `g`, or one of them."""
        found = np.zeros((2, self.shape[0], self.features))
        for index in np.ndindex(*self.shape):
            found[0, index[0], self.feature(index)] += ds[index] * xhat[index]
            found[1, index[0], self.feature(index)] += ds[index]
        return found[[i for i, there in enumerate((self.scale, self.center)) if there]]


def blocks(u, divisor):
    """The Fisher blocks of all features, `[features, n, n]`, of the rows of gradients of a mean over `divisor` losses."""
    found = np.zeros((u.shape[2], len(u), len(u)))
    for feature in range(u.shape[2]):
        for example in range(u.shape[1]):
            row = u[:, example, feature]
            found[feature] += divisor * np.outer(row, row)
    return found


def added_damping(fisher, damping, mode):
    """What is added to the blocks' diagonals."""
    if mode == "relative":
        mean = np.mean([np.diag(block) for block in fisher])
        return damping**2 * mean if mean > 0 else 1.0
    return damping**2 if mode == "factor" else damping


def preconditioned(fisher, v, damping, mode):
    """`P` of the gradients `v`, `[n, features]`."""
    added, found = added_damping(fisher, damping, mode), np.zeros_like(v)
    for feature, block in enumerate(fisher):
        found[:, feature] = np.linalg.solve(block + added * np.eye(len(block)), v[:, feature])
    return found
