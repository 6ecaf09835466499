"""Tests that modules of `keras_ngd.analysis` hide none of its functions and define no flags when they are imported."""

import importlib
import pathlib
import subprocess
import sys

import keras
import pytest

import keras_ngd
from keras_ngd.analysis.__main__ import COMMANDS
from tf_tests.small import mlp, regression

# In a process of its own: here other tests have imported what they needed.
IMPORT_ALL = """
import importlib
import pkgutil

import tensorflow
from absl import app, flags

import keras_ngd
from tf_tests.small import mlp, regression

before = set(flags.FLAGS)
modules = [m.name for m in pkgutil.iter_modules(keras_ngd.analysis.__path__)]
for name in modules:
    importlib.import_module(f"keras_ngd.analysis.{name}")
assert set(flags.FLAGS) == before, set(flags.FLAGS) - before
assert not set(modules) & set(keras_ngd.analysis.__all__)
assert all(callable(getattr(keras_ngd.analysis, name)) for name in keras_ngd.analysis.__all__)

x, y = regression()
model = mlp()
optimizer = keras_ngd.THOR(split="auto", factor_interval=1, inverse_interval=1)
keras_ngd.capture(model, optimizer, data=x)
assert isinstance(optimizer.split, dict) or optimizer.split is None or optimizer.split >= 1, optimizer.split
print(len(modules))
"""


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_all_modules_together():
    done = run("-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) == len(list(pathlib.Path(keras_ngd.analysis.__path__[0]).glob("*.py"))) - 1


def test_no_module_has_the_name_of_a_function():
    modules = {path.stem for path in pathlib.Path(keras_ngd.analysis.__path__[0]).glob("*.py")}
    assert not modules & set(keras_ngd.analysis.__all__)
    assert set(COMMANDS) <= set(keras_ngd.analysis.__all__)
    assert set(COMMANDS.values()) <= modules


def test_auto_split_after_the_command_was_imported():
    importlib.import_module("keras_ngd.analysis.split_command")

    x, _ = regression()
    optimizer = keras_ngd.THOR(split="auto")
    keras_ngd.capture(mlp(), optimizer, data=x)
    assert optimizer.split != "auto"


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="one backend shows that it runs")
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help(name):
    done = run("-m", "keras_ngd.analysis", name, "--help")
    assert f"python -m keras_ngd.analysis {name} --model" in done.stdout
    assert "--[no]packed" in done.stdout if name == "cost_model" else "--image_size" in done.stdout


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="one backend shows that it runs")
@pytest.mark.slow
def test_no_command():
    done = run("-m", "keras_ngd.analysis", "split")
    assert done.returncode == 1
    assert "must be a command: cost_model, split_dimension, tpu_compile. Received: 'split'" in done.stderr
