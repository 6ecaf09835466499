"""Several workers train as one with all their examples would, and stay equal to the last bit."""

import os

import pytest

from tf_tests.distributed import cases
from tf_tests.distributed.launch import horovod, launch
from tf_tests.small import relative_distance, weights

pytestmark = [*horovod, pytest.mark.slow]
# Of two workers, after which all their bits are compared.
STEPS = int(os.environ.get("DISTRIBUTED_STEPS", "40"))
# On two, a half is one worker.
ON_TWO = [name for name in cases.METHODS if name != "kfac-mem-opt"]
DRAWN = ["kfac-drawn", "sp-ngd-drawn", "thor-drawn", "sngd-drawn"]
COMPRESSING = [
    "kfac-bfloat16",
    "sp-ngd-bfloat16",
    "hylo-switch",
    "hylo-random",
    "skfac-subsample",
    "tokens-soap",
    "tokens-eigen-adam-stagger",
    *DRAWN,
]
ON_FOUR = ["kfac", "sp-ngd", "kfac-half", "thor-half", "skfac", "hylo-kid"]
# Alone, fractions of one worker are all the same; and HyLo with all rows is SNGD, by another computation.
SAME_ALONE = {
    "kfac-mem-opt": "kfac",
    "sp-ngd": "kfac",
    "kfac-half": "kfac",
    "thor-half": "thor",
    "hylo-kid": "sngd",
    "hylo-kis": "sngd",
}


@pytest.fixture(scope="module")
def alone():
    """The weights after 20 steps of one worker with whole batches, by method."""
    found = {}
    for name in set(cases.METHODS) - set(SAME_ALONE):
        model = cases.prepared(name)
        cases.fit(model, *cases.data())
        found[name] = weights(model)
    return found | {name: found[same] for name, same in SAME_ALONE.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What all methods leave on two workers, by rank."""
    names = [*ON_TWO, *COMPRESSING]
    return launch("methods", 2, tmp_path_factory.mktemp("two"), names=names, steps=STEPS)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What some leave on four, where a fraction of a half is neither one worker nor all."""
    return launch("methods", 4, tmp_path_factory.mktemp("four"), names=ON_FOUR, steps=40)


def check_equal_to_one(expected, workers, method):
    for worker in workers:
        assert relative_distance(worker[method]["weights"], expected[method]) < 1e-5


def check_same_bits(workers, method):
    for worker in workers:
        assert worker[method]["digests"] == workers[0][method]["digests"]
        assert worker[method]["finite"]


@pytest.mark.parametrize("method", ON_TWO)
def test_two_workers_equal_one_with_all_examples(alone, two, method):
    check_equal_to_one(alone, two, method)


@pytest.mark.parametrize("method", ON_FOUR)
def test_four_workers_equal_one_with_all_examples(alone, four, method):
    check_equal_to_one(alone, four, method)


@pytest.mark.parametrize("method", [*ON_TWO, *COMPRESSING])
def test_weights_and_state_are_the_same_bits_on_two_workers(two, method):
    check_same_bits(two, method)


@pytest.mark.parametrize("method", ON_FOUR)
def test_weights_and_state_are_the_same_bits_on_four_workers(four, method):
    check_same_bits(four, method)


@pytest.mark.parametrize(("method", "stage"), [("kfac", "inverses"), ("sp-ngd", "statistics")])
def test_fewer_bits_on_the_wire_train_nearly_as_well(two, method, stage):
    for worker in two:
        exact, short = worker[method], worker[f"{method}-bfloat16"]
        assert short["received"][stage] * 2 == exact["received"][stage] > 0
        assert short["received"]["gradients"] == exact["received"]["gradients"]
        assert 0 < relative_distance(short["weights"], exact["weights"]) < 0.02


def test_workers_that_draw_the_labels_that_one_would_equal_it(tmp_path):
    workers = launch("drawn", 2, tmp_path, names=DRAWN)
    for name in DRAWN:
        with cases.same_noise():
            model = cases.prepared(name)
            cases.fit(model, *cases.data())
        for worker in workers:
            assert relative_distance(worker[name], weights(model)) < 1e-5
