"""What `capture` and `release` do to models of every build, and what they leave alone."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ngd
from tf_tests.small import (
    array,
    assert_close,
    assert_same,
    captured,
    compiled,
    fit,
    gradients,
    kfac,
    mlp,
    policy,
    regression,
    statistics,
    weights,
)

STEPS = 4


def sequential():
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, "tanh", name="hidden"), layers.Dense(4, name="outputs")]
    )


@keras.saving.register_keras_serializable("keras_ngd_tests")
class Subclassed(keras.Model):
    """Layers in an attribute, a list and a dictionary."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(4, activation="tanh", name="first")
        self.middle = [layers.Dense(4, name="one"), layers.Dense(4, name="two")]
        self.last = {"outputs": layers.Dense(4, name="last")}

    def call(self, inputs):
        x = self.first(inputs)
        for layer in self.middle:
            x = layer(x)
        return self.last["outputs"](x)


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 4), "float32"))
    return model


def nested():
    """A Functional model in a Sequential one in a Functional one."""
    x = keras.Input((4,))
    inner = keras.Model(x, layers.Dense(4, name="innermost")(x), name="inner")
    middle = keras.Sequential([keras.Input((4,)), inner, layers.Dense(4, name="middling")], name="middle")
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(4, name="outermost")(middle(x)))


