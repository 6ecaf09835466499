"""Replicas of a `tf.distribute` strategy train as one device with all their examples would."""

import re

import numpy as np
import pytest

from tf_tests.distributed import cases, replicas
from tf_tests.small import relative_distance, weights

pytestmark = [*replicas.tensorflow_only, pytest.mark.slow]
METHODS = ["kfac", "kfac-eigen", "tokens-eigen-adam", "thor", "skfac", "sngd", "hylo-kid", "hylo-kis", "tokens-sngd"]
METHODS += ["kfac-stagger"]
# Those that `tf_tests/test_obligations.py` does not try.
ON_TWO = ["kfac-eigen", "kfac-stagger", "tokens-eigen-adam", "hylo-kis", "tokens-sngd"]
COMPRESSING = ["hylo-switch"]
ON_FOUR = ["kfac", "thor", "hylo-kis"]
ON_WORKERS = ["kfac", "thor", "skfac", "sngd", "hylo-kid"]


@pytest.fixture(scope="module")
def alone():
    """The weights after 20 steps of one device with whole batches, by method."""
    found = {}
    for name in METHODS:
        model = cases.prepared(name)
        cases.fit(model, *cases.data())
        found[name] = weights(model)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return replicas.mirrored("methods", 2, tmp_path_factory.mktemp("two"), names=[*ON_TWO, *COMPRESSING])


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return replicas.mirrored("methods", 4, tmp_path_factory.mktemp("four"), names=ON_FOUR)


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    return replicas.workers("methods", 2, tmp_path_factory.mktemp("workers"), names=ON_WORKERS)


@pytest.mark.parametrize("method", ON_TWO)
def test_two_replicas_equal_one_device(alone, two, method):
    assert relative_distance(two[method]["weights"], alone[method]) < 1e-5
    assert not two[method]["jit"]


@pytest.mark.parametrize("method", ON_FOUR)
def test_four_replicas_equal_one_device(alone, four, method):
    assert relative_distance(four[method]["weights"], alone[method]) < 1e-5
    assert four[method]["same"]


@pytest.mark.parametrize("method", [*ON_TWO, *COMPRESSING])
def test_replicas_have_the_same_bits(two, method):
    assert two[method]["same"]


@pytest.mark.parametrize("method", ON_WORKERS)
def test_two_processes_equal_one_device_and_each_other(alone, workers, method):
    first, second = (worker[method]["weights"] for worker in workers)
    assert relative_distance(first, alone[method]) < 1e-5
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path], err_msg=path)


def test_replicas_agree_on_the_scale_of_the_loss(tmp_path):
    names = ["kfac", "kfac-auto", "sngd-auto"]
    found = replicas.mirrored("weighted", 2, tmp_path, names=names)
    x, y, given = cases.weighted_data()
    for name in names:
        model = cases.prepared(name)
        model.fit(x, y, sample_weight=given, batch_size=cases.BATCH, shuffle=False, verbose=0)
        assert found[name]["ratio"] == pytest.approx(model.optimizer.loss_ratio, rel=1e-5)
        assert (found[name]["ratio"] == 1) == (name == "kfac")
        assert relative_distance(found[name]["weights"], weights(model)) < 1e-5


def test_what_is_for_tpus_equals_one_device(alone, tmp_path):
    names = ["kfac", "thor", "skfac", "hylo-kis"]
    found = replicas.mirrored("traced_as_one", 2, tmp_path, names=names)
    for name in names:
        assert relative_distance(found[name]["weights"], alone[name]) < 1e-5
        assert found[name]["same"]


def test_unequal_and_empty_shares_count_by_examples(tmp_path):
    found = replicas.mirrored("uneven", 2, tmp_path, names=["kfac", "sngd"])
    assert set(found) == {(name, rest) for name in ("kfac", "sngd") for rest in (5, 1)}
    for shared in found.values():
        assert shared["distance"] < 1e-5
        assert shared["same"]
        assert shared["skipped"] == (0, 0)
        assert np.isfinite(shared["accuracy"]).all()


def test_settings_of_keras_do_what_they_do_on_one_device(tmp_path):
    for what, distance in replicas.mirrored("settings", 2, tmp_path).items():
        assert distance < 1e-5, what


def test_training_goes_on_from_what_was_saved(tmp_path):
    """On replicas bit for bit; on one device as if it had been there all along, with new rows."""
    found = replicas.mirrored("resumed", 2, tmp_path, names=["kfac", "thor"], path=str(tmp_path))
    for name in ("kfac", "thor"):
        assert found[name]["replicas"] == 0
        assert found[name]["one"] < 1e-5
        assert found[name]["steps"] == [16, 16, 16]
        assert found[name]["same"]


def test_replicas_draw_different_samples(tmp_path):
    for first, second in replicas.mirrored("samples", 2, tmp_path):
        assert np.isfinite(first).all()
        assert not np.array_equal(first, second)


REFUSED = {
    "optimizer outside": "must be made in the scope of the same strategy.*a model of MirroredStrategy, an optimizer of",
    "model outside": "must be made in the scope of the same strategy.*an optimizer of MirroredStrategy",
    "fraction": "all hold all inverses.*Received: gradient_worker_fraction=0.5",
    "communicator": "Under MirroredStrategy replicas talk to each other by themselves.*communicator='horovod'",
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ParameterServerStrategy", "step one by one, with no gradient of all to precondition"),
        ("experimental.CentralStorageStrategy", "keras_ngd trains under .*Received: CentralStorageStrategy"),
    ],
)
def test_strategies_that_cannot_serve_are_refused(name, message):
    import operator

    import tensorflow as tf

    from keras_ngd.distributed.strategies import strategy_of

    kind = operator.attrgetter(name)(tf.distribute)

    class Several(kind):
        num_replicas_in_sync = 2

        def __init__(self):
            pass

    class Owner:
        _distribution_strategy = Several()

    Several.__name__ = kind.__name__
    with pytest.raises(ValueError, match=message):
        strategy_of(Owner())


def test_what_cannot_be_trained_is_an_error(tmp_path):
    found = replicas.mirrored("refused", 2, tmp_path, kinds=list(REFUSED))
    for kind, message in REFUSED.items():
        assert re.search(message, found[kind], re.DOTALL), (kind, found[kind])


def test_replicas_that_draw_the_labels_that_one_would_equal_it(tmp_path):
    names = ["kfac-drawn", "thor-drawn"]
    found = replicas.mirrored("drawn", 2, tmp_path, names=names, parts=2)
    for name in names:
        with cases.same_noise():
            model = cases.prepared(name)
            cases.fit(model, *cases.data(5 * cases.BATCH))
        assert relative_distance(found[name]["weights"], weights(model)) < 1e-5
        assert found[name]["same"]
