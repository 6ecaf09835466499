"""What `capture` and `release` do to models of every build, once and again, and what is reported."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ngd
from tf_tests.capturing.models import (
    BUILDERS,
    STEPS,
    named,
    nested,
)
from tf_tests.small import (
    array,
    assert_same,
    captured,
    compiled,
    fit,
    kfac,
    mlp,
    regression,
    statistics,
    weights,
)


@pytest.mark.parametrize("kind", BUILDERS)
def test_capture_and_release_of_every_kind_of_model(kind):
    build, names = BUILDERS[kind]
    model, plain, (x, y) = build(), build(), regression()
    plain.set_weights(model.get_weights())
    before, classes = weights(model), {name: type(named(model, name)) for name in names}
    predicted = plain.predict(x, verbose=0)
    optimizer = kfac()

    report = keras_ngd.capture(model, optimizer)

    assert {path.split("/")[-1] for path in report.captured} == names
    assert all(type(named(model, name)) is keras_ngd.layers.Dense for name in names)
    assert_same(weights(model), before)
    np.testing.assert_array_equal(model.predict(x, verbose=0), predicted)
    fit(compiled(model, optimizer), x, y, epochs=2)
    assert optimizer.factor_updates == 8
    assert optimizer.inverse_updates == 8
    assert all(np.any(named(model, name).statistics.output_factor != 0) for name in names)

    trained, predicted = weights(model), model.predict(x, verbose=0)
    keras_ngd.release(model)

    assert {name: type(named(model, name)) for name in names} == classes
    assert statistics(model) == {}
    assert_same(weights(model), trained)
    np.testing.assert_array_equal(model.predict(x, verbose=0), predicted)
    plain.set_weights(model.get_weights())
    np.testing.assert_array_equal(plain.predict(x, verbose=0), predicted)


def test_every_open_step_changes_the_statistics():
    model, (x, y) = captured(mlp()), regression()
    seen = [statistics(model)]
    for i in range(4):
        model.train_on_batch(x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8])
        seen.append(statistics(model))
    for old, new in zip(seen, seen[1:], strict=False):
        for path in old:
            if path.endswith("factor"):
                assert np.any(old[path] != new[path]), path
    assert all(np.all(np.isfinite(v)) for v in seen[-1].values())


def test_not_captured_kinds_are_reported_and_train():
    x = keras.Input((4, 3))
    h = layers.TimeDistributed(layers.Dense(3, name="framewise"), name="frames")(x)
    h = layers.MultiHeadAttention(1, 2, name="attention")(h, h)
    h = layers.Bidirectional(layers.SimpleRNN(2, return_sequences=True, name="simple_rnn"), name="both_ways")(h)
    h = layers.RNN(Cell(3, name="cell"), name="loop")(h)
    h = layers.LayerNormalization(name="norm")(h)
    model = keras.Model(x, layers.Dense(2, name="head")(h))
    optimizer = kfac()

    report = keras_ngd.capture(model, optimizer)

    attention = [f"attention/{name}" for name in ("query", "key", "value", "attention_output")]
    both_ways = ["both_ways/forward_simple_rnn", "both_ways/backward_simple_rnn"]
    assert report.captured == ["frames/framewise", *attention, *both_ways, "head"]
    reasons = {path.split("/")[-1]: reason for path, reason in report.not_captured.items()}
    assert reasons["step"] == "inside RNN 'loop', which calls it in its own way"
    assert reasons["norm"] == "left to the rule of the rest by default; `include` captures it"
    rng, before = np.random.default_rng(0), weights(model)
    fit(compiled(model, optimizer), rng.normal(size=(16, 4, 3)), rng.normal(size=(16, 2)))
    after = weights(model)
    # Softmax does not see a constant added to all its arguments, which is all the key's bias does to them.
    unchanged = [path for path in before if np.all(before[path] == after[path]) and "key/bias" not in path]
    assert unchanged == []
    assert all(np.all(np.isfinite(v)) for v in after.values())


@keras.saving.register_keras_serializable("keras_ngd_tests")
class Cell(layers.Layer):
    """A recurrent cell made of a `Dense` layer."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.state_size = self.output_size = units
        self.step = layers.Dense(units, activation="tanh", name="step")

    def build(self, input_shape):
        self.step.build((input_shape[0], input_shape[-1] + self.state_size))

    def call(self, inputs, states):
        out = self.step(ops.concatenate([inputs, states[0]], axis=-1))
        return out, [out]


# The report


def test_report():
    x = keras.Input((6, 6, 2))
    h = layers.Conv2D(3, 3, use_bias=False, name="conv")(x)
    h = layers.BatchNormalization(name="norm")(h)
    h = layers.DepthwiseConv2D(2, name="depthwise")(h)
    h = layers.Conv2D(4, 2, groups=1, name="small")(h)
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Flatten()(h)))
    optimizer = kfac()

    report = keras_ngd.capture(model, optimizer, skip="small")

    # Float32; A, G and an inverse of each: 2 * 4 * (18^2 + 3^2) for the convolution, 2 * 4 * (17^2 + 2^2) for the head,
    # 2 * 4 * 3 * (5^2 + 1) for the depthwise one, a block for each channel.
    assert str(report) == repr(report)
    lines = str(report).splitlines()
    assert [line.split() for line in (lines[0], lines[2], lines[4], lines[6], lines[-2])] == [
        ["layer", "kind", "curvature", "factors,", "or", "why", "not", "captured", "parameters", "bytes"],
        ["conv", "Conv2D", "Kronecker", "18x18,", "3x3", "54", "2,664"],
        ["depthwise", "DepthwiseConv2D", "Kronecker", "3x5x5,", "3x1x1", "15", "624"],
        ["head", "Dense", "Kronecker", "17x17,", "2x2", "34", "2,344"],
        ["3", "of", "5", "captured,", "64%", "of", "parameters", "161", "5,632"],
    ]
    assert (report.parameters, report.captured_share) == (161, 103 / 161)
    assert report.captured == ["conv", "depthwise", "head"]
    assert report.not_captured == {
        "norm": "left to the rule of the rest by default; `include` captures it",
        "small": "left out by `skip`",
    }
    assert report.bytes == 5632