@keras.saving.register_keras_serializable("keras_ngd_tests")
class Gated(layers.Layer):
    """A layer with weights of its own and two sub-layers, one of them deeper."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.value = layers.Dense(units, name="value")
        self.gate = keras.Sequential([layers.Dense(units, "sigmoid", name="amount")], name="gate")

    def build(self, input_shape):
        self.value.build(input_shape)
        self.gate.build(input_shape)
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, inputs):
        return self.scale * self.value(inputs) * self.gate(inputs)


def with_sub_layers():
    return keras.Sequential([keras.Input((4,)), Gated(4, name="gated"), layers.Dense(4, name="outputs")])


BUILDERS = {
    "sequential": (sequential, {"hidden", "outputs"}),
    "functional": (mlp, {"hidden", "outputs"}),
    "subclassed": (subclassed, {"first", "one", "two", "last"}),
    "nested": (nested, {"innermost", "middling", "outermost"}),
    "sub-layers": (with_sub_layers, {"value", "amount", "outputs"}),
}


def named(model, name):
    """The layer of that name, at any depth."""
    return next(layer for layer in model._flatten_layers() if layer.name == name)


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
    h = layers.Bidirectional(layers.SimpleRNN(2, return_sequences=True), name="both_ways")(h)
    h = layers.RNN(Cell(3, name="cell"), name="loop")(h)
    h = layers.LayerNormalization(name="norm")(h)
    model = keras.Model(x, layers.Dense(2, name="head")(h))
    optimizer = kfac()

    report = keras_ngd.capture(model, optimizer)

    assert report.captured == ["head"]
    reasons = {path.split("/")[-1]: reason for path, reason in report.not_captured.items()}
    assert reasons["framewise"] == "inside TimeDistributed 'frames', which calls it in its own way"
    assert reasons["step"] == "inside RNN 'loop', which calls it in its own way"
    assert reasons["norm"] == reasons["query"] == "not a captured kind"
    assert sum(path.endswith("simple_rnn_cell") for path in report.not_captured) == 2
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

TABLE = """
"""


def test_report():
    x = keras.Input((6, 6, 2))
    h = layers.Conv2D(3, 3, use_bias=False, name="conv")(x)
    h = layers.BatchNormalization(name="norm")(h)
    h = layers.DepthwiseConv2D(2, name="depthwise")(h)
    h = layers.Conv2D(4, 2, groups=1, name="small")(h)
    model = keras.Model(x, layers.Dense(2, name="head")(layers.Flatten()(h)))
    optimizer = kfac()

    report = keras_ngd.capture(model, optimizer, skip="small")

    # Float32; A, G and an inverse of each: 2 * 4 * (18^2 + 3^2) for the convolution, 2 * 4 * (17^2 + 2^2) for the head.
    assert str(report) == repr(report)
    lines = str(report).splitlines()
    assert [line.split() for line in (lines[0], lines[2], lines[6], lines[-2])] == [
        ["layer", "kind", "factors,", "or", "why", "not", "captured", "bytes"],
        ["conv", "Conv2D", "18x18,", "3x3", "2,664"],
        ["head", "Dense", "17x17,", "2x2", "2,344"],
        ["2", "of", "5", "captured", "5,008"],
    ]
    assert report.captured == ["conv", "head"]
    assert report.not_captured == {
        "norm": "not a captured kind",
        "depthwise": "not a captured kind",
        "small": "left out by `skip`",
    }
    assert report.bytes == 5008


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


# Leaving layers out


@pytest.mark.parametrize(
    ("skip", "left_out"),
    [
        ("outermost", {"outermost"}),
        (["outermost", "mid*"], {"outermost", "middling"}),
        ("*most", {"outermost", "innermost"}),
        ("middle/*g", {"middling"}),
        ("middle/middling", {"middling"}),
        (lambda layer: layer.name.startswith(("inner", "outer")), {"innermost", "outermost"}),
        ((), set()),
    ],
    ids=["name", "list", "pattern", "path pattern", "path", "function", "nothing"],
)
def test_skip(skip, left_out):
    model, (x, y) = nested(), regression()
    optimizer = kfac()
    report = keras_ngd.capture(model, optimizer, skip=skip)
    everything = {"innermost", "middling", "outermost"}
    assert {path.split("/")[-1] for path in report.captured} == everything - left_out
    assert {path.split("/")[-1] for path in report.not_captured} == left_out
    assert set(report.not_captured.values()) <= {"left out by `skip`"}
    assert all(type(named(model, name)) is layers.Dense for name in left_out)
    before = weights(model)
    fit(compiled(model, optimizer), x, y)
    after = weights(model)
    assert all(np.any(before[path] != after[path]) for path in before)


def test_skip_that_matches_nothing_names_the_layers_there_are():
    with pytest.raises(ValueError, match="`skip` names 'hiden', which matches no layer.*There are: hidden, outputs"):
        keras_ngd.capture(mlp(), kfac(), skip=["outputs", "hiden"])


def test_skip_of_the_wrong_type():
    model = mlp()
    with pytest.raises(TypeError, match="`skip` takes names, patterns or a function"):
        keras_ngd.capture(model, kfac(), skip=[model.layers[1]])
    with pytest.raises(TypeError, match="`skip` takes names, patterns or a function"):
        keras_ngd.capture(model, kfac(), skip=model.layers[1])
    with pytest.raises(TypeError, match="`skip` takes names, patterns or a function"):
        keras_ngd.capture(model, kfac(), skip=3)


def test_skip_lets_a_layer_be_unbuilt():
    class Partial(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused = layers.Dense(4, name="used"), layers.Dense(4, name="unused")

        def call(self, inputs):
            return self.used(inputs)

    model, (x, y) = Partial(), regression()
    model(x)
    with pytest.raises(ValueError, match="its layer 'unused' has no weights yet"):
        keras_ngd.capture(model, kfac())
    fit(captured(model, skip="unused"), x, y)
    assert model.optimizer.factor_updates == STEPS


# Layers and weights that are shared


def test_layer_called_twice():
    shared = layers.Dense(4, use_bias=False, name="shared")
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(4, name="outputs")(shared(ops.tanh(shared(x)))))
    kernel, (x, y) = array(shared.kernel), regression()
    captured(model)
    model.train_on_batch(x, y)
    first, second = x, np.tanh(x @ kernel)
    expected = (first.T @ first + second.T @ second) / (2 * len(x))
    np.testing.assert_allclose(array(shared.statistics.input_factor)[0], expected, rtol=1e-4, atol=1e-6)
    assert float(array(shared.statistics.calls)) == 2
    for _ in range(3):
        model.train_on_batch(x, y)
    assert model.optimizer.factor_updates == 4


def test_model_called_twice_in_a_model():
    x = keras.Input((4,))
    inner = keras.Model(x, layers.Dense(4, activation="tanh", name="inside")(x))
    x = keras.Input((4,))
    model = captured(keras.Model(x, layers.Dense(4)(inner(inner(x)))))
    fit(model, *regression())
    assert model.optimizer.factor_updates == STEPS
    assert float(array(inner.layers[1].statistics.calls)) == 2


@keras.saving.register_keras_serializable("keras_ngd_tests")
class Transposed(layers.Layer):
    """Multiplies with the transposed kernel of another layer, which it holds as its own weight."""

    def __init__(self, source, **kwargs):
        super().__init__(**kwargs)
        self.source = source

    def build(self, input_shape):
        self._kernel = self.source._kernel

    def call(self, inputs):
        return inputs @ ops.transpose(self._kernel)


def test_tied_kernels_are_not_captured():
    x = keras.Input((4,))
    encoder = layers.Dense(4, use_bias=False, name="encoder")
    h = layers.Dense(4, name="middle")(Transposed(encoder, name="decoder")(encoder(x)))
    first, second = layers.Dense(4, name="first"), layers.Dense(4, name="second")
    h = first(h)
    second.build((None, 4))
    second._untrack_variable(second._kernel)
    second._tracker.unlock()
    second._kernel = first._kernel
    second._tracker.lock()
    model = keras.Model(x, layers.Dense(4, name="outputs")(second(h)))
    optimizer = kfac()
    report = keras_ngd.capture(model, optimizer)
    assert report.captured == ["middle", "outputs"]
    assert report.not_captured == {
        "encoder": "shares its kernel with 'decoder'",
        "decoder": "not a captured kind",
        "first": "shares its kernel with 'second'",
        "second": "shares its kernel with 'first'",
    }
    x, y = regression()
    before = weights(model)
    fit(compiled(model, optimizer), x, y)
    after = weights(model)
    assert all(np.any(before[path] != after[path]) for path in before)
    assert optimizer.factor_updates == STEPS


# What is trained


def test_frozen_then_unfrozen():
    model, (x, y) = mlp(), regression()
    hidden = model.get_layer("hidden")
    hidden.trainable = False
    first = kfac()
    report = keras_ngd.capture(model, first)
    assert report.not_captured == {"hidden": "not trainable: unfreeze it, then capture again"}
    frozen = array(hidden.kernel)
    fit(compiled(model, first), x, y)
    np.testing.assert_array_equal(frozen, array(hidden.kernel))
    assert first.factor_updates == STEPS

    hidden.trainable = True
    second = kfac()
    assert keras_ngd.capture(model, second).captured == ["hidden", "outputs"]
    fit(compiled(model, second), x, y)
    assert np.any(frozen != array(hidden.kernel))
    assert second.factor_updates == STEPS


def test_frozen_between_capture_and_training():
    model, (x, y) = mlp(), regression()
    optimizer = kfac()
    keras_ngd.capture(model, optimizer)
    hidden = model.get_layer("hidden")
    hidden.trainable = False
    frozen = array(hidden.kernel)
    fit(compiled(model, optimizer), x, y)
    np.testing.assert_array_equal(frozen, array(hidden.kernel))
    assert [block.layer for block in optimizer.layout.blocks] == ["outputs"]
    assert optimizer.factor_updates == STEPS


class Doubling(layers.Dense):
    """A user's own `Dense`."""

    def call(self, inputs, training=None):
        return 2 * super().call(inputs)


