"""SNGD's steps against dense solves with the Fisher blocks of per-example gradients."""

import keras
import numpy as np

import keras_ngd
from tf_tests import paper, small
from tf_tests.reference import fisher, low_rank
from tf_tests.reference.rows import layer_matrix
from tf_tests.reference.running import close, error
from tf_tests.small import captured, fit, mlp, regression
from tf_tests.statistics.test_kronecker import branches, convolution, dense, draw, squared_error_gradient

BATCH = 8

# Without activations, which Keras computes in float32 on JAX, and with numbers of outputs that are powers of two, by which
# Keras there divides in float32.
CASES = {
    "dense": lambda: (dense(4), (5,)),
    "sequence": lambda: (dense(4, use_bias=False), (2, 5)),
    "convolution": lambda: (convolution(2, 4, 3, padding="same"), (4, 4, 2)),
    "grouped": lambda: (convolution(1, 4, 2, groups=2, strides=2), (8, 4)),
}


class Steps:
    """A model of many layers side by side, and its steps."""

    def __init__(self, optimizer):
        self.model, self.layers, _, _ = branches(CASES)
        keras_ngd.capture(self.model, optimizer)
        self.model.compile(optimizer=optimizer, loss="mse", jit_compile=small.JIT)

    def batch(self, seed, examples=BATCH):
        shapes = [[tensor.shape[1:] for tensor in side] for side in (self.model.inputs, self.model.outputs)]
        return [
            [draw(examples, *shape, seed=[seed, i, j]).astype(keras.config.floatx()) for j, shape in enumerate(side)]
            for i, side in enumerate(shapes)
        ]

    def set_weights(self, values):
        for variable, value in zip(self.model.weights, values, strict=True):
            variable.assign(value)

    def step(self, x, y):
        """For each layer what the step subtracts from its matrix, and what a solve with the Fisher block is made of."""
        rows = [squared_error_gradient(*batch) for batch in zip(self.layers, x, y, strict=True)]
        before = [layer_matrix(layer) for layer in self.layers]
        self.model.train_on_batch(x, y)
        return [(old - layer_matrix(la), *pair) for old, la, pair in zip(before, self.layers, rows, strict=True)]


def gradient(a, ghat):
    return np.einsum("knti,knto->kio", a, ghat)


def preconditioned(a, ghat, damping):
    """`(F + damping I)^-1 V`, the Fisher block of layers with one position made of per-example gradients."""
    v = gradient(a, ghat)
    if a.shape[2] > 1:
        rows = low_rank.example_rows(a, ghat, a.shape[1])
        return np.stack([low_rank.dense_preconditioned(*block, damping) for block in zip(*rows, v, strict=True)])
    blocks = fisher.fisher_blocks(a, ghat, a.shape[1]) + damping * np.eye(v[0].size)
    return np.stack([np.linalg.solve(*block) for block in zip(blocks, v.reshape(len(v), -1, 1), strict=True)]).reshape(
        v.shape
    )


def sngd(**kwargs):
    return paper.SNGD(**{"batch_size": BATCH, "kl_clip": None, "momentum": 0.0, "learning_rate": 1.0, **kwargs})


def test_steps_are_dense_solves(float64):
    """At a damping that leaves the gradient alone, at one that matters, and at one that hardly does."""
    dampings = [2.0**20, 2.0**-2, 2.0**-8]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], dampings)
    steps = Steps(sngd(damping=schedule))
    for i, damping in enumerate(dampings):
        for found, a, ghat in steps.step(*steps.batch(seed=i)):
            close(found, preconditioned(a, ghat, damping), 1e-9 if damping < 1 else 1e-6)
            if damping > 1:
                close(found * damping, gradient(a, ghat), 1e-5)
            else:
                assert error(found * damping, gradient(a, ghat)) > 0.05


def test_steps_in_float32_smaller_batches_and_batches_in_another_order():
    steps = Steps(sngd(damping=2.0**-3))
    start = [small.array(v) for v in steps.model.weights]
    x, y = steps.batch(seed=0)
    first = steps.step(x, y)
    for found, a, ghat in first:
        close(found, preconditioned(a, ghat, 2.0**-3), 1e-4)
    order = np.random.default_rng(0).permutation(BATCH)
    steps.set_weights(start)
    again = steps.step([t[order] for t in x], [t[order] for t in y])
    for (found, *_), (expected, *_) in zip(again, first, strict=True):
        close(found, expected, 1e-4)
    steps.set_weights(start)
    for found, a, ghat in steps.step([t[:5] for t in x], [t[:5] for t in y]):
        assert a.shape[1] == 5
        close(found, preconditioned(a, ghat, 2.0**-3), 1e-4)


def test_between_updates_the_last_recorded_batch_counts():
    """Rows and inverses of the same batch, whatever was seen since."""
    optimizer = sngd(interval=2, learning_rate=1.0, damping=2.0**-3)
    steps = Steps(optimizer)
    first = steps.batch(seed=0)
    recorded = [low_rank.example_rows(a, ghat, BATCH) for _, a, ghat in steps.step(*first)]
    for rows, (found, a, ghat) in zip(recorded, steps.step(*steps.batch(seed=1)), strict=True):
        blocks = zip(*rows, gradient(a, ghat), strict=True)
        close(found, np.stack([low_rank.dense_preconditioned(*block, 2.0**-3) for block in blocks]), 1e-4)
        assert error(found, preconditioned(a, ghat, 2.0**-3)) > 0.01
    assert optimizer.factor_updates == optimizer.inverse_updates == 1


def test_trains():
    model = captured(mlp(), paper.SNGD(batch_size=8, damping=0.01))
    losses = fit(model, *regression(), epochs=6).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    assert model.optimizer.factor_updates == model.optimizer.inverse_updates == 24
    assert model.optimizer.skipped_steps == model.optimizer.skipped_statistics == 0
