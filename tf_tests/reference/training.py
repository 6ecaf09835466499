"""A small network and natural-gradient training of it, in NumPy."""

import numpy as np

from tf_tests.reference import kronecker, rows

EPSILON = 1e-3


class Network:
    """Grouped convolution (tanh), batch normalization, two dense layers of one shape (tanh), dense, cross-entropy.

    Weights are a dict of float64 arrays: matrices `[groups, input_dim, output_dim]` of the layers in `BLOCKS`, and the
    scale and offset of the normalization.
    """

    BLOCKS = ("convolution", "first", "second", "logits")
    PLAIN = ("gamma", "beta")
    GROUPS, KERNEL = 2, 3

    def gradients(self, weights, x, y):
        """By name: gradients of the mean cross-entropy, and `(a, ghat)` of each block."""
        count, shape = len(x), x.shape
        a = {"convolution": rows.convolution_rows(x, (self.KERNEL,), (1,), (1,), "same", self.GROUPS)}
        a["convolution"] = rows.append_ones(a["convolution"])
        convolved = np.tanh(rows.join_filters(a["convolution"] @ weights["convolution"][:, None], shape[1:2]))
        mean, variance = convolved.mean(axis=(0, 1)), convolved.var(axis=(0, 1))
        normal = (convolved - mean) / np.sqrt(variance + EPSILON)
        h = (weights["gamma"] * normal + weights["beta"]).reshape(count, -1)
        outputs = {}
        for name in ("first", "second", "logits"):
            a[name] = rows.append_ones(rows.dense_rows(h))
            h = (a[name] @ weights[name][:, None])[0, :, 0]
            h = outputs[name] = h if name == "logits" else np.tanh(h)
        probabilities = np.exp(h - h.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)

        upstream = (probabilities - np.eye(h.shape[1])[y]) / count
        ghat = {}
        for name in ("logits", "second", "first"):
            ds = upstream if name == "logits" else upstream * (1 - outputs[name] ** 2)
            ghat[name] = rows.dense_rows(ds)
            upstream = ds @ weights[name][0, :-1].T
        upstream = upstream.reshape(convolved.shape)
        plain = {"gamma": (upstream * normal).sum(axis=(0, 1)), "beta": upstream.sum(axis=(0, 1))}
        ds = upstream * weights["gamma"]
        ds = ds - ds.mean(axis=(0, 1)) - normal * (ds * normal).mean(axis=(0, 1))
        ds = ds / np.sqrt(variance + EPSILON) * (1 - convolved**2)
        ghat["convolution"] = rows.split_filters(ds, self.GROUPS)
        found = {name: np.einsum("knti,knto->kio", a[name], ghat[name]) for name in self.BLOCKS}
        return {**found, **plain}, {name: (a[name], ghat[name]) for name in self.BLOCKS}


def constant(value):
    """A schedule that never changes."""
    return lambda step: value


class NaturalGradientTraining:
    """Steps of KFAC on a dict of weights. Schedules are functions of the step."""

    def __init__(
        self,
        learning_rate,
        damping,
        momentum=0.9,
        nesterov=False,
        weight_decay=0.0,
        factor_decay=0.95,
        factor_interval=1,
        inverse_interval=1,
        damping_mode="pi",
        weight_sharing="expand",
        kl_clip=None,
        damping_follows=False,
    ):
        as_schedule = [v if callable(v) else constant(v) for v in (learning_rate, damping)]
        self.learning_rate, self.damping = as_schedule
        as_schedule = [v if callable(v) else constant(v) for v in (factor_interval, inverse_interval)]
        self.factor_interval, self.inverse_interval = as_schedule
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.factor_decay, self.damping_mode, self.weight_sharing = factor_decay, damping_mode, weight_sharing
        self.kl_clip, self.damping_follows = kl_clip, damping_follows
        self.history, self.factors, self.velocity = {}, {}, {}
        self.step = self.next_factors = self.next_inverses = 0
        self.recorded, self.refreshed = [], []
        self.nu = 1.0

    def averages(self, name):
        """The running averages `(A, G)` of a block."""
        pairs = zip(*self.history[name], strict=True)
        return [kronecker.running_average(list(series), self.factor_decay) for series in pairs]

    def apply(self, weights, gradients, observed, count):
        """Changes `weights` by one step; `observed` holds `(a, ghat)` of each block, from a batch of `count`."""
        rate, damping = self.learning_rate(self.step), self.damping(self.step)
        if self.step >= self.next_factors:
            self.next_factors = self.step + self.factor_interval(self.step)
            self.recorded.append(self.step)
            for name, (a, ghat) in observed.items():
                pair = (
                    kronecker.input_factor(a, self.weight_sharing),
                    kronecker.output_factor(ghat, count, self.weight_sharing),
                )
                self.history.setdefault(name, []).append(pair)
        if self.step >= self.next_inverses:
            self.next_inverses = self.step + self.inverse_interval(self.step)
            self.refreshed.append(self.step)
            self.factors = {name: (*self.averages(name), damping) for name in observed}
        directions, length = dict(gradients), 0.0
        for name, (a, g, damping_then) in self.factors.items():
            used = damping if self.damping_follows else damping_then
            blocks = [
                kronecker.dense_preconditioned(*block, used, self.damping_mode)
                for block in zip(a, g, gradients[name], strict=True)
            ]
            directions[name] = np.stack(blocks)
            length += np.sum(directions[name] * gradients[name])
        if self.kl_clip is not None:
            self.nu = min(1.0, np.sqrt(self.kl_clip / (rate**2 * abs(length))))
        for name, direction in directions.items():
            direction = direction * (self.nu if name in self.factors else 1.0)
            weights[name] = weights[name] * (1 - rate * self.weight_decay)
            velocity = self.momentum * self.velocity.get(name, 0.0) - rate * direction
            self.velocity[name] = velocity
            weights[name] = weights[name] + (self.momentum * velocity - rate * direction if self.nesterov else velocity)
        self.step += 1
