"""A kind of layer and a method of one's own, as CONTRIBUTING has them, without any change to the library."""

import pathlib
import re

import keras
import numpy as np
import pytest

import keras_ngd
from tf_tests import small

PAGE = pathlib.Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def example():
    """The names that the code on the page defines."""
    found = {}
    codes = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(codes) == 2
    for code in codes:
        exec(compile(code, "CONTRIBUTING.md", "exec"), found)
    yield found
    del keras_ngd.layers.CAPTURED_KINDS[found["Halved"]]


def network(halved):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    return keras.Model(
        inputs, keras.layers.Dense(2, name="outputs")(halved(5, activation="tanh", name="hidden")(inputs))
    )


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(32, 6)).astype("float32"), rng.normal(size=(32, 2)).astype("float32")


def test_the_layer_computes_and_trains_as_it_was(example):
    x, y = data()
    model, plain = network(example["Halved"]), network(example["Halved"])
    report = keras_ngd.capture(model, small.kfac())
    assert list(report.captured) == ["hidden", "outputs"]
    assert type(model.get_layer("hidden")) is example["CapturedHalved"]
    np.testing.assert_array_equal(model.predict(x, verbose=0), plain.predict(x, verbose=0))
    for each, optimizer in ((model, keras.optimizers.SGD(0.1)), (plain, keras.optimizers.SGD(0.1))):
        small.compiled(each, optimizer).fit(x, y, batch_size=8, shuffle=False, verbose=0)
    keras_ngd.release(model)
    assert type(model.get_layer("hidden")) is example["Halved"]
    np.testing.assert_allclose(model.predict(x, verbose=0), plain.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


def test_the_factors_are_those_of_the_layer(example):
    x, y = data()
    model = small.captured(network(example["Halved"]), small.kfac(learning_rate=1e-9))
    kernel, bias = (np.array(v) for v in model.get_layer("hidden").get_weights()[:2])
    weights = np.array(model.get_layer("outputs").get_weights()[0])
    output_bias = np.array(model.get_layer("outputs").get_weights()[1])
    model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
    a = np.concatenate([x, np.ones((len(x), 1))], axis=1).astype("float64")
    hidden = np.tanh(a @ np.concatenate([kernel, bias[None]]))
    # Mean squared error over two outputs.
    errors = (hidden / 2 @ weights + output_bias - y) * 2 / y.size
    g = errors @ weights.T / 2 * (1 - hidden**2)
    statistics = model.get_layer("hidden").statistics
    np.testing.assert_allclose(small.array(statistics.input_factor)[0], a.T @ a / len(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(small.array(statistics.output_factor)[0], len(x) * g.T @ g, rtol=1e-4, atol=1e-8)


def test_the_method_takes_its_step(example):
    x, y = data()
    model = network(example["Halved"])
    optimizer = example["DiagonalKFAC"](
        1.0, 0.1, momentum=0.0, factor_interval=1, inverse_interval=1, **{**keras_ngd.PAPER_SETTINGS, "kl_clip": None}
    )
    small.captured(model, optimizer)
    before = [np.array(v) for v in model.get_layer("outputs").get_weights()[:2]]
    hidden = keras.Model(model.inputs, model.get_layer("hidden").output).predict(x, verbose=0).astype("float64")
    model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
    a = np.concatenate([hidden, np.ones((len(x), 1))], axis=1)
    g = (a @ np.concatenate([before[0], before[1][None]]) - y) * 2 / y.size
    diagonals = (a**2).mean(0), len(x) * (g**2).sum(0)
    step = a.T @ g / np.outer(*(d + 0.1 for d in diagonals))
    after = np.concatenate(
        [model.get_layer("outputs").get_weights()[0], model.get_layer("outputs").get_weights()[1][None]]
    )
    np.testing.assert_allclose(after, np.concatenate([before[0], before[1][None]]) - step, rtol=1e-4, atol=1e-6)


def test_both_are_saved_and_loaded(example, tmp_path):
    x, y = data()
    model = small.captured(network(example["Halved"]), example["DiagonalKFAC"](0.01, 0.1))
    model.fit(x, y, batch_size=8, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.optimizer.factor_updates == model.optimizer.factor_updates > 0
    for each in (model, again):
        each.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))


def test_what_is_no_kind_is_an_error():
    with pytest.raises(
        TypeError, match="with that layer's class as its `plain`. Received: .*Dense.*whose `plain` is None"
    ):
        keras_ngd.layers.register_kind(keras.layers.Dense)
