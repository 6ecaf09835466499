"""Training steps compiled for TPUs: what is refused, and, where libtpu is installed, what the steps are made of."""

import importlib.util
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from keras_ngd import backend
from keras_ngd.analysis import TpuReport, tpu_compile, tpu_table
from keras_ngd.curvature.kronecker import inversion_method
from tf_tests import paper

on_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="TPUs are compiled for on the JAX backend")
BATCH = 8


def network(size=6):
    inputs = keras.Input((size, size, 2))
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="convolution")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="outputs")(layers.Flatten()(x)), name="network")


def compiled(**kwargs):
    model = network()
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"], **kwargs)
    return model


def test_auto_follows_what_is_compiled_for():
    assert inversion_method("auto") == "cholesky"
    with backend.compiling_for("TPU"):
        assert backend.on_accelerator()
        assert inversion_method("auto") == "newton-schulz"
        assert inversion_method("eigen") == "eigen"
    assert inversion_method("auto") == "cholesky"


def test_what_is_compiled_for_is_left_when_tracing_fails():
    with pytest.raises(ZeroDivisionError), backend.compiling_for("TPU"):
        _ = 1 / 0
    assert backend.compiled_for() is None


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="is about other backends")
def test_other_backends_are_told_which_to_choose():
    with pytest.raises(RuntimeError, match="KERAS_BACKEND=jax"):
        tpu_compile(compiled(), paper.KFAC())


@on_jax
def test_missing_compiler(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "libtpu" else find(name, *args)
    )
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ImportError, match=r'pip install "keras_ngd\[tpu\]"'):
        tpu_compile(compiled(), paper.KFAC())


@on_jax
@pytest.mark.parametrize("batch", [0, -1, 2.5, True, "8"])
def test_batches_that_are_none(batch):
    with pytest.raises(ValueError, match="`batch_per_chip` must be .* Received"):
        tpu_compile(compiled(), paper.KFAC(), batch_per_chip=batch)


@on_jax
def test_models_and_optimizers_that_are_none():
    with pytest.raises(ValueError, match="'network' is not compiled with a loss"):
        tpu_compile(network(), paper.KFAC())
    model = keras.Sequential([layers.Dense(2)], name="unbuilt")
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="'unbuilt' is not built"):
        tpu_compile(model, paper.KFAC())
    with pytest.raises(TypeError, match="`model` must be"):
        tpu_compile("resnet50", paper.KFAC())
    with pytest.raises(TypeError, match="`optimizer` must be"):
        tpu_compile(compiled(), "kfac")
    with pytest.raises(ValueError, match="split='auto'"):
        tpu_compile(compiled(), paper.THOR(split="auto"))
    with pytest.raises(TypeError, match="`plain` must be"):
        tpu_compile(compiled(), paper.KFAC(), plain="sgd")


@on_jax
def test_active_distribution():
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    try:
        with pytest.raises(RuntimeError, match="set_distribution"):
            tpu_compile(compiled(), paper.KFAC())
    finally:
        keras.distribution.set_distribution(None)


@on_jax
def test_tensors_are_whole_only_where_a_mesh_is_compiled_for():
    import jax

    def twice(x):
        return backend.on_every_device([2 * x])[0]

    x = np.ones((4, 2), "float32")
    assert "sharding_constraint" not in str(jax.make_jaxpr(twice)(x))
    with backend.compiling_for(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))):
        assert "sharding_constraint" in str(jax.make_jaxpr(lambda x: twice(x))(x))
        np.testing.assert_array_equal(jax.jit(lambda x: twice(x))(x), 2 * x)


