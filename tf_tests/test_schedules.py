"""Intervals that grow, and the learning rates and dampings of the THOR paper."""

import itertools
import math

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_ngd
from keras_ngd import schedules
from keras_ngd.schedules import GrowingInterval, WarmupPolynomialDecay, thor_schedules
from tf_tests import paper
from tf_tests.small import array, captured, fit, kfac, mlp, regression


def at(schedule, step):
    return float(keras.ops.convert_to_numpy(schedule(step)))


def geometric(initial, growth, maximum, updates):
    """The steps of the updates, one after the other."""
    step, interval = 0, initial
    for _ in range(updates):
        yield step, interval
        step, interval = step + interval, min(maximum, math.ceil(round(growth * interval, 9)))


class TestGrowingInterval:
    @given(st.integers(1, 20), st.sampled_from([1.0, 1.1, 1.5, 2.0, 3.0]), st.integers(0, 100))
    def test_grows_from_update_to_update(self, initial, growth, more):
        schedule = GrowingInterval(initial, growth, initial + more)
        for step, interval in geometric(initial, growth, initial + more, 12):
            assert at(schedule, step) == interval
            assert at(schedule, step + interval - 1) == interval

    def test_is_piecewise_constant(self):
        schedule = GrowingInterval(boundaries=[100, 500], values=[5, 20, 80])
        assert [at(schedule, s) for s in (0, 99, 100, 499, 500, 10**6)] == [5, 5, 20, 20, 80, 80]

    def test_decides_when_an_optimizer_updates(self):
        optimizer = kfac(inverse_interval=GrowingInterval(1, 2.0, 8), factor_interval=1)
        model = captured(mlp(), optimizer)
        refreshes = []
        record = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: refreshes.append(optimizer.inverse_updates)
        )
        x, y = regression()
        fit(model, x[:8], y[:8], epochs=20, callbacks=[record])
        expected = [0, 1, 3, 7, 15]
        assert refreshes == [sum(step <= epoch for step in expected) for epoch in range(20)]

    def test_comes_back_from_its_config(self):
        for schedule in (GrowingInterval(3, 1.5, 30), GrowingInterval(boundaries=[4], values=[1, 9])):
            again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule))
            assert [at(again, s) for s in range(40)] == [at(schedule, s) for s in range(40)]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "either"),
            ({"initial": 1, "values": [1]}, "either"),
            ({"initial": 0, "maximum": 9}, "`initial`.*initial=0"),
            ({"initial": 5}, "`maximum`"),
            ({"initial": 5, "maximum": 4}, "no less than"),
            ({"initial": 5, "growth": 0.5, "maximum": 9}, "growth=0.5"),
            ({"values": [1, 0], "boundaries": [5]}, "values=0"),
            ({"values": [1, 2, 3], "boundaries": [5]}, "one entry more"),
            ({"values": [1, 2, 3], "boundaries": [5, 5]}, "must increase"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            GrowingInterval(**arguments)


@keras.saving.register_keras_serializable("tf_tests")
class Nothing(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.0 * keras.ops.cast(step, "float32")

    def get_config(self):
        return {}


@pytest.mark.parametrize("name", ["factor_interval", "inverse_interval"])
@pytest.mark.parametrize("kind", [keras_ngd.KFAC, keras_ngd.THOR])
def test_an_interval_schedule_of_zero(kind, name):
    with pytest.raises(ValueError, match=f"`{name}` must be a schedule of intervals.*0.0 at step 0"):
        kind(**{name: Nothing()})


class TestPaper:
    """Spot values of eq. 13 to 16."""

    def test_cifar10(self):
        found = thor_schedules("cifar10", 10)
        for epoch, factor in ((0, 1.0), (29.9, 1.0), (30, 0.1), (65, 0.01)):
            np.testing.assert_allclose(at(found["learning_rate"], int(epoch * 10)), 0.1 * factor, rtol=1e-5)
            np.testing.assert_allclose(at(found["damping"], int(epoch * 10)), 0.3 * factor, rtol=1e-5)

    def test_imagenet_256(self):
        found = thor_schedules("imagenet-256", 100)
        for epoch, rate in ((0, 0.045), (10, 0.0178456), (35, 7.03125e-4), (40, 2.78838e-4), (70, 0.0), (90, 0.0)):
            np.testing.assert_allclose(at(found["learning_rate"], epoch * 100), rate, rtol=1e-4, atol=1e-9)
        for epoch, damping in ((0, 0.03), (10, 0.0261), (40, 0.0171869)):
            np.testing.assert_allclose(at(found["damping"], epoch * 100), damping, rtol=1e-4)

    def test_imagenet_4096(self):
        rate = thor_schedules("imagenet-4096", 100)["learning_rate"]
        for epoch, expected in ((0, 0.005), (5, 0.45), (6, 0.403087), (40, 1.04044e-3), (60, 0.0), (80, 0.0)):
            np.testing.assert_allclose(at(rate, epoch * 100), expected, rtol=1e-4, atol=1e-9)

    def test_warm_up_is_continuous_and_comes_back(self):
        schedule = WarmupPolynomialDecay(0.01, 0.8, 50, 480, 6)
        assert abs(at(schedule, 50) - at(schedule, 51)) < 0.012
        again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule))
        assert at(again, 77) == at(schedule, 77)

    def test_every_preset_trains_thor(self):
        x, y = regression()
        for preset in schedules.THOR_PRESETS:
            optimizer = paper.THOR(**thor_schedules(preset, 4))
            assert keras_ngd.THOR.from_config(optimizer.get_config()).get_config() == optimizer.get_config()
        model = captured(mlp(), optimizer)
        fit(model, x, y)
        np.testing.assert_allclose(array(optimizer.learning_rate), at(optimizer._learning_rate, 4), rtol=1e-6)

    @pytest.mark.parametrize(
        ("arguments", "message"), [(("cifar100", 10), "one of"), (("cifar10", 0), "`steps_per_epoch`")]
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            thor_schedules(*arguments)


def test_growing_never_ends_below_one():
    steps = list(itertools.islice(geometric(1, 1.0, 1, 5), 5))
    assert [s for s, _ in steps] == [0, 1, 2, 3, 4]
    assert at(GrowingInterval(1, 1.0, 1), 10**6) == 1
