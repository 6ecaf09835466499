"""What trains by the plain rule although it could be captured is warned of, and what another optimizer captured stays."""

import re
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ngd
from tf_tests.small import (
    METHODS,
    array,
    captured,
    compiled,
    fit,
    gradients,
    kfac,
    mlp,
    regression,
    statistics,
    weights,
)


def coverage_warnings(function):
    """The messages about kernels that are not captured, of what a function does."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in seen if "follow the rule for the rest" in str(w.message)]


def frozen_first():
    model = mlp()
    model.get_layer("hidden").trainable = False
    return model


def test_unfrozen_and_compiled_without_capture():
    model, (x, y) = captured(frozen_first()), regression()
    assert not coverage_warnings(lambda: fit(model, x, y))
    model.get_layer("hidden").trainable = True
    compiled(model, kfac())
    [message] = coverage_warnings(lambda: fit(model, x, y, epochs=2))
    assert "KFAC is to train 2 kernels, 1 of which are not captured" in message
    assert "'hidden/kernel'" in message
    assert "`keras_ngd.capture` was not called with this optimizer" in message


@pytest.mark.parametrize("method", METHODS)
def test_unfrozen_after_capture(method):
    model = captured(frozen_first(), METHODS[method]())
    model.get_layer("hidden").trainable = True
    [message] = coverage_warnings(lambda: model.optimizer.build(model.trainable_variables))
    assert "`keras_ngd.capture` left out 0, when it was called with this optimizer" in message


def test_what_was_left_out_is_no_news(tmp_path):
    """Not at the first step, nor where training goes on from a file."""
    path, (x, y) = tmp_path / "model.keras", regression()
    model = captured(mlp(), skip="hidden")
    assert not coverage_warnings(lambda: fit(model, x, y))
    model.save(path)
    loaded = []
    assert not coverage_warnings(lambda: loaded.append(keras.models.load_model(path)))
    assert not coverage_warnings(lambda: fit(loaded[0], x, y))
    assert loaded[0].optimizer.get_config()["not_captured"] == 1
    # Another optimizer knows nothing of it.
    assert len(coverage_warnings(lambda: fit(compiled(model, kfac()), x, y))) == 1


def adversaries():
    """A discriminator that its optimizer was captured for, and the model that trains the generator by it."""
    discriminator = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, "tanh", name="d1"), layers.Dense(1, name="d2")]
    )
    generator = keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh", name="g1"), layers.Dense(4, name="g2")])
    captured(discriminator)
    discriminator.trainable = False
    noise = keras.Input((3,))
    combined = keras.Model(noise, discriminator(generator(noise)))
    optimizer = kfac()
    report = keras_ngd.capture(combined, optimizer)
    return discriminator, generator, compiled(combined, optimizer), report


def test_adversarial_pair():
    discriminator, generator, combined, report = adversaries()
    assert {path.split("/")[-1] for path in report.captured} == {"g1", "g2"}
    assert set(report.not_captured.values()) == {"not trainable here, and captured already: left as it is"}
    rng = np.random.default_rng(0)
    noise, real = (rng.normal(size=(8, n)).astype("float32") for n in (3, 4))

    def round_of_both():
        before = weights(combined), statistics(discriminator)
        discriminator.trainable = True
        x = np.concatenate([real, generator.predict(noise, verbose=0)])
        discriminator.train_on_batch(x, np.repeat([[1.0], [0.0]], 8, axis=0).astype("float32"))
        after_first = weights(combined), statistics(discriminator)
        discriminator.trainable = False
        combined.train_on_batch(noise, np.ones((8, 1), "float32"))
        return before, after_first, (weights(combined), statistics(discriminator))

    assert not coverage_warnings(round_of_both)
    before, between, after = round_of_both()
    for path in before[0]:
        # Each step trains its own network.
        own = path.split("/")[-2].startswith("d")
        assert (before[0][path] != between[0][path]).any() == own, path
        assert (between[0][path] != after[0][path]).any() == (not own), path
    for path in before[1]:
        if path.endswith("_factor"):
            assert (before[1][path] != between[1][path]).any()
        np.testing.assert_array_equal(between[1][path], after[1][path])
    assert discriminator.optimizer.factor_updates == combined.optimizer.factor_updates == 2
    assert discriminator.optimizer.inverse_updates == 2


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a loop with a tape")
def test_adversarial_pair_in_a_loop_of_ones_own():
    import tensorflow as tf

    discriminator, _, combined, _ = adversaries()
    x, noise = np.ones((8, 4), "float32"), np.ones((8, 3), "float32")

    @tf.function
    def step(model, optimizer, inputs):
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(model(inputs, training=True) - 1.0))
        optimizer.apply(tape.gradient(loss, [v.value for v in model.trainable_variables]), model.trainable_variables)

    # As every Keras optimizer in a function of `tf.function` that is given several: built before.
    combined.optimizer.build(combined.trainable_variables)
    discriminator.trainable = True
    discriminator.optimizer.build(discriminator.trainable_variables)
    for _ in range(2):
        discriminator.trainable = True
        step(discriminator, discriminator.optimizer, x)
        discriminator.trainable = False
        step(combined, combined.optimizer, noise)
    assert discriminator.optimizer.inverse_updates == combined.optimizer.inverse_updates == 2


# Messages


def stepped_on(select):
    """What the optimizer says to a step on a selection of its model's variables, and whether anything changed."""
    model, (x, y) = captured(mlp()), regression()
    chosen = select(model)
    found = gradients(model, x, y)
    before = [array(v) for v in model.variables]
    with pytest.raises(ValueError, match="variables") as error:
        model.optimizer.apply([ops.convert_to_tensor(found[v.path]) for v in chosen], chosen)
    assert all(np.array_equal(a, array(v)) for a, v in zip(before, model.variables, strict=True))
    return str(error.value)


def test_step_on_a_part():
    def part(model):
        model.optimizer.build(model.trainable_variables)
        return [v for v in model.trainable_variables if v.path.startswith("outputs")]

    message = stepped_on(part)
    assert re.search(
        r"was built on \d+ variables but is given \d+ \(\d+ missing: 'hidden/kernel', 'hidden/bias'", message
    )
    assert "pass the gradients of all" in message


def test_step_on_others():
    def others(model):
        variables = model.trainable_variables
        model.optimizer.build([v for v in variables if v.path.startswith("outputs")])
        return variables

    message = stepped_on(others)
    assert re.search(r"was built on \d+ variables but is given \d+ \(\d+ new: 'hidden/kernel', 'hidden/bias'", message)


def test_kernels_without_their_statistics():
    message = stepped_on(lambda model: [v for v in model.trainable_variables if "statistics" not in v.path])
    assert "given 4 variables, kernels of captured layers among them ('hidden/kernel', 'outputs/kernel')" in message
    assert "pass the gradients of all: `optimizer.apply(gradients, model.trainable_variables)`" in message
