"""Every misuse has its own error, which says what is wrong and what to do."""

import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ngd
from tf_tests import paper
from tf_tests.small import captured, compiled, fit, kfac, mlp, policy, regression

# Arguments


@pytest.mark.parametrize(
    ("argument", "values", "message"),
    [
        (
            "damping",
            [0, 0.0, -1e-3, float("nan"), float("inf"), True, "0.1"],
            "`damping` must be a positive float",
        ),
        ("factor_interval", [0, -1, 2.0, 1.5, True, "10", None], "`factor_interval` must be an int of at least 1"),
        ("inverse_interval", [0, -1, 2.0, 1.5, True, "10", None], "`inverse_interval` must be an int of at least 1"),
        ("factor_decay", [1, 1.0, -0.1, float("nan"), True, "0.9", None], r"`factor_decay` must be in \[0, 1\)"),
        (
            "kl_clip",
            [0, -1.0, float("nan"), float("inf"), True, "1", "auto"],
            "`kl_clip` must be a positive float or None",
        ),
        ("inverse", ["qr", None, 1], "`inverse` must be one of .*'cholesky'"),
        ("damping_mode", ["tikhonov", 1], "`damping_mode` must be one of .*'pi'"),
        ("loss_clip", [0, -1.0, float("nan"), True, "1"], "`loss_clip` must be a positive float, None or 'auto'"),
        ("length_clip", [0, -1.0, float("inf"), True, "1"], "`length_clip` must be a positive float, None or 'auto'"),
        ("fisher_scale", ["Loss", 1.0, True], "`fisher_scale` must be one of .*'loss'"),
        ("interval_growth", [0, -0.1, float("nan"), True, "0.1"], "`interval_growth` must be a number above 0"),
        ("rest", ["Adam", None, 1], "`rest` must be one of .*'adam', 'sgd'"),
        ("rest_learning_rate", [0, -0.1, float("inf"), True, "0.1"], "`rest_learning_rate` must be a positive float"),
        ("weight_sharing", ["sum", None, True], "`weight_sharing` must be one of .*'expand'"),
        ("losses_per_example", [0, -1, float("nan"), True, "3", None], "`losses_per_example` must be a number above 0"),
        ("statistics_fraction", [0, -0.5, 1.01, True, "1"], r"`statistics_fraction` must be in \(0, 1\]"),
        ("gradient_accumulation_steps", [2, 8], "KFAC does not support `gradient_accumulation_steps`"),
        ("communicator", ["mpi", None, 2], "`communicator` must be 'auto', 'horovod', 'local' or a"),
        (
            "gradient_worker_fraction",
            [-0.5, 1.01, float("nan"), True, "1", None],
            r"`gradient_worker_fraction` must be in \[0, 1\]",
        ),
        ("reduce_scatter", [1, None, "True"], "`reduce_scatter` must be True or False"),
        ("momentum", [-0.1, 1.1], "`momentum` must be a float between"),
    ],
)
def test_argument_out_of_range(argument, values, message):
    for value in values:
        with pytest.raises(ValueError, match=message) as caught:
            paper.KFAC(**{argument: value})
        if argument != "momentum":
            assert f"{value}" in str(caught.value).split("Received:")[1]


def test_exact_damping_needs_eigenvalues():
    with pytest.raises(
        ValueError, match="`damping_mode='exact'` needs `inverse='eigen'`. Received: inverse='cholesky'"
    ):
        paper.KFAC(damping_mode="exact", inverse="cholesky")
    assert paper.KFAC(damping_mode="exact", inverse="eigen").damping_mode == "exact"


def test_arguments_in_range_are_accepted():
    """Numbers of NumPy, ends of the ranges, schedules and their configs."""
    constant = keras.optimizers.schedules.PiecewiseConstantDecay([10], [20.0, 50.0])
    optimizer = paper.KFAC(
        damping=np.float32(0.5),
        factor_interval=np.int64(3),
        inverse_interval=constant,
        factor_decay=0,
        kl_clip=None,
        statistics_fraction=1,
        gradient_accumulation_steps=None,
    )
    assert (optimizer.damping, optimizer.factor_interval, optimizer.kl_clip) == (0.5, 3, None)
    assert type(optimizer.damping) is float
    assert type(optimizer.factor_interval) is int
    assert optimizer.inverse_interval is constant
    again = paper.KFAC(damping=keras.saving.serialize_keras_object(constant))
    assert again.damping.get_config() == constant.get_config()


# Capture and release


def test_model_and_optimizer_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"`model` must be a keras.Model. Received: <Dense"):
        keras_ngd.capture(layers.Dense(3), kfac())
    with pytest.raises(TypeError, match=r"`model` must be a keras.Model. Received: None"):
        keras_ngd.release(None)
    for optimizer in (keras.optimizers.Adam(), "adam", None, keras_ngd.KFAC):
        with pytest.raises(
            TypeError, match=r"`optimizer` must be a keras_ngd optimizer, such as keras_ngd.KFAC\(...\)"
        ):
            keras_ngd.capture(mlp(), optimizer)
    with pytest.raises(ValueError, match="keras_ngd>KFOC"):
        keras_ngd.capture(mlp(), "keras_ngd>KFOC")