def test_subclasses_of_a_captured_kind_are_left_alone():
    model, (x, y) = keras.Sequential([keras.Input((4,)), Doubling(4, name="mine"), layers.Dense(4)]), regression()
    optimizer = kfac()
    report = keras_ngd.capture(model, optimizer)
    assert list(report.not_captured.values()) == ["a subclass of Dense: its call may compute something else"]
    assert [entry.kind for entry in report.layers] == ["Doubling", "Dense"]
    assert type(model.get_layer("mine")) is Doubling
    before = array(model.get_layer("mine").kernel)
    fit(compiled(model, optimizer), x, y)
    assert np.any(before != array(model.get_layer("mine").kernel))


def test_lora_and_quantized_layers_are_left_alone():
    model, (x, y) = sequential(), regression()
    adapted = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="adapted"), layers.Dense(4, name="int8"), model]
    )
    adapted.get_layer("adapted").enable_lora(2)
    adapted.get_layer("int8").quantize("int8")
    optimizer = kfac()
    report = keras_ngd.capture(adapted, optimizer)
    reasons = {path.split("/")[-1]: reason for path, reason in report.not_captured.items()}
    assert reasons == {"adapted": "LoRA is enabled: its kernel is not what is trained", "int8": "quantized"}
    before = weights(adapted)
    fit(compiled(adapted, optimizer), x, y)
    after = weights(adapted)
    changed = {path.split("/")[-1] for path in before if "adapted" in path and np.any(before[path] != after[path])}
    assert changed == {"bias", "lora_kernel_b", "lora_kernel_a"}
    assert optimizer.factor_updates == STEPS


