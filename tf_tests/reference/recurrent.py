"""Recurrent layers and back-propagation through time, step by step and gate by gate.

Each kind has `step(weights, x, state)`, which computes one step of all examples and keeps what its derivative needs, and
`step_back(weights, kept, d)`, which gives the rows `(a, g)` of each of its matrices, those of one gate after the other's, and the
gradients of `x` and of the state. States are dicts of arrays `[examples, units]`; `"h"` is the output. Weights are a dict of
`"kernel"`, `"recurrent_kernel"` and `"bias"`, which is zero where a layer has none.
"""

import numpy as np


def sigmoid(s):
    return 1 / (1 + np.exp(-s))


def blocks(array, gates):
    """The columns of each gate."""
    return np.split(array, gates, axis=-1)


class SimpleRNN:
    gates, states = 1, ("h",)

    def step(self, w, x, state):
        s = x @ w["kernel"] + state["h"] @ w["recurrent_kernel"] + w["bias"]
        new = {"h": np.tanh(s)}
        return new, (x, state, new)

    def step_back(self, w, kept, d):
        x, state, new = kept
        g = d["h"] * (1 - new["h"] ** 2)
        rows = {"statistics": [(np.concatenate([x, state["h"]], axis=1), g)]}
        return rows, g @ w["kernel"].T, {"h": g @ w["recurrent_kernel"].T}


class LSTM:
    gates, states = 4, ("h", "c")

    def step(self, w, x, state):
        s = x @ w["kernel"] + state["h"] @ w["recurrent_kernel"] + w["bias"]
        i, f, candidate, o = blocks(s, 4)
        i, f, candidate, o = sigmoid(i), sigmoid(f), np.tanh(candidate), sigmoid(o)
        c = f * state["c"] + i * candidate
        return {"h": o * np.tanh(c), "c": c}, (x, state, i, f, candidate, o, c)

    def step_back(self, w, kept, d):
        x, state, i, f, candidate, o, c = kept
        dc = d["c"] + d["h"] * o * (1 - np.tanh(c) ** 2)
        gates = [
            dc * candidate * i * (1 - i),
            dc * state["c"] * f * (1 - f),
            dc * i * (1 - candidate**2),
            d["h"] * np.tanh(c) * o * (1 - o),
        ]
        g = np.concatenate(gates, axis=1)
        rows = {"statistics": [(np.concatenate([x, state["h"]], axis=1), g)]}
        return rows, g @ w["kernel"].T, {"h": g @ w["recurrent_kernel"].T, "c": dc * f}


class GRUAfter:
    """With `reset_after`: the bias is `[2, 3 * units]`, that of the inputs and that of the state."""

    gates, states = 3, ("h",)

    def step(self, w, x, state):
        x_z, x_r, x_h = blocks(x @ w["kernel"] + w["bias"][0], 3)
        h_z, h_r, h_h = blocks(state["h"] @ w["recurrent_kernel"] + w["bias"][1], 3)
        z, r = sigmoid(x_z + h_z), sigmoid(x_r + h_r)
        candidate = np.tanh(x_h + r * h_h)
        return {"h": z * state["h"] + (1 - z) * candidate}, (x, state, z, r, candidate, h_h)

    def step_back(self, w, kept, d):
        x, state, z, r, candidate, h_h = kept
        g_h = d["h"] * (1 - z) * (1 - candidate**2)
        g_z = d["h"] * (state["h"] - candidate) * z * (1 - z)
        g_r = g_h * h_h * r * (1 - r)
        of_inputs = np.concatenate([g_z, g_r, g_h], axis=1)
        of_state = np.concatenate([g_z, g_r, g_h * r], axis=1)
        rows = {"statistics": [(x, of_inputs)], "recurrent_statistics": [(state["h"], of_state)]}
        return rows, of_inputs @ w["kernel"].T, {"h": d["h"] * z + of_state @ w["recurrent_kernel"].T}


class GRUBefore:
    """Without: the candidate sees `r * h`, so that it has rows of its own."""

    gates, states = 3, ("h",)

    def step(self, w, x, state):
        of_state, h = blocks(w["recurrent_kernel"], 3), state["h"]
        s_z, s_r, s_h = blocks(x @ w["kernel"] + w["bias"], 3)
        z, r = sigmoid(s_z + h @ of_state[0]), sigmoid(s_r + h @ of_state[1])
        candidate = np.tanh(s_h + (r * h) @ of_state[2])
        return {"h": z * h + (1 - z) * candidate}, (x, state, z, r, candidate)

    def step_back(self, w, kept, d):
        x, state, z, r, candidate = kept
        of_state, h = blocks(w["recurrent_kernel"], 3), state["h"]
        g_h = d["h"] * (1 - z) * (1 - candidate**2)
        g_z = d["h"] * (h - candidate) * z * (1 - z)
        d_reset = g_h @ of_state[2].T
        g_r = d_reset * h * r * (1 - r)
        rows = {
            "statistics": [
                (np.concatenate([x, h], axis=1), g_z),
                (np.concatenate([x, h], axis=1), g_r),
                (np.concatenate([x, r * h], axis=1), g_h),
            ]
        }
        dx = np.concatenate([g_z, g_r, g_h], axis=1) @ w["kernel"].T
        return rows, dx, {"h": d["h"] * z + g_z @ of_state[0].T + g_r @ of_state[1].T + d_reset * r}


def forward(kind, w, x, start=None, mask=None):
    """States after each step, a list, and what `back` needs; hidden steps keep the state that they find."""
    units = w["recurrent_kernel"].shape[0]
    state = {name: np.zeros((len(x), units)) for name in kind.states} if start is None else start
    states, kept = [], []
    for t in range(x.shape[1]):
        seen = np.ones((len(x), 1)) if mask is None else mask[:, t : t + 1].astype("float64")
        new, of_step = kind.step(w, x[:, t], state)
        state = {name: seen * new[name] + (1 - seen) * state[name] for name in state}
        states.append(state)
        kept.append((of_step, seen))
    return states, kept


def back(kind, w, kept, upstream):
    """Rows of each matrix, `(a, ghat)` of `[groups, examples, steps, dim]`, of the outputs' gradients `[examples, steps, units]`.

    Also the gradient of the inputs.
    """
    d = {name: np.zeros_like(upstream[:, 0]) for name in kind.states}
    found, inputs = [], []
    for t in reversed(range(len(kept))):
        of_step, seen = kept[t]
        d = {**d, "h": d["h"] + upstream[:, t]}
        rows, dx, before = kind.step_back(w, of_step, {name: seen * value for name, value in d.items()})
        d = {name: (1 - seen) * d[name] + before[name] for name in d}
        found.append(rows)
        inputs.append(dx)
    by_matrix = {}
    for name in found[0]:
        steps = [of_step[name] for of_step in reversed(found)]
        by_matrix[name] = tuple(
            np.stack([np.stack([step[gate][side] for step in steps], axis=1) for gate in range(len(steps[0]))])
            for side in range(2)
        )
    return by_matrix, np.stack(inputs[::-1], axis=1)