class Unbuilt(keras.Model):
    def __init__(self):
        super().__init__(name="unbuilt")
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


@pytest.mark.parametrize("make", [Unbuilt, lambda: keras.Sequential([layers.Dense(3)], name="unbuilt")])
def test_unbuilt_model(make):
    model = make()
    with pytest.raises(ValueError, match="Model 'unbuilt' is not built .it has no weights yet.*Call it on a batch"):
        keras_ngd.capture(model, kfac())
    model(np.zeros((1, 4), "float32"))
    assert len(keras_ngd.capture(model, kfac()).captured) == 1


def test_nothing_to_capture():
    x = keras.Input((3, 4, 2))
    model = keras.Model(x, layers.ConvLSTM1D(2, 2, name="recurrent")(x), name="frames")
    with pytest.raises(
        ValueError, match="(?s)No layer of model 'frames' can be captured.*recurrent/.* +ConvLSTMCell +inside a convol"
    ):
        keras_ngd.capture(model, kfac())
    with pytest.raises(
        ValueError, match="(?s)No layer of model 'mlp' can be captured.*hidden +Dense +left out by `skip`"
    ):
        keras_ngd.capture(mlp(), kfac(), skip="*")


def test_optimizer_in_use():
    model = captured(mlp())
    model.optimizer.build(model.trainable_variables)
    for target in (model, mlp()):
        with pytest.raises(ValueError, match="Optimizer 'kfac' is already in use.*Capture with a new optimizer"):
            keras_ngd.capture(target, model.optimizer)


def test_a_failed_capture_changes_nothing():
    model = mlp()
    count = len(model.weights)
    with pytest.raises(ValueError, match="matches no layer"):
        keras_ngd.capture(model, kfac(), skip="nothing")
    assert len(model.weights) == count
    assert type(model.get_layer("hidden")) is layers.Dense


# Training


def test_captured_for_another_optimizer():
    model = mlp()
    keras_ngd.capture(model, kfac(weight_sharing="reduce"))
    with pytest.raises(
        ValueError, match="Layer 'hidden' was captured for another optimizer: it records .*'reduce'.*'expand'"
    ):
        fit(compiled(model, kfac()), *regression())


@pytest.mark.parametrize("change", ["freeze", "unfreeze", "release", "capture"])
def test_variables_changed_since_the_optimizer_was_built(change):
    model, data = mlp(), regression()
    hidden = model.get_layer("hidden")
    hidden.trainable = change != "unfreeze"
    optimizer = kfac()
    fit(captured(model, optimizer, skip="hidden" if change == "capture" else None), *data)
    if change in ("freeze", "unfreeze"):
        hidden.trainable = not hidden.trainable
    elif change == "release":
        keras_ngd.release(model)
    else:
        keras_ngd.capture(model, kfac())
    with pytest.raises(
        ValueError, match=r"KFAC was built on \d+ variables but is given \d+.*layers were frozen, unfrozen"
    ):
        fit(compiled(model, optimizer), *data)


def test_captured_kernel_frozen_by_itself():
    model = captured(mlp())
    model.get_layer("hidden").kernel.trainable = False
    with pytest.raises(
        ValueError, match="Layer 'hidden' was captured, but its variable 'hidden/kernel' is not trainable"
    ):
        fit(model, *regression())


class Borrowing(keras.Model):
    """Multiplies with the kernel of a layer it never calls."""

    def __init__(self):
        super().__init__()
        self.lender, self.last = layers.Dense(4, name="lender"), layers.Dense(4, name="last")

    def build(self, input_shape):
        self.lender.build(input_shape)
        self.last.build((None, 4))

    def call(self, inputs):
        return self.last(ops.tanh(inputs @ self.lender.kernel))


def test_captured_layer_that_is_never_called():
    model, (x, y) = Borrowing(), regression()
    model(x)
    captured(model)
    model.predict(x, verbose=0)
    with pytest.raises(
        ValueError, match="Layer 'borrowing/lender' was captured, but the training step does not call it.*skip="
    ):
        fit(model, x, y)


def test_skip_of_the_layer_that_is_never_called():
    model, (x, y) = Borrowing(), regression()
    model(x)
    captured(model, skip="borrowing/lender")
    fit(model, x, y)
    assert model.optimizer.factor_updates == 4