@on_jax
def test_shapes_of_a_batch():
    from keras_ngd.analysis.tpu_steps import batch_specs

    def found(model, data=None):
        return [None if s is None else (s.shape, str(s.dtype)) for s in batch_specs(model, data, 32)]

    assert found(compiled()) == [((32, 6, 6, 2), "float32"), ((32,), "int32"), None]
    model = network()
    model.compile(loss="mse")
    assert found(model)[1] == ((32, 3), "float32")
    x, weights = np.zeros((5, 6, 6, 2), "float32"), np.zeros(5, "float32")
    data = found(model, (x, np.zeros((5, 3), "int8"), weights))
    assert data == [((32, 6, 6, 2), "float32"), ((32, 3), "int8"), ((32,), "float32")]
    with pytest.raises(ValueError, match="`data` must be"):
        batch_specs(model, x, 32)
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, layers.Dense(2)(inputs), name="sequences")
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="'sequences' has an axis of unknown size"):
        batch_specs(model, None, 32)


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "keras_ngd[tpu]"'
)


@on_jax
@needs_compiler
def test_unknown_topology():
    for topology in ("v5e:3x5x7", "gpu", "", None):
        with pytest.raises(ValueError, match="`topology` must be .* Received: topology="):
            tpu_compile(compiled(), paper.KFAC(), topology=topology)


@on_jax
@needs_compiler
@pytest.mark.slow
def test_command_line(tmp_path):
    path = tmp_path / "reports.json"
    command = [sys.executable, "-m", "keras_ngd.analysis", "tpu_compile", "--model=examples.networks:cnn_3c1f"]
    command += ["--method=hylo-kis", "--batch_per_chip=2", f"--json={path}"]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [report] = [TpuReport.from_dict(values) for values in json.loads(path.read_text())]
    assert (report.model, report.chips, report.batch_per_chip) == ("3c1f", 4, 2)
    assert str(report) in done.stdout
    assert tpu_table([report]) in done.stdout


@on_jax
@needs_compiler
@pytest.mark.slow
def test_steps_of_all_methods_on_four_chips():
    model, plain = compiled(), None
    before = [np.array(w) for w in model.get_weights()]
    optimizers = [
        paper.KFAC(),
        paper.KFAC(inverse="eigen", name="eigen"),
        paper.THOR(split=8),
        keras_ngd.EKFAC(),
        keras_ngd.EKFAC(scale="examples", name="examples"),
        keras_ngd.EigenAdam(),
        paper.SKFAC(),
        paper.SKFAC(convolution="subsample", name="subsample"),
        paper.SNGD(),
        paper.HyLo(mode="kid", name="kid"),
        paper.HyLo(mode="kis", name="kis"),
        paper.HyLo(steps_per_epoch=10, name="switch"),
    ]
    reports = []
    for optimizer in optimizers:
        report = tpu_compile(model, optimizer, "v5e:2x2", BATCH, plain=plain)
        step, plain = report.step, report.plain
        assert (report.chips, step.optimizer, plain.optimizer) == (4, optimizer.name, "sgd")
        assert not step.host, optimizer.name
        assert not plain.host
        # All that second order sends on every step are a few numbers; the rest stands in conditionals.
        assert plain.collective_bytes > 4 * 3
        assert plain.collective_bytes <= step.collective_bytes <= plain.collective_bytes + 64, optimizer.name
        assert step.update_collective_bytes > 0
        assert plain.update_collective_bytes == 0
        assert step.conditionals > 0 == plain.conditionals
        assert step.flops > plain.flops > 0
        assert step.argument_bytes > plain.argument_bytes > 0
        assert step.memory_bytes >= step.argument_bytes + step.temporary_bytes
        reports.append(report)
    kfac, eigen = reports[0].step, reports[1].step
    # "auto" iterates, in more loops than the retries alone; factorizations are there to fall back on.
    assert kfac.loops > 0
    assert "Cholesky" in kfac.custom_calls
    assert "Cholesky" not in eigen.custom_calls
    again = [TpuReport.from_dict(json.loads(json.dumps(report.as_dict()))) for report in reports]
    assert again == reports
    assert len(tpu_table(again).splitlines()) == 2 + 1 + len(reports)
    assert "waiting for the host" in str(again[0])
    # The model is as it was: plain, with its weights.
    assert model.optimizer is None or not isinstance(model.optimizer, keras_ngd.KFAC)
    assert type(model.get_layer("outputs")) is layers.Dense
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
