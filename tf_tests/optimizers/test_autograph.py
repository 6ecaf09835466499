"""TensorFlow's AutoGraph has nothing to say about what it traces, in `fit` and in a loop of one's own."""

import os
import subprocess
import sys

import keras
import pytest

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="AutoGraph is TensorFlow's")

# What AutoGraph says it says once in a process, at whichever method it comes first.
TRACES = """
import keras
import tensorflow as tf

import keras_ngd
from tf_tests.small import captured, fit, mlp, regression

x, y = regression(8)
optimizer = keras_ngd.KFAC(factor_interval=1, inverse_interval=1)
fit(captured(mlp(), optimizer), x, y)
steps = int(optimizer.iterations)
for optimizer in (
    keras_ngd.KFAC(factor_interval=1, inverse_interval=1),
    keras_ngd.THOR(split=2),
    keras_ngd.EKFAC(),
    keras_ngd.EigenAdam(),
    keras_ngd.SKFAC(batch_size=8),
    keras_ngd.SNGD(batch_size=8),
    keras_ngd.HyLo(batch_size=8, mode="kid"),
):
    model = mlp()
    keras_ngd.capture(model, optimizer)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((model(x, training=True) - y) ** 2)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)

    step(x, y)
    steps += int(optimizer.iterations)
print(steps, "steps")
"""


@pytest.mark.slow
def test_nothing_is_reported():
    environment = {k: v for k, v in os.environ.items() if k not in ("AUTOGRAPH_VERBOSITY", "TF_CPP_MIN_LOG_LEVEL")}
    done = subprocess.run([sys.executable, "-c", TRACES], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["8", "steps"], done.stderr[-2000:]
    assert "AutoGraph" not in done.stdout + done.stderr
    assert "Please report this" not in done.stderr
