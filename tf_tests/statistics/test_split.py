"""The diagonal blocks that a training step leaves behind, against those of the dense factors."""

import keras
import numpy as np
import pytest

import keras_ngd
from keras_ngd.linalg import diagonal
from tf_tests import paper
from tf_tests.linalg.test_diagonal import slices
from tf_tests.reference import kronecker
from tf_tests.reference import rows as reference
from tf_tests.reference.running import close
from tf_tests.statistics.test_kronecker import (
    BATCH,
    CAPTURED,
    CHANNELS_FIRST,
    REDUCED,
    branches,
    squared_error_gradient,
)

pytestmark = pytest.mark.neutral


def observed(cases, split, sharing="expand"):
    """Every layer of `cases` with its statistics after one plain step and its dense factors."""
    model, layers, x, y = branches(cases)
    rows = [squared_error_gradient(*case) for case in zip(layers, x, y, strict=True)]
    keras_ngd.capture(model, paper.THOR(split=split, weight_sharing=sharing))
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", jit_compile=True)
    model.train_on_batch(x, y)
    for layer, (a, ghat) in zip(layers, rows, strict=True):
        yield layer, kronecker.input_factor(a, sharing), kronecker.output_factor(ghat, BATCH, sharing)


@pytest.mark.parametrize("split", [1, 2, 3, 8, 1000])
def test_blocks_are_those_of_the_dense_factors(split):
    for layer, *dense in observed(CAPTURED, split):
        check(layer, dense)


def check(layer, dense):
    statistics = layer.statistics
    found = [np.asarray(v) for v in statistics.averages]
    partitions = statistics.partitions(statistics.geometry)
    for factor, parts in zip(dense, partitions, strict=True):
        blocks, found = found[: len(parts)], found[len(parts) :]
        for part, i, at in slices(parts):
            # Relative to the factor: where borders are subtracted, a small block is a difference of large numbers.
            assert np.abs(blocks[part][:, i] - factor[:, at, at]).max() <= 1e-5 * np.abs(factor).max()
        assert parts != ((1, 0),)
        assert diagonal.dimension(parts) == factor.shape[1]


def test_reduced_blocks():
    for layer, *dense in observed({name: CAPTURED[name] for name in REDUCED}, 2, "reduce"):
        check(layer, dense)


def test_masked_rows_do_not_count():
    inputs = keras.Input((5, 6))
    layer = keras.layers.Dense(4)
    model = keras.Model(inputs, layer(keras.layers.Masking()(inputs)))
    x = np.random.default_rng(0).normal(size=(3, 5, 6)).astype("float32")
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    x *= mask[..., None]
    keras_ngd.capture(model, paper.THOR(split=4))
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse")
    model.train_on_batch(x, np.zeros((3, 5, 4)))
    factor = kronecker.input_factor(reference.layer_rows(layer, x), mask=mask)
    blocks = [np.asarray(v) for v in layer.statistics.averages]
    close(blocks[0][:, 0], factor[:, :4, :4], 1e-5)
    close(blocks[1][:, 0], factor[:, 4:6, 4:6], 1e-5)
    close(blocks[2][:, 0], factor[:, 6:, 6:], 1e-6)


def test_channels_first():
    for layer, *dense in observed(CHANNELS_FIRST, 3):
        check(layer, dense)
