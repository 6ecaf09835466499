"""What `capture` leaves alone: what is skipped, shared, frozen, or of another kind."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ngd
from tf_tests.capturing.models import (
    STEPS,
    named,
    nested,
    sequential,
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
    weights,
)

pytestmark = pytest.mark.neutral

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
    assert float(array(shared.statistics.tallied("calls"))) == 2
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
    assert float(array(inner.layers[1].statistics.tallied("calls"))) == 2


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
    assert list(report.not_captured.values()) == [
        "a subclass of Dense, which may compute something else: see `keras_ngd.layers.keeps_call`"
    ]
    assert [entry.kind for entry in report.layers] == ["Doubling", "Dense"]
    assert type(model.get_layer("mine")) is Doubling
    before = array(model.get_layer("mine").kernel)
    fit(compiled(model, optimizer), x, y)
    assert np.any(before != array(model.get_layer("mine").kernel))


@keras_ngd.layers.keeps_call
@keras.saving.register_keras_serializable("keras_ngd_tests")
class Small(layers.Dense):
    """A user's own `Dense`, which starts small, and computes what that does."""

    def __init__(self, units, kernel_initializer=None, **kwargs):
        super().__init__(
            units, kernel_initializer=kernel_initializer or keras.initializers.RandomNormal(0.01), **kwargs
        )


def test_subclasses_that_keep_call_are_captured(tmp_path):
    model, (x, y) = keras.Sequential([keras.Input((4,)), Small(4, name="mine"), layers.Dense(4)]), regression()
    optimizer = kfac()
    report = keras_ngd.capture(model, optimizer)
    assert len(report.captured) == 2
    assert isinstance(model.get_layer("mine"), Small)
    fit(compiled(model, optimizer), x, y)
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, resumed):
        fit(each, x, y)
    assert_same(weights(resumed), weights(model))
    keras_ngd.release(model)
    assert type(model.get_layer("mine")) is Small


def test_subclasses_that_do_not_keep_call():
    with pytest.raises(TypeError, match="Doubling has a `call` of its own"):
        keras_ngd.layers.keeps_call(Doubling)
    with pytest.raises(TypeError, match="subclasses of layers that `keras_ngd.capture` captures"):
        keras_ngd.layers.keeps_call(layers.Dropout)


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
