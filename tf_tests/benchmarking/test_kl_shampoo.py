"""The benchmarks' KL-Shampoo against float64."""

import keras
import numpy as np
import pytest

from benchmarks.kl_shampoo import KLShampoo


class Reference:
    """KL-Shampoo of one matrix, in float64."""

    def __init__(self, momentum, decay, interval):
        self.momentum, self.decay, self.interval, self.gradients = momentum, decay, interval, []

    def direction(self, v):
        """What becomes of the next gradient."""
        (i, o), step = v.shape, len(self.gradients)
        if step == 0:
            size = np.sqrt(np.mean(v**2))
            self.left, self.right = size * np.eye(i), size * np.eye(o)
            self.used = self.left, self.right
        left, right = self.used
        self.left = self.decay * self.left + (1 - self.decay) * v @ np.linalg.inv(right) @ v.T / o
        self.right = self.decay * self.right + (1 - self.decay) * v.T @ np.linalg.inv(left) @ v / i
        if step % self.interval == 0:
            self.used = self.left, self.right
        self.gradients.append(v)
        # The weight of each gradient in the mean, and in the one that looks ahead.
        weights = (1 - self.momentum) * self.momentum ** np.arange(step + 1)[::-1]
        weights = self.momentum * weights
        weights[-1] += 1 - self.momentum
        ahead = sum(w * g for w, g in zip(weights, self.gradients, strict=True)) / np.sqrt(np.sum(weights**2))
        return root(self.used[0]) @ ahead @ root(self.used[1])


def root(factor):
    """`F^-1/2`."""
    values, vectors = np.linalg.eigh(factor)
    return vectors @ np.diag(values**-0.5) @ vectors.T


def gradients(shape, steps=7, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=shape))
    return [(scale * rng.normal(size=shape)).astype("float32") for _ in range(steps)]


@pytest.mark.parametrize(("shape", "matrix"), [((4, 3), (4, 3)), ((2, 2, 3, 5), (12, 5)), ((4, 2, 3), (4, 6))])
def test_its_steps_are_those_of_float64(shape, matrix):
    variable = keras.Variable(np.zeros(shape, "float32"))
    optimizer, reference = KLShampoo(1.0, 0.9, 0.8, interval=3), Reference(0.9, 0.8, 3)
    for v in gradients(shape):
        before = keras.ops.convert_to_numpy(variable)
        optimizer.apply([keras.ops.convert_to_tensor(v)], [variable])
        expected = reference.direction(v.reshape(matrix).astype("float64")).reshape(shape)
        np.testing.assert_allclose(before - keras.ops.convert_to_numpy(variable), expected, rtol=2e-3, atol=2e-3)


def test_the_scale_of_the_loss_does_not_matter():
    ends = []
    for scale in (1.0, 1e-3):
        variable = keras.Variable(np.zeros((4, 3), "float32"))
        optimizer = KLShampoo(0.1)
        for v in gradients((4, 3)):
            optimizer.apply([keras.ops.convert_to_tensor(scale * v)], [variable])
        ends.append(keras.ops.convert_to_numpy(variable))
    np.testing.assert_allclose(*ends, rtol=1e-3, atol=1e-4)


def test_what_is_no_matrix_takes_adams_step():
    variables = [keras.Variable(np.zeros(5, "float32")) for _ in range(2)]
    optimizers = KLShampoo(0.1), keras.optimizers.Adam(0.1, epsilon=1e-8)
    for v in gradients((5,)):
        for optimizer, variable in zip(optimizers, variables, strict=True):
            optimizer.apply([keras.ops.convert_to_tensor(v)], [variable])
    np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, variables), rtol=1e-4)


def test_a_compiled_model_trains_with_it():
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(0, 7, (32, 6)), rng.integers(0, 3, 32)
    layers = [keras.layers.Embedding(7, 4), keras.layers.Conv1D(4, 3), keras.layers.Flatten(), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((6,), dtype="int32"), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(KLShampoo(0.02, interval=2), loss)
    losses = model.fit(tokens, labels, batch_size=16, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
