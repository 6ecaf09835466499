"""One captured model after the other is built, trained and thrown away: nothing of them stays."""

import gc
import os
import subprocess
import sys

import keras
import pytest
from keras import layers

import keras_ngd
from tf_tests import small

TENSORFLOW = keras.backend.backend() == "tensorflow"
WARM_UPS, MODELS = 4, 12
X, Y = small.regression(24, 6, 6)


def network():
    inputs = keras.Input((6,))
    hidden = inputs
    for _ in range(4):
        hidden = layers.Dense(6, activation="tanh")(hidden)
    return keras.Model(inputs, hidden)


def trained(optimizer):
    """A model after an epoch with a short last batch."""
    model = network()
    if isinstance(optimizer, keras_ngd.KFAC):
        keras_ngd.capture(model, optimizer)
    small.fit(small.compiled(model, optimizer), X, Y, batch_size=16)
    return model


def growth(optimizer):
    """MiB that each model leaves behind, trained with a new `optimizer()`."""
    import psutil

    for count in range(WARM_UPS + MODELS):
        if count == WARM_UPS:
            before = psutil.Process().memory_info().rss
        trained(optimizer())
        gc.collect()
    return (psutil.Process().memory_info().rss - before) / MODELS / 2**20


@pytest.mark.skipif(not TENSORFLOW, reason="graphs are TensorFlow's")
def test_graphs_are_let_go_with_their_model():
    """But for those of what layers of one geometry emit, which are kept for the next model of this geometry."""
    from tensorflow.python.framework import func_graph, ops

    def alive():
        gc.collect()
        graphs = sum(isinstance(thing, func_graph.FuncGraph) for thing in gc.get_objects())
        return graphs, sorted(ops.gradient_registry.list())

    trained(small.kfac())
    before = alive()
    trained(small.kfac())
    assert alive() == before


@pytest.mark.slow
@pytest.mark.skipif(not TENSORFLOW, reason="on JAX a model leaves less than can be told from how memory is handed out")
def test_a_sweep_of_captured_models_grows_no_more_than_twice_as_much_as_one_of_plain_models():
    """Of 0.5 MiB a model, the least that can be told from how memory happens to be handed out, nothing is said."""

    def grown(name):
        command = [sys.executable, "-m", "tf_tests.capturing.test_sweeps", name]
        return float(subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout)

    captured = grown("kfac")
    assert captured <= 0.5 or captured <= 2 * grown("sgd")


if __name__ == "__main__":
    print(growth({"sgd": keras.optimizers.SGD, "kfac": small.kfac}[sys.argv[1]]))
