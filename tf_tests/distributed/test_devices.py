"""Training under a `keras.distribution` equals training on one device, with whole and with sharded state."""

import keras
import pytest

from tf_tests.distributed import devices
from tf_tests.small import relative_distance

pytestmark = [
    pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution serves the JAX backend"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process with eight devices leaves."""
    return devices.launch("everything", tmp_path_factory.mktemp("devices"))


def check_equal(found, method, where, alone="one"):
    one, other = (found["trainings"][key] for key in ((devices.SAME.get(method, method), alone), (method, where)))
    assert relative_distance(other["weights"], one["weights"]) < 1e-5
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert other["updates"] == one["updates"]
    assert other["different"] == []


@pytest.mark.parametrize("method", devices.SHARED)
def test_eight_devices_equal_one(found, method):
    check_equal(found, method, "eight")


@pytest.mark.parametrize("method", devices.SHARDED)
def test_sharded_state_equals_one_device(found, method):
    check_equal(found, method, "sharded")


def test_whole_layers_of_one_shape_are_shared_out(found):
    check_equal(found, "kfac", "deep, sharded", alone="deep, one")
    whole, of_one = found["trainings"]["kfac", "deep, sharded"]["bytes"]
    assert of_one < 1.2 * whole / devices.DEVICES


@pytest.mark.parametrize("what", ["kernels", "kernels and state"])
def test_sharded_kernels_equal_one_device(found, what):
    check_equal(found, "kfac", what)


@pytest.mark.parametrize("method", devices.SHARDED)
def test_each_device_has_its_part_of_the_state(found, method):
    whole, of_one = found["trainings"][method, "sharded"]["bytes"]
    # Filling up takes a few rows of these small matrices: four more to twelve of HyLo's.
    assert whole / devices.DEVICES <= of_one < (1.4 if method == "hylo-switch" else 1.2) * whole / devices.DEVICES


@pytest.mark.parametrize("method", ["kfac", "sngd"])
def test_the_compiled_step_takes_an_eighth_of_the_state(found, method):
    whole, of_one = found["trainings"][method, "sharded"]["bytes"]
    steps = found["steps"]
    assert steps[method, False]["arguments"] - steps[method, True]["arguments"] == whole - of_one


@pytest.mark.parametrize("method", ["kfac", "sngd"])
def test_only_gradients_travel_where_nothing_is_due(found, method):
    collectives = found["steps"][method, False]["collectives"]
    always = [(kind, elements) for kind, elements, conditional in collectives if not conditional]
    assert {kind for kind, _ in always} == {"all-reduce"}
    # Besides gradients: the loss and what is counted for it.
    assert sum(elements for _, elements in always) <= found["steps"]["weights"] + 8
    assert any(conditional for *_, conditional in collectives)


@pytest.mark.parametrize("method", ["kfac", "sngd", "thor"])
def test_with_sharded_state_preconditioned_gradients_travel_too(found, method):
    collectives = found["steps"][method, True]["collectives"]
    always = sum(elements for _, elements, conditional in collectives if not conditional)
    # THOR's go to and fro between the parts of both sides.
    assert always < (4 if method == "thor" else 3) * found["steps"]["weights"]
    if method == "kfac":
        # The factor of the hidden layer's inputs travels when it is inverted.
        assert max(elements for _, elements, conditional in collectives if conditional) > 129 * 129


def test_mistakes_are_errors_that_say_what_to_do(found):
    mistakes = found["mistakes"]
    for early in ("model made early", "optimizer made early", "captured early"):
        assert "was made for one device, but now training is for a mesh of 8 devices" in mistakes[early]
        assert "before the model and the optimizer are made" in mistakes[early]
    assert (
        "was made for a mesh of 8 devices, {'batch': 8}, but now training is for one" in mistakes["distribution gone"]
    )
    assert "a batch size of 12, which the 8 devices" in mistakes["batch size"]
    assert "along the axis 'data' of its mesh, which has the axes ('model',)" in mistakes["no batch axis"]
    assert "no `keras.distribution` of several devices is active" in mistakes["no devices"]
    assert "Received: shard_state=1" in mistakes["not a flag"]
    assert "gradient_worker_fraction=0.5" in mistakes["fraction"]


def test_a_batch_that_devices_cannot_share_stops_the_training(found):
    assert "dimension size is 12" in found["mistakes"]["last batch"]
    assert found["mistakes"]["steps before it"] == 2


@pytest.mark.parametrize("path", ["eight", "eight, then one", "one, then eight"])
def test_resumes_on_the_same_and_on_another_number_of_devices(found, path):
    one, resumed = found["trainings"]["kfac", "one"], found["resumes"][path]
    assert relative_distance(resumed["weights"], one["weights"]) < 1e-5
    assert relative_distance(resumed["averages"], one["averages"]) < 1e-5
    assert resumed["step"] == devices.STEPS
    whole, of_one = resumed["bytes"]
    assert (of_one < whole / 6) == path.endswith("eight")
    assert any("so it is whole again" in said for said in resumed["warnings"]) == (path == "eight, then one")
