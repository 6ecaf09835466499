"""The library needs the running backend alone: the other one need not be installed."""

import os
import pathlib
import subprocess
import sys

import keras
import pytest

BACKEND = keras.backend.backend()
OTHER = {"tensorflow": "jax", "jax": "tensorflow"}[BACKEND]

IMPORT = f"""
import sys

import keras_ngd

assert {OTHER!r} not in sys.modules
"""

# Where a module is None, importing it fails, as if it were not installed.
TRAIN = f"""
import sys

sys.modules[{OTHER!r}] = None

import keras
import numpy as np

import keras_ngd

x, y = np.ones((8, 4), "float32"), np.zeros((8, 3), "float32")
for method in ("KFAC", "THOR", "EKFAC", "EigenAdam", "SKFAC", "SNGD", "HyLo"):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    optimizer = getattr(keras_ngd, method)()
    report = keras_ngd.capture(model, optimizer, data=x)
    assert len(report.captured) == 1, report
    model.compile(optimizer, "mse", jit_compile={BACKEND == "jax"})
    before = model.layers[0].get_weights()[0]
    model.fit(x, y, batch_size=8, verbose=0)
    assert optimizer.factor_updates == 1
    assert np.any(model.layers[0].get_weights()[0] != before)
    keras_ngd.release(model)
"""


def run(program):
    root = str(pathlib.Path(__file__).parents[1])
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras on TensorFlow imports JAX where that is installed")
def test_importing_the_library_leaves_the_other_backend_alone():
    run(IMPORT)


def test_training_needs_the_running_backend_alone():
    run(TRAIN)
