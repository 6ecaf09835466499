"""Models that were saved: what makes its own layers loads and predicts, what was released loads without this package."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests.small import JIT, METHODS, array, assert_same, captured, fit, kfac, mlp, regression, weights

pytestmark = pytest.mark.neutral


@keras.saving.register_keras_serializable("tf_tests")
class Own(layers.Layer):
    """A custom layer, which makes its inner layer itself."""

    def build(self, shape):
        self.inner = layers.Dense(4, activation="tanh", name="inner")
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x)


def some_own():
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(4, name="last")(Own(name="own")(inputs)))


def all_own():
    inputs = keras.Input((4,))
    return keras.Model(inputs, Own(name="second")(Own(name="first")(inputs)))


REFUSALS = {some_own: "its state cannot be used", all_own: "found no captured layers"}


@pytest.mark.parametrize(
    ("make", "method"),
    [(some_own, "kfac"), (all_own, "kfac")]
    + [pytest.param(m, n, marks=pytest.mark.slow) for m in REFUSALS for n in METHODS if n != "kfac"],
)
def test_custom_layers(make, method, tmp_path):
    path, again = tmp_path / "model.keras", tmp_path / "again.keras"
    model, (x, y) = captured(make(), METHODS[method]()), regression()
    fit(model, x, y)
    model.save(path)
    loaded = keras.models.load_model(path)
    assert_same(weights(loaded), weights(model))
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert loaded.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)
    # Loading lost nothing of what was saved.
    loaded.save(again)
    # On JAX, Keras's `fit` leaves no weights behind where its first step fails.
    for _ in range(1 if JIT else 2):
        with pytest.raises(ValueError, match=REFUSALS[make] if method == "kfac" else "captured|cannot be used"):
            fit(loaded, x, y)
    if not JIT:
        assert_same(weights(loaded), weights(model))
        assert loaded.optimizer.skipped_steps == 0
    steps = model.optimizer.inverse_updates
    for saved in (path, again) if method == "kfac" else (path,):
        resumed = keras.models.load_model(saved, compile=False)
        captured(resumed, METHODS[method]())
        resumed.load_weights(saved)
        resumed.optimizer.build(resumed.trainable_variables)
        assert resumed.optimizer.inverse_updates == steps
        if saved == path:
            for each in (resumed, model):
                fit(each, x, y)
            assert_same(weights(resumed), weights(model))


LOAD_ALONE = """
import sys
sys.modules["keras_ngd"] = None
import keras
import numpy as np

model = keras.models.load_model(sys.argv[1])
assert type(model.optimizer) is keras.optimizers.SGD, model.optimizer
assert abs(float(model.optimizer.learning_rate) - 0.025) < 1e-7, model.optimizer.learning_rate
assert model.optimizer.momentum == 0.5
assert int(model.optimizer.iterations) == 4
x = np.ones((8, 4), "float32")
assert np.isfinite(model.train_on_batch(x, x)).all()
print(model.metrics_names, model.steps_per_execution)
"""


def test_released_loads_without_this_package(tmp_path):
    rate = keras.optimizers.schedules.ExponentialDecay(0.05, 4, 0.5)
    model = captured(mlp(), kfac(learning_rate=rate, momentum=0.5), metrics=["mae"], steps_per_execution=2)
    x, y = regression()
    fit(model, x, y)
    before = model.evaluate(x, y, verbose=0)
    keras_ngd.release(model)
    assert model.evaluate(x, y, verbose=0) == before
    assert (model.jit_compile, model.steps_per_execution) == (JIT, 2)
    model.save(tmp_path / "released.keras")
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, tmp_path / "released.keras"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("method", METHODS)
def test_plain_optimizer_of_a_released_model(method):
    model = captured(mlp(), METHODS[method]())
    own = model.optimizer
    own.learning_rate = 0.25
    keras_ngd.release(model)
    assert type(model.optimizer) is keras.optimizers.SGD
    assert float(array(model.optimizer.learning_rate)) == 0.25
    assert model.optimizer.momentum == own.momentum
    assert "keras_ngd" not in str(model.get_compile_config())


def test_released_without_ours_keeps_its_optimizer():
    model = mlp()
    keras_ngd.release(model)
    assert not model.compiled
    keras_ngd.capture(model, kfac())
    model.compile(optimizer="adam", loss="mse")
    keras_ngd.release(model)
    assert type(model.optimizer) is keras.optimizers.Adam


@pytest.mark.parametrize("method", ["kfac", "hylo"])
def test_files_with_weights_for_each_number_of_a_tally(method):
    make, (x, y) = METHODS[method], regression()
    model = captured(mlp(), make())
    fit(model, x, y, epochs=2)
    for layer in model.layers[1:]:
        statistics, store = layer.statistics, {}
        statistics.save_own_variables(store)
        capacity = {name: store.pop(name) for name in list(store) if not name.isdigit()}
        tally = array(statistics.tally)
        [number] = [i for i, v in store.items() if np.shape(v) == (3,) and np.array_equal(v, tally)]
        values = [store[str(i)] for i in range(len(store))]
        older = [*values[: int(number)], *tally, *values[int(number) + 1 :]]
        before = {str(i): array(v) for i, v in enumerate(statistics.weights)}
        for variable in statistics.weights:
            variable.assign(array(variable) + 1)
        statistics.load_own_variables(capacity | {str(i): value for i, value in enumerate(older)})
        # The loss, which one of them carries, is not saved.
        assert_same({i: array(statistics.weights[int(i)]) for i in store}, {i: before[i] for i in store})
        with pytest.raises(ValueError, match="expected|must match"):
            statistics.load_own_variables(capacity | {str(i): value for i, value in enumerate(older[:-1])})