def test_report_in_other_forms():
    """A summary that fits a terminal, a table in Markdown and one in HTML, of the same numbers."""
    x = keras.Input((6,), dtype="int32")
    h = layers.Embedding(1000, 8, name="a_long_name_of_an_embedding")(x)
    h = layers.LayerNormalization(name="norm")(h)
    h = layers.Dense(4, name="one")(layers.Dense(8, name="<two>")(h))
    report = keras_ngd.capture(keras.Model(x, h), kfac())
    assert [(entry.curvature, entry.refresh_cost) for entry in report.layers] == [
        ("Lookup", 1000 + 8**3),
        ("", 0.0),
        ("Kronecker", 9**3 + 8**3),
        ("Kronecker", 9**3 + 4**3),
    ]
    for width in (65, 79, 200):
        lines = report.summary(width).splitlines()
        assert all(len(line) <= width for line in lines[:-1])
        assert [line.split()[:2] for line in lines[2:5]] == [
            ["1", "Embedding"],
            ["1", "LayerNormalization"],
            ["2", "Dense"],
        ]
    assert "left to the rule of the rest by default" in lines[3]
    assert lines[-2].split()[-3:] == ["8.12k", "10.4k", "3.55k"], lines[-2]
    rows = [line.strip("| ").split(" | ") for line in report.to_markdown().splitlines()]
    assert {len(row) for row in rows} == {7}
    assert rows[2][:3] == ["a_long_name_of_an_embedding", "Embedding", "Lookup"]
    assert rows[-1][0] == "**3 of 4 captured, 99.8% of parameters**"
    page = report._repr_html_()
    assert page.count("<tr>") == page.count("</tr>") == 6
    assert "<td>&lt;two&gt;</td>" in page


@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
def test_bytes_are_what_is_allocated(inverse):
    model = keras.Sequential(
        [
            keras.Input((8, 4)),
            layers.Conv1D(6, 3, groups=2, name="grouped"),
            layers.Conv1D(6, 1, name="pointwise"),
            layers.Conv1D(6, 1, name="again"),
            layers.Dense(2, use_bias=False),
        ]
    )
    optimizer = kfac(inverse=inverse)
    report = keras_ngd.capture(model, optimizer)
    optimizer.build(model.trainable_variables)
    averages = sum(v.nbytes for path, v in statistics(model).items() if path.endswith("factor"))
    state = sum(array(v).nbytes for group in optimizer.layout.groups for v in group.curvature.variables)
    assert report.bytes == sum(entry.bytes for entry in report.layers) == averages + state
    assert [entry.shapes for entry in report.layers][:2] == [((2, 7, 7), (2, 3, 3)), ((7, 7), (6, 6))]


# Capturing again, and layers written captured


def test_capture_again_replaces_what_was_recorded():
    model, (x, y) = mlp(), regression()
    first, second = kfac(), kfac(weight_sharing="reduce")
    keras_ngd.capture(model, first)
    fit(compiled(model, first), x, y)
    before, count = weights(model), len(model.weights)

    assert keras_ngd.capture(model, second).captured == ["hidden", "outputs"]

    assert len(model.weights) == count
    assert_same(weights(model), before)
    assert all(np.all(v == 0) for path, v in statistics(model).items() if path.endswith("factor"))
    fit(compiled(model, second), x, y)
    assert second.factor_updates == STEPS
    assert np.any(array(model.get_layer("hidden").statistics.output_factor) != 0)


def test_capture_again_with_fewer_layers_releases_the_others():
    model, (x, y) = captured(mlp()), regression()
    fit(model, x, y)
    captured(model, skip="hidden")
    assert type(model.get_layer("hidden")) is layers.Dense
    assert all("outputs" in path for path in statistics(model))
    fit(model, x, y)
    assert model.optimizer.factor_updates == STEPS


def test_capture_after_plain_training_and_prediction():
    """Functions traced before capture are not used after it."""
    model, (x, y) = compiled(nested(), keras.optimizers.SGD(0.01)), regression()
    fit(model, x, y)
    model.evaluate(x, y, verbose=0)
    predicted = model.predict(x, verbose=0)
    captured(model)
    np.testing.assert_array_equal(model.predict(x, verbose=0), predicted)
    fit(model, x, y)
    assert model.optimizer.factor_updates == STEPS
    assert not np.array_equal(model.predict(x, verbose=0), predicted)


def test_layers_written_captured():
    plain, model, (x, y) = mlp(), mlp(keras_ngd.layers.Dense), regression()
    model.set_weights(plain.get_weights())
    assert statistics(model) == {}
    for each in (plain, model):
        fit(compiled(each, keras.optimizers.SGD(0.1)), x, y)
    assert_same(weights(model), weights(plain))

    fit(captured(model), x, y)
    assert model.optimizer.factor_updates == STEPS

    keras_ngd.release(model)
    assert type(model.get_layer("hidden")) is layers.Dense
    assert statistics(model) == {}
    assert "keras_ngd" not in str(model.get_config())


def test_release_of_a_plain_model_does_nothing():
    model = mlp()
    before = weights(model)
    keras_ngd.release(model)
    assert_same(weights(model), before)
    assert type(model.get_layer("hidden")) is layers.Dense
