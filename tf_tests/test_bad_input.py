"""Every kind of bad input has an error of its own that says what to do."""

import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

import keras_ngd

X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = np.arange(8) % 3


def make_model():
    return keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5, "tanh", name="first"), keras.layers.Dense(3, name="last")]
    )


def compile_and_fit(model, optimizer, **kwargs):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, **kwargs)
    model.fit(X, Y, batch_size=8, verbose=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": -0.1}, "`damping` must be a positive float"),
        ({"damping": 0}, "`damping` must be a positive float"),
        ({"damping": float("nan")}, "`damping` must be a positive float"),
        ({"damping": "small"}, "`damping` must be a positive float"),
        ({"factor_interval": 0}, "`factor_interval` must be an int of at least 1"),
        ({"factor_interval": 1.5}, "`factor_interval` must be an int of at least 1"),
        ({"factor_interval": True}, "`factor_interval` must be an int of at least 1"),
        ({"inverse_interval": -3}, "`inverse_interval` must be an int of at least 1"),
        ({"inverse": "lu"}, "`inverse` must be one of"),
        ({"damping_mode": "tikhonov"}, "`damping_mode` must be one of"),
        ({"damping_mode": "exact", "inverse": "cholesky"}, "`damping_mode='exact'` needs `inverse='eigen'`"),
        ({"weight_sharing": "both"}, "`weight_sharing` must be one of"),
        ({"losses_per_example": 0}, "`losses_per_example` must be a number above 0"),
        ({"statistics_fraction": 0}, r"`statistics_fraction` must be in \(0, 1\]"),
        ({"statistics_fraction": 1.5}, r"`statistics_fraction` must be in \(0, 1\]"),
        ({"factor_decay": 1.0}, r"`factor_decay` must be in \[0, 1\)"),
        ({"factor_decay": -0.1}, r"`factor_decay` must be in \[0, 1\)"),
        ({"kl_clip": 0}, "`kl_clip` must be a positive float or None"),
        ({"momentum": 2.0}, "momentum"),
        ({"gradient_accumulation_steps": 2}, "does not support `gradient_accumulation_steps`"),
        ({"learning_rates": 0.1}, "not recognized"),
    ],
)
def test_optimizer_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_ngd.KFAC(**arguments)


def test_compiled_without_capture():
    with pytest.raises(ValueError, match="found no captured layers, so it would train as plain SGD"):
        compile_and_fit(make_model(), keras_ngd.KFAC())


def test_captured_for_another_optimizer():
    model = make_model()
    keras_ngd.capture(model, keras_ngd.KFAC(weight_sharing="reduce"))
    with pytest.raises(ValueError, match="first' was captured for another optimizer"):
        compile_and_fit(model, keras_ngd.KFAC())


def test_capture_of_an_unbuilt_model():
    model = keras.Sequential([keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="is not built"):
        keras_ngd.capture(model, keras_ngd.KFAC())


def test_capture_of_what_is_no_model():
    with pytest.raises(TypeError, match="`model` must be a keras.Model"):
        keras_ngd.capture(keras.layers.Dense(3), keras_ngd.KFAC())
    with pytest.raises(TypeError, match="`model` must be a keras.Model"):
        keras_ngd.release("model")


def test_capture_for_an_optimizer_of_another_kind():
    with pytest.raises(TypeError, match="`optimizer` must be a keras_ngd optimizer"):
        keras_ngd.capture(make_model(), keras.optimizers.Adam())


def test_capture_with_an_optimizer_in_use():
    model, optimizer = make_model(), keras_ngd.KFAC()
    keras_ngd.capture(model, optimizer)
    compile_and_fit(model, optimizer)
    with pytest.raises(ValueError, match="is already in use"):
        keras_ngd.capture(model, optimizer)


def test_nothing_to_capture():
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    with pytest.raises(ValueError, match="No layer of model .* can be captured"):
        keras_ngd.capture(model, keras_ngd.KFAC())


def test_skip_that_matches_nothing():
    with pytest.raises(ValueError, match="'frist', which matches no layer"):
        keras_ngd.capture(make_model(), keras_ngd.KFAC(), skip="frist")
    with pytest.raises(TypeError, match="`skip` takes names, patterns or a function"):
        keras_ngd.capture(make_model(), keras_ngd.KFAC(), skip=[3])


def test_layer_frozen_after_the_optimizer_was_built():
    model, optimizer = make_model(), keras_ngd.KFAC()
    keras_ngd.capture(model, optimizer)
    compile_and_fit(model, optimizer)
    model.get_layer("first").trainable = False
    with pytest.raises(ValueError, match="layers were frozen, unfrozen, captured or released since"):
        compile_and_fit(model, optimizer)


def test_bias_frozen_alone():
    model, optimizer = make_model(), keras_ngd.KFAC()
    keras_ngd.capture(model, optimizer)
    model.get_layer("first").bias.trainable = False
    with pytest.raises(ValueError, match="is not trainable. Set `trainable` on whole layers"):
        compile_and_fit(model, optimizer)


def test_kernel_trained_without_its_layer_being_called():
    @keras.saving.register_keras_serializable("keras_ngd_tests")
    class Bypass(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.Dense(3, name="inner")

        def build(self, shape):
            self.inner.build(shape)

        def call(self, x):
            return keras.ops.matmul(x, self.inner.kernel) + self.inner.bias

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), Bypass()])
    optimizer = keras_ngd.KFAC()
    keras_ngd.capture(model, optimizer)
    with pytest.raises(ValueError, match="its statistics never arrive. Leave it out"):
        compile_and_fit(model, optimizer)


@pytest.fixture
def float16_policy():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy(before)


def test_dynamic_loss_scale(float16_policy):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(3)(inputs))
    with pytest.raises(ValueError, match="computes in float16"):
        keras_ngd.capture(model, keras_ngd.KFAC())
    optimizer = keras_ngd.KFAC(loss_scale_factor=1024.0)
    keras_ngd.capture(model, optimizer)
    with pytest.raises(ValueError, match="cannot be wrapped in a LossScaleOptimizer"):
        model.compile(optimizer=optimizer, loss="mse")
    with pytest.raises(ValueError, match="cannot be wrapped in a LossScaleOptimizer"):
        keras.optimizers.LossScaleOptimizer(keras_ngd.KFAC())


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute needs the TensorFlow backend")
def test_several_replicas():
    script = """
        import tensorflow as tf
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        import keras, keras_ngd, numpy as np
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
            optimizer = keras_ngd.KFAC()
            keras_ngd.capture(model, optimizer)
            model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
        try:
            model.fit(np.zeros((8, 4)), np.zeros((8, 3)), verbose=0)
        except RuntimeError as error:
            print("refused:", error)
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert "refused: KFAC runs on one worker so far, but found MirroredStrategy with 2 replicas" in process.stdout