def test_captured_layer_that_takes_no_part_in_the_loss():
    x = keras.Input((4,))
    outputs = {"used": layers.Dense(4, name="used")(x), "idle": layers.Dense(4, name="idle")(x)}
    model, (x, y) = keras.Model(x, outputs), regression()
    captured(model, loss={"used": "mse"})
    model.predict(x, verbose=0)
    with pytest.raises(ValueError, match="Layer 'idle' was captured, but the training step does not call it"):
        fit(model, x, {"used": y})


def test_sparse_input():
    x = keras.Input((4,), sparse=True)
    model, (values, y) = keras.Model(x, layers.Dense(4, name="first")(x)), regression(8)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        values = tf.sparse.from_dense(values)
    else:
        from jax.experimental import sparse

        values = sparse.BCOO.fromdense(values)
    with pytest.raises(ValueError, match="Layer 'first' was captured, but its input is a sparse tensor.*skip="):
        fit(captured(model), values, y)


# Precision


@pytest.mark.parametrize("name", ["mixed_float16", "float16"])
def test_float16_without_a_static_loss_scale(name):
    with policy(name):
        model = mlp()
    with pytest.raises(ValueError, match="Layer 'hidden' computes in float16.*Use the `mixed_bfloat16` policy, or"):
        keras_ngd.capture(model, kfac())
    keras_ngd.capture(model, kfac(loss_scale_factor=1024.0))


def test_dynamic_loss_scale():
    message = "KFAC cannot be wrapped in a LossScaleOptimizer.*square of a loss scale.*auto_scale_loss=False"
    with pytest.raises(ValueError, match=message):
        keras.optimizers.LossScaleOptimizer(kfac())
    with policy("mixed_float16"):
        model = mlp()
    with pytest.raises(ValueError, match=message):
        captured(model, kfac(loss_scale_factor=1024.0))


# Workers and backends


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="on JAX nothing of Horovod is looked at")
def test_horovod_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", None)
    with pytest.raises(
        ValueError, match="needs Horovod, which is not installed: run `horovod_scripts/install_horovod.sh`"
    ):
        captured(mlp(), kfac(communicator="horovod"))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="on JAX nothing of Horovod is looked at")
def test_horovod_that_is_not_initialised():
    pytest.importorskip("horovod.tensorflow")
    with pytest.raises(ValueError, match=r"needs `horovod.tensorflow.init\(\)` to be called first"):
        captured(mlp(), kfac(communicator="horovod"))


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="Horovod serves TensorFlow")
def test_horovod_on_another_backend(monkeypatch):
    class Started:
        is_initialized = staticmethod(lambda: True)
        size = staticmethod(lambda: 4)

    monkeypatch.setitem(sys.modules, "horovod.tensorflow", Started)
    for communicator in ("auto", "horovod"):
        with pytest.raises(ValueError, match="Horovod serves the TensorFlow backend, but KERAS_BACKEND='jax'"):
            captured(mlp(), kfac(communicator=communicator))


def test_sums_go_to_owners_alone_only_where_owners_alone_hold_inverses():
    with pytest.raises(ValueError, match="needs `gradient_worker_fraction=0`. Received: gradient_worker_fraction=1.0"):
        paper.KFAC(reduce_scatter=True)
    with pytest.raises(ValueError, match="`reduce_scatter` is for KFAC: THOR's trace rule"):
        paper.THOR(reduce_scatter=True, gradient_worker_fraction=0)
    with pytest.raises(ValueError, match="SNGD holds its small inverses on all workers"):
        paper.SNGD(reduce_scatter=True, gradient_worker_fraction=0)


def test_rows_are_held_by_all_workers():
    with pytest.raises(
        ValueError, match="SNGD holds its small inverses on all workers. Received: gradient_worker_fraction"
    ):
        paper.SNGD(gradient_worker_fraction=0.5)


def test_data_without_a_length_cannot_be_shared_out():
    import tensorflow as tf

    class Two(keras_ngd.distributed.Communicator):
        size = 2

    endless = tf.data.Dataset.range(3).repeat()
    with pytest.raises(ValueError, match="`dataset` must have a known length.*infinite"):
        keras_ngd.distributed.shard(endless, Two())
    with pytest.raises(ValueError, match="`dataset` must have a known length.*unknown"):
        keras_ngd.distributed.shard(endless.filter(lambda i: i > 0).take(4), Two())
    with pytest.raises(ValueError, match="an example for each of 2 workers. Received one of 1 examples"):
        keras_ngd.distributed.shard(tf.data.Dataset.range(1), Two())
    assert keras_ngd.distributed.shard(endless) is endless


def test_unsupported_backend(monkeypatch):
    model = mlp()
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(RuntimeError, match="keras_ngd runs on the Keras backends .*, but KERAS_BACKEND='torch'"):
        keras_ngd.capture(model, kfac())


def test_a_mode_in_units_of_the_curvature_needs_a_damping():
    with pytest.raises(ValueError, match="`damping_mode='pi'` is in units of the curvature and needs a `damping`"):
        keras_ngd.KFAC(damping_mode="pi")
