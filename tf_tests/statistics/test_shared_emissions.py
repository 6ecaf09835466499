"""Layers that record by one function: on TensorFlow it is a function of the graph's own, called by all of them."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_ngd.statistics import statistics as statistics_module
from tf_tests import small

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="on JAX a function is compiled with the step"
)


def network(hidden):
    """So many hidden layers of one shape, on 4 features."""
    inputs = keras.Input((4,))
    h = inputs
    for _ in range(hidden):
        h = layers.Dense(4, activation="tanh", kernel_initializer="orthogonal")(h)
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(h))


def trained(hidden, method):
    keras.utils.set_random_seed(0)
    model = small.captured(network(hidden), small.METHODS[method](), loss="sparse_categorical_crossentropy")
    rng = np.random.default_rng(0)
    model.fit(rng.normal(size=(24, 4)).astype("float32"), rng.integers(0, 3, 24), batch_size=8, verbose=0)
    return model


@pytest.fixture
def several(monkeypatch):
    """Sets from how many layers on a function is called."""

    def set_to(number):
        monkeypatch.setattr(statistics_module, "_EMISSIONS", {})
        monkeypatch.setattr(statistics_module, "_ATTACHED", type(statistics_module._ATTACHED)())
        monkeypatch.setattr(statistics_module, "_SEVERAL", number)

    return set_to


@pytest.mark.parametrize("method", ["kfac", "hylo", "eigen_adam"])
def test_training_is_the_same(method, several):
    weights = []
    for number in (3, 100):
        several(number)
        weights.append(trained(3, method).get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("hidden", "called"), [(2, 0), (3, 3), (4, 4)])
def test_three_layers_share_a_function(hidden, called, several):
    """The layer of another shape has one of its own, which is taken into the graph."""
    import tensorflow as tf

    several(3)
    model = trained(hidden, "kfac")
    x, y = tf.zeros((8, 4)), tf.zeros((8,), "int32")
    step = tf.function(model.train_step, autograph=False).get_concrete_function((x, y))
    library = step.graph.as_graph_def().library.function
    own = {f.signature.name for f in library if f.attr["_noinline"].b}
    branches = [f for f in library if any(n.attr["f"].func.name in own for n in f.node_def)]
    assert len(own) == len(branches) == (called > 0)
    emitting = [
        f
        for f in library
        if any(n.attr["then_branch"].func.name == b.signature.name for b in branches for n in f.node_def)
    ]
    calls = [n for n in step.graph.as_graph_def().node if n.attr["f"].func.name in {f.signature.name for f in emitting}]
    assert len(calls) == called
