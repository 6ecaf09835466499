"""How state is cut for devices, and what is refused without any; training on several is in `distributed/test_devices.py`."""

import types

import keras
import numpy as np
import pytest

import keras_ngd
from keras_ngd import sharding
from tf_tests import paper
from tf_tests.small import array, captured, mlp


def spread(shape, devices=8, shard=True):
    """A `Spread` on so many devices, of which only the number matters here."""
    return sharding.Spread(types.SimpleNamespace(size=devices), shape, shard)


@pytest.mark.parametrize(
    ("shape", "axis", "stored"),
    [
        ((1, 129, 129), 1, (1, 136, 129)),
        ((1, 128, 128), 1, (1, 128, 128)),
        ((2, 9, 128, 128), 2, (2, 9, 128, 128)),
        # Along the layers, where this takes less to be filled up.
        ((16, 9, 9), 0, (16, 9, 9)),
        ((16, 24, 24), 0, (16, 24, 24)),
        ((12, 24, 24), 1, (12, 24, 24)),
        # Along the blocks, where these have fewer rows than there are devices.
        ((1, 18, 4, 4), 1, (1, 24, 4, 4)),
        ((1, 4, 4), None, (1, 4, 4)),
        ((64, 64), None, (64, 64)),
        ((64,), None, (64,)),
        ((), None, ()),
    ],
)
def test_the_axis_that_takes_the_fewest_zeros_is_cut(shape, axis, stored):
    found = spread(shape)
    assert found.axis == axis
    assert found.stored_shape == stored
    assert spread(shape, shard=False).axis is None
    tensor = np.random.default_rng(0).normal(size=shape).astype("float32")
    filled = array(found.filled(keras.ops.convert_to_tensor(tensor)))
    assert filled.shape == stored
    assert np.sum(filled != 0) == tensor.size
    np.testing.assert_array_equal(array(found.gathered(keras.ops.convert_to_tensor(filled))), tensor)


def test_arrays_of_checkpoints_are_filled_up_for_their_variables():
    variable, found = keras.Variable(np.zeros((1, 16, 9), "float32")), spread((1, 9, 9))
    variable.keras_ngd_spread = found
    whole = np.arange(81, dtype="float32").reshape(1, 9, 9)
    variable.assign(sharding.from_numpy(variable, whole))
    np.testing.assert_array_equal(sharding.to_numpy(variable), whole)
    assert sharding.shape_of(variable) == (1, 9, 9)


@pytest.mark.parametrize("method", ["KFAC", "THOR", "EKFAC", "EigenAdam", "SKFAC", "SNGD", "HyLo"])
def test_sharded_state_needs_several_devices(method):
    with pytest.raises(ValueError, match="no `keras.distribution` of several devices is active"):
        getattr(keras_ngd, method)(shard_state=True)


def test_a_configuration_of_sharded_state_is_for_whole_state_on_one_device():
    config = paper.KFAC().get_config()
    assert "shard_state" not in config
    with pytest.warns(UserWarning, match="whole again"):
        optimizer = keras_ngd.KFAC.from_config({**config, "shard_state": True})
    assert "shard_state" not in optimizer.get_config()


def test_statistics_remember_how_they_are_to_lie():
    statistics = paper.KFAC().make_statistics(None)
    statistics.shard_state = True
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(statistics))
    assert again.shard_state
    assert again.spec == paper.KFAC().make_statistics(None).spec


def test_statistics_of_frozen_layers_are_saved(tmp_path):
    model = captured(mlp())
    layer = model.get_layer("hidden")
    layer.statistics.input_factor.assign(np.full((1, 5, 5), 3.0))
    layer.trainable = False
    model.save_weights(tmp_path / "all.weights.h5")
    layer.statistics.input_factor.assign(np.zeros((1, 5, 5)))
    model.load_weights(tmp_path / "all.weights.h5")
    np.testing.assert_array_equal(array(layer.statistics.input_factor), np.full((1, 5, 5), 3.0))
