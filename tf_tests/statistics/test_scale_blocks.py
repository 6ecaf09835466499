"""The Fisher blocks of scales and offsets that are observed of one batch, against loops in float64."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ngd.layers import ScaleGeometry
from keras_ngd.statistics import UnitWiseStatistics
from tf_tests.reference import normalization as reference
from tf_tests.reference.running import close, run

SHAPE = (4, 3, 5)
PARAMETERS = {"both": (True, True), "scale": (True, False), "offset": (False, True)}


def draw(seed=0):
    """Normalized inputs, and gradients of what comes out."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(SHAPE).astype("float32") for _ in range(2)]


def observe(x, ds, scale=True, center=True, losses_per_example=1, dtype="float32"):
    """The blocks, and the scalar that tells whether they are finite."""
    statistics, geometry = UnitWiseStatistics(losses_per_example), ScaleGeometry(SHAPE[2:], [-1], scale, center)

    def function(x, ds):
        [blocks], total = statistics.observe(geometry, x, ds, None, [], dtype)
        return blocks, total

    return run(function, x, ds)


def expected(x, ds, scale=True, center=True, divisor=SHAPE[0]):
    layer = keras.layers.LayerNormalization(scale=scale, center=center)
    return reference.blocks(reference.Reference(layer, SHAPE).unit_rows(x, ds), divisor)[None]


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
def test_blocks_of_a_batch(parameters):
    x, ds = draw()
    blocks, total = observe(x, ds, *parameters)
    close(blocks, expected(x, ds, *parameters), 1e-5)
    assert np.isfinite(total)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_total(value):
    x, ds = draw()
    ds[1, ..., 2] = value
    assert not np.isfinite(observe(x, ds)[1])


def test_losses_per_example():
    x, ds = draw()
    close(observe(x, ds, losses_per_example=2.5)[0], expected(x, ds, divisor=2.5 * SHAPE[0]), 1e-5)


def test_low_precision_is_widened_before_anything_is_summed():
    x, ds = (np.asarray(ops.cast(t, "bfloat16")).astype("float32") for t in draw())
    statistics, geometry = UnitWiseStatistics(), ScaleGeometry(SHAPE[2:], [-1], True, True)

    def function(x, ds):
        x, ds = ops.cast(x, "bfloat16"), ops.cast(ds, "bfloat16")
        return statistics.observe(geometry, x, ds, None, [], "float32")[0][0]

    blocks = run(function, x, ds)
    assert blocks.dtype == "float32"
    close(blocks, expected(x, ds), 1e-5)


def test_float64(float64):
    x, ds = (t.astype("float64") for t in draw())
    close(observe(x, ds, dtype="float64")[0], expected(x, ds), 1e-12)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_shows(side, value):
    batch = draw()
    batch[side][1, 2, 3] = value
    assert not np.isfinite(observe(*batch)[1])
    assert np.isfinite(observe(*draw())[1])


def test_arguments_come_back_from_the_configuration():
    statistics = UnitWiseStatistics(2.5)
    assert UnitWiseStatistics.from_config(statistics.get_config()).spec == statistics.spec
    assert statistics.spec != UnitWiseStatistics().spec
    with pytest.raises(ValueError, match="losses_per_example"):
        UnitWiseStatistics(0)


def test_parameters_are_one_matrix():
    geometry = ScaleGeometry((2, 3), [1, 2], True, True)
    gamma, beta = np.arange(6.0, dtype="float32").reshape(2, 3), -np.ones((2, 3), "float32")
    matrix = run(lambda *parameters: geometry.to_matrix(parameters), gamma, beta)
    np.testing.assert_array_equal(matrix, [[range(6), [-1] * 6]])
    for found, original in zip(run(geometry.from_matrix, matrix), (gamma, beta), strict=True):
        np.testing.assert_array_equal(found, original)
