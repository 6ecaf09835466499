"""What Keras does with models whose optimizer is ours: summaries, copies, compiling again, loops of one's own."""

import copy

import keras
import numpy as np
from keras import ops

import keras_ngd
from tf_tests.small import (
    array,
    assert_close,
    assert_same,
    captured,
    compiled,
    fit,
    kfac,
    mlp,
    regression,
    statistics,
    trained,
    weights,
)

STEPS = 4


# Models


def test_summary_lists_the_model_as_it_was(capsys):
    model = captured(mlp())
    fit(model, *regression())
    model.summary()
    printed = capsys.readouterr().out
    assert "hidden (Dense)" in printed
    assert "outputs (Dense)" in printed


def test_clone_of_a_captured_model():
    model, (x, y) = trained(), regression()
    clone = keras.models.clone_model(model)
    assert type(clone.get_layer("hidden")) is keras_ngd.layers.Dense
    assert clone.get_layer("hidden").statistics is not model.get_layer("hidden").statistics
    assert all(np.all(v == 0) for path, v in statistics(clone).items() if path.endswith("factor"))
    clone.set_weights(model.get_weights())
    assert_same(statistics(clone), statistics(model))
    before = weights(model)
    fit(compiled(clone, kfac()), x, y)
    assert clone.optimizer.factor_updates == STEPS
    assert_same(weights(model), before)
    fit(model, x, y)
    assert model.optimizer.factor_updates == 2 * STEPS


def test_copy_of_a_captured_model():
    model, (x, y) = trained(), regression()
    twin = copy.deepcopy(model)
    assert_same(statistics(twin), statistics(model))
    for each in (twin, model):
        fit(each, x, y)
    assert_same(weights(twin), weights(model))
    assert twin.optimizer.factor_updates == 2 * STEPS


def test_capture_after_compile():
    model, optimizer = mlp(), kfac()
    compiled(model, optimizer)
    keras_ngd.capture(model, optimizer)
    fit(model, *regression())
    assert optimizer.factor_updates == STEPS


def test_compiling_with_a_fresh_optimizer_opens_the_gates():
    model = trained(kfac(factor_interval=100))
    assert model.optimizer.factor_updates == 1
    gate = model.get_layer("hidden").statistics.gate
    assert float(array(gate)) == 0
    recorded = statistics(model)["hidden/statistics/output_factor"]

    second = kfac(factor_interval=100)
    compiled(model, second)
    x, y = regression()
    model.train_on_batch(x, y)
    assert second.factor_updates == 1
    rows = np.concatenate([x, np.ones((32, 1))], axis=1)
    factors = statistics(model)
    np.testing.assert_allclose(factors["hidden/statistics/input_factor"][0], rows.T @ rows / 32, rtol=1e-4, atol=1e-5)
    assert np.any(recorded != factors["hidden/statistics/output_factor"])
    fit(model, x, y)
    assert second.factor_updates == 1
    assert float(array(gate)) == 0


def test_two_models_two_optimizers():
    first, second, (x, y) = trained(kfac(factor_interval=2)), trained(), regression()
    fit(first, x, y)
    fit(second, x, y)
    assert first.optimizer.factor_updates == 4
    assert second.optimizer.factor_updates == 8


def test_custom_loop_with_gradients():
    """`optimizer.apply` called by hand, outside of any trainer."""
    keras.utils.set_random_seed(0)
    model, (x, y), optimizer = mlp(), regression(8), kfac()
    keras_ngd.capture(model, optimizer)
    optimizer.build(model.trainable_variables)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function
        def differentiate(x, y):
            with tf.GradientTape() as tape:
                loss = ops.mean(ops.square(model(x, training=True) - y))
            return tape.gradient(loss, [v.value for v in model.trainable_variables])

        for _ in range(2):
            optimizer.apply(differentiate(x, y), model.trainable_variables)
    else:
        import jax

        @jax.jit
        def step(trainable, state):
            def loss(values):
                return ops.mean(ops.square(model.stateless_call(values, [], x, training=True)[0] - y))

            return optimizer.stateless_apply(state, jax.grad(loss)(trainable), trainable)

        values = [v.value for v in model.trainable_variables], [v.value for v in optimizer.variables]
        for _ in range(2):
            values = step(*values)
        for variables, new in zip((model.trainable_variables, optimizer.variables), values, strict=True):
            for variable, value in zip(variables, new, strict=True):
                variable.assign(value)
    assert optimizer.factor_updates == 2
    keras.utils.set_random_seed(0)
    reference = captured(mlp())
    for _ in range(2):
        reference.train_on_batch(x, y)
    assert_close(weights(model), weights(reference))
