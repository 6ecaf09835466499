"""TensorFlow's AutoGraph has nothing to say about what it traces, in `fit` and in a loop of one's own."""

import os
import subprocess
import sys

import keras
import pytest

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="AutoGraph is TensorFlow's")

# What AutoGraph says it says once in a process.
TRACES = """
import sys
import keras
import tensorflow as tf

import keras_ngd
from tf_tests.small import captured, fit, mlp, regression

optimizer = {
    "kfac": lambda: keras_ngd.KFAC(factor_interval=1, inverse_interval=1),
    "thor": lambda: keras_ngd.THOR(split=2),
    "skfac": lambda: keras_ngd.SKFAC(batch_size=8),
    "sngd": lambda: keras_ngd.SNGD(batch_size=8),
    "hylo": lambda: keras_ngd.HyLo(batch_size=8, mode="kid"),
}[sys.argv[1]]()
x, y = regression(8)
if sys.argv[2] == "fit":
    fit(captured(mlp(), optimizer), x, y)
else:
    model = mlp()
    keras_ngd.capture(model, optimizer)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((model(x, training=True) - y) ** 2)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)

    step(x, y)
print(int(optimizer.iterations), "steps")
"""


@pytest.mark.parametrize(
    ("method", "how"),
    [("kfac", "loop")]
    + [pytest.param("kfac", "fit", marks=pytest.mark.slow)]
    + [pytest.param(m, "loop", marks=pytest.mark.slow) for m in ("thor", "skfac", "sngd", "hylo")],
)
def test_nothing_is_reported(method, how):
    environment = {k: v for k, v in os.environ.items() if k not in ("AUTOGRAPH_VERBOSITY", "TF_CPP_MIN_LOG_LEVEL")}
    done = subprocess.run(
        [sys.executable, "-c", TRACES, method, how], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["1", "steps"], done.stderr[-2000:]
    assert "AutoGraph" not in done.stdout + done.stderr
    assert "Please report this" not in done.stderr