def test_released_layers_can_be_quantized():
    model, (x, y) = captured(mlp()), regression()
    fit(model, x, y)
    keras_ngd.release(model)
    predicted = model.predict(x, verbose=0)
    model.quantize("int8")
    assert model.get_layer("hidden").quantization_mode == "int8"
    np.testing.assert_allclose(model.predict(x, verbose=0), predicted, atol=0.1)


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


# Masks


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_mask_hides_positions(weight_sharing):
    tokens = keras.Input((5,), dtype="int32")
    embedding, dense = layers.Embedding(7, 3, mask_zero=True), layers.Dense(2, name="dense")
    model = keras.Model(tokens, layers.GlobalAveragePooling1D()(dense(embedding(tokens))))
    table = array(embedding.embeddings)
    captured(model, kfac(weight_sharing=weight_sharing))
    x = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 6, 0], [2, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    model.train_on_batch(x, np.ones((4, 2), "float32"))

    rows = np.concatenate([table[x], np.ones((4, 5, 1))], axis=-1)
    if weight_sharing == "expand":
        rows = rows[x != 0]
    else:
        rows = np.stack([example[tokens != 0].mean(axis=0) for example, tokens in zip(rows, x, strict=True)])
    expected = rows.T @ rows / len(rows)
    np.testing.assert_allclose(array(dense.statistics.input_factor)[0], expected, rtol=1e-4, atol=1e-6)


def test_masked_model_trains():
    tokens = keras.Input((6,), dtype="int32")
    h = layers.Embedding(7, 3, mask_zero=True)(tokens)
    h = layers.Dense(4, activation="tanh")(layers.Dense(4)(h))
    model = keras.Model(tokens, layers.Dense(1)(layers.GRU(3)(h)))
    rng = np.random.default_rng(0)
    x = rng.integers(1, 7, size=(32, 6)) * (np.arange(6) < rng.integers(1, 7, size=(32, 1)))
    y = (x == 3).sum(axis=1, keepdims=True).astype("float32")
    captured(model)
    history = fit(model, x, y, epochs=4)
    assert model.optimizer.factor_updates == 16
    assert history.history["loss"][-1] < history.history["loss"][0]


# A captured model is the plain model


def everything():
    """One layer of every captured kind, in one model."""
    x = keras.Input((8,))
    h = layers.Reshape((8, 1))(x)
    h = layers.Conv1D(4, 3, padding="causal", dilation_rate=2, activation="relu", name="causal")(h)
    h = layers.Conv1D(4, 2, groups=2, use_bias=False, name="grouped")(h)
    h = layers.Conv1D(8, 3, padding="same", strides=2, name="strided")(h)
    h = layers.Reshape((4, 4, 2))(h)
    h = layers.Conv2D(4, 3, padding="same", activation="relu", name="same")(h)
    h = layers.Conv2D(4, (2, 1), dilation_rate=(1, 2), name="valid")(h)
    h = layers.Reshape((3, 4, 2, 2))(h)
    h = layers.Conv3D(3, 2, padding="same", name="solid")(h)
    h = layers.Dense(4, activation="tanh", name="positions")(h)
    return keras.Model(x, layers.Dense(2, use_bias=False, name="outputs")(layers.Flatten()(h)))


KINDS = {"mlp": (mlp, 4, 4), "every kind of layer": (everything, 8, 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_closed_gates_change_nothing(kind):
    build, inputs, outputs = KINDS[kind]
    x, y = regression(8, inputs, outputs)
    model = build()
    predicted, before = model.predict(x, verbose=0), gradients(model, x, y)
    report = keras_ngd.capture(model, kfac())
    assert len(report.captured) == len(report.layers)
    for layer in model.layers:
        if hasattr(layer, "statistics"):
            layer.statistics.gate.assign(0.0)
    recorded = statistics(model)

    after = gradients(model, x, y)

    np.testing.assert_array_equal(model.predict(x, verbose=0), predicted)
    assert_same({path: g for path, g in after.items() if path in before}, before)
    emitted = {path: g for path, g in after.items() if path not in before}
    assert all(np.array_equal(emitted[path], recorded[path]) for path in emitted if path.endswith(("factor", "gate")))


def test_open_gates_do_not_change_the_gradients():
    x, y = regression(8, 8, 2)
    model = everything()
    before = gradients(model, x, y)
    keras_ngd.capture(model, kfac())
    after = gradients(model, x, y)
    assert_close({path: g for path, g in after.items() if path in before}, before)
    assert all(np.any(g != 0) for path, g in after.items() if path.endswith("factor"))


@pytest.mark.parametrize("kind", KINDS)
def test_captured_model_trains_with_sgd_as_the_plain_one_does(kind):
    build, inputs, outputs = KINDS[kind]
    x, y = regression(32, inputs, outputs)
    plain, model = build(), build()
    model.set_weights(plain.get_weights())
    keras_ngd.capture(model, kfac())
    histories = []
    for each in (plain, model):
        compiled(each, keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True, clipnorm=1.0))
        histories.append(fit(each, x, y, epochs=3).history["loss"])
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)
    assert_close(weights(model), weights(plain))


@pytest.mark.parametrize("compute", ["mixed_bfloat16", "float64"])
def test_capture_keeps_the_layers_policy(compute):
    with policy(compute):
        model = mlp()
    keras_ngd.capture(model, kfac())
    layer = model.get_layer("hidden")
    assert layer.dtype_policy.name == compute
    assert layer.statistics.input_factor.dtype == ("float64" if compute == "float64" else "float32")


# Files


def test_weight_files_go_both_ways(tmp_path):
    model, plain, (x, y) = captured(mlp()), mlp(), regression()
    fit(model, x, y)
    model.save_weights(tmp_path / "captured.weights.h5")
    plain.load_weights(tmp_path / "captured.weights.h5")
    assert_same(weights(plain), weights(model))
    np.testing.assert_array_equal(plain.predict(x, verbose=0), model.predict(x, verbose=0))

    fit(compiled(plain, keras.optimizers.SGD(0.1)), x, y)
    uncompiled = mlp()
    uncompiled.set_weights(plain.get_weights())
    uncompiled.save_weights(tmp_path / "plain.weights.h5")
    recorded = statistics(model)
    model.load_weights(tmp_path / "plain.weights.h5")
    assert_same(weights(model), weights(plain))
    assert_same(statistics(model), recorded)
    fit(model, x, y)
    assert model.optimizer.factor_updates == 2 * STEPS

    plain.save_weights(tmp_path / "with_sgd.weights.h5")
    fresh = mlp()
    keras_ngd.capture(fresh, kfac())
    fresh.load_weights(tmp_path / "with_sgd.weights.h5")
    assert_same(weights(fresh), weights(plain))


@pytest.mark.parametrize("kind", ["sequential", "nested"])
def test_saved_captured_model_comes_back_captured(kind, tmp_path):
    build, names = BUILDERS[kind]
    model, (x, y) = captured(build()), regression()
    fit(model, x, y)
    model.save(tmp_path / "captured.keras")
    loaded = keras.models.load_model(tmp_path / "captured.keras")
    assert all(type(named(loaded, name)) is keras_ngd.layers.Dense for name in names)
    assert_same(weights(loaded), weights(model))
    assert_same(statistics(loaded), statistics(model))
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert loaded.optimizer.factor_updates == STEPS
    for each in (loaded, model):
        fit(each, x, y)
    assert loaded.optimizer.factor_updates == 2 * STEPS
    assert_same(weights(loaded), weights(model))


@pytest.mark.parametrize("kind", ["subclassed", "sub-layers"])
def test_saved_model_that_makes_its_own_layers_is_captured_again(kind, tmp_path):
    model, (x, y) = captured(BUILDERS[kind][0]()), regression()
    fit(model, x, y)
    model.save(tmp_path / "captured.keras")
    loaded = keras.models.load_model(tmp_path / "captured.keras", compile=False)
    captured(loaded)
    loaded.load_weights(tmp_path / "captured.keras")
    for each in (loaded, model):
        fit(each, x, y)
    assert loaded.optimizer.factor_updates == 2 * STEPS
    assert_same(weights(loaded), weights(model))
    assert_same(statistics(loaded), statistics(model))


def test_saved_released_model_knows_nothing_of_this_package(tmp_path):
    model, (x, y) = captured(mlp()), regression()
    fit(model, x, y)
    keras_ngd.release(model)
    assert type(model.optimizer) is keras.optimizers.SGD
    assert "keras_ngd" not in model.to_json()
    model.save(tmp_path / "released.keras")
    loaded = keras.models.load_model(tmp_path / "released.keras")
    assert type(loaded.get_layer("hidden")) is layers.Dense
    assert_same(weights(loaded), weights(model))
