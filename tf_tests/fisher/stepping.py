"""Single steps of captured and plain models under Keras's SGD, whose updates are gradients, with labels drawn or not."""

import keras
import numpy as np

import keras_ngd
from tf_tests import small

# The examples of a batch, and how many have their labels drawn where no fraction is given.
BATCH, DRAWN = 16, 4


def all_statistics(model):
    """Those of all captured layers, in their order."""
    found = {id(s): s for v in model.trainable_variables if (s := getattr(v, "keras_ngd_statistics", None)) is not None}
    return list(found.values())


def set_draw(model, number, seed=0):
    """Has labels drawn in the next step; not, where `number` is None."""
    for statistics in all_statistics(model):
        statistics.label_draw.assign([0.0, 0.0, 0.0] if number is None else [1.0, seed, number])


class Step:
    """A model's updates in one step at a learning rate of 1.

    Args:
        make: function of no arguments that makes the model.
        optimizer: what it is captured for; None where it stays plain.
        compiling: arguments of `compile`.
        include: of `capture`.
    """

    def __init__(self, make, optimizer=None, include=None, **compiling):
        keras.utils.set_random_seed(1)
        self.model, self.optimizer = make(), optimizer
        rng = np.random.default_rng(5)
        for variable in self.model.trainable_variables:
            variable.assign(small.array(variable) + 0.2 * rng.normal(size=variable.shape))
        if optimizer is not None:
            keras_ngd.capture(self.model, optimizer, include=include)
        self.model.compile(**{"optimizer": keras.optimizers.SGD(1.0), "jit_compile": small.JIT, **compiling})
        self.start = [small.array(v) for v in self.model.weights]

    def __call__(self, x, y, sample_weight=None, draw=None, seed=0):
        """By path, what the step takes off each weight of the model's own."""
        for variable, value in zip(self.model.weights, self.start, strict=True):
            variable.assign(value)
        if self.optimizer is not None:
            set_draw(self.model, draw, seed)
        before = small.weights(self.model)
        self.model.train_on_batch(x, y, sample_weight=sample_weight)
        after = small.weights(self.model)
        trained = {v.path for v in self.model.trainable_variables}
        return {path: before[path] - after[path] for path in before if path in trained}


def part(data, rows):
    """These rows of arrays, of lists and dicts of arrays, or None."""
    return keras.tree.map_structure(lambda a: None if a is None else a[rows], data)


def assert_equal_gradients(found, expected, tolerance=1e-5):
    """Asserts that two dicts hold the same numbers, up to so much of the largest of each."""
    # Where attention has a bias that makes no difference, rounding is all there is.
    largest = max(np.max(np.abs(value)) for value in expected.values())
    for (path, value), other in zip(found.items(), expected.values(), strict=True):
        scale = max(np.max(np.abs(other)), 1e-2 * largest)
        np.testing.assert_allclose(value / scale, other / scale, atol=tolerance, err_msg=path)
