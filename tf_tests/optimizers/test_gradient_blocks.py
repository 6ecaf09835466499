"""EigenAdam with bases of the gradients (SOAP), which trains any model without captured layers."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from keras_ngd.optimizers.gradient_blocks import matrix_shape
from tf_tests.layers.kinds import GROUPS, group
from tf_tests.reference import eigenbasis
from tf_tests.reference.running import close, drawn
from tf_tests.small import JIT, array, assert_close, assert_same, compiled, fit, mlp, policy, regression, weights

pytestmark = pytest.mark.neutral

BATCH = 8


def make(**arguments):
    return keras_ngd.EigenAdam(**{"basis": "gradient", "inverse_interval": 2, **arguments})


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 3, 8, 16), (72, 16)),
        ((64, 4, 16), (64, 64)),
        ((4, 16, 64), (64, 64)),
        ((5, 7), (5, 7)),
        ((1, 7), None),
        ((7,), None),
        ((), None),
        ((2, 1, 3), (2, 3)),
    ],
)
def test_kernels_are_cut_where_both_sides_are_nearest(shape, expected):
    assert matrix_shape(shape) == expected


def test_a_training_is_that_of_soap(float64):
    """Twenty steps, kernels by SOAP and biases by Adam. (Kernels are square: of others' gradients one side has no rank.)"""
    rate, frequency, decay, steps = 2.0**-6, 3, 0.75, 20
    x, y = (t.astype("float64") for t in regression(BATCH * steps))
    inputs = keras.Input((4,))
    arguments = {"kernel_initializer": drawn, "bias_initializer": drawn}
    hidden = layers.Dense(4, activation="tanh", **arguments)(inputs)
    model = keras.Model(inputs, layers.Dense(4, **arguments)(hidden))
    optimizer = make(
        learning_rate=rate,
        factor_decay=decay,
        inverse_interval=frequency,
        interval_growth=None,
        basis_tolerance=0.0,
        epsilon=1e-6,
    )
    compiled(model, optimizer, loss=lambda y, p: keras.ops.sum(keras.ops.square(y - p), axis=-1))
    parameters = [v.copy() for v in weights(model).values()]
    fit(model, x, y)
    rules = [eigenbasis.Soap(p.shape, frequency, decay, epsilon=1e-6) if p.ndim == 2 else None for p in parameters]
    adams = [eigenbasis.Adam((p.size, 1), beta_2=0.999, epsilon=1e-12) for p in parameters]
    for step in range(steps):
        w1, b1, w2, b2 = parameters
        batch = slice(BATCH * step, BATCH * (step + 1))
        h = np.tanh(x[batch] @ w1 + b1)
        outputs = 2 * (h @ w2 + b2 - y[batch]) / BATCH
        upstream = (outputs @ w2.T) * (1 - h**2)
        gradients = [x[batch].T @ upstream, upstream.sum(axis=0), h.T @ outputs, outputs.sum(axis=0)]
        for i, gradient in enumerate(gradients):
            if gradient.ndim == 2:
                parameters[i] = parameters[i] - rate * rules[i].direction(gradient)
            else:
                step_of = adams[i].direction(gradient[:, None], np.eye(gradient.size), np.eye(1))
                parameters[i] = parameters[i] - rate * step_of[:, 0]
    assert optimizer.inverse_updates == 7
    for found, expected in zip(weights(model).values(), parameters, strict=True):
        close(found, expected, 2e-5)


@pytest.mark.parametrize("split", [1, 3])
def test_sides_that_are_too_wide_have_no_basis(split):
    x, y = regression(BATCH * 4)
    optimizer = make(split=split, beta_2=0.999, epsilon=1e-7, learning_rate=0.01)
    model, other = compiled(mlp(), optimizer), compiled(mlp(), keras.optimizers.Adam(0.01))
    other.set_weights(model.get_weights())
    for each in (model, other):
        fit(each, x, y)
    assert_close(weights(model), {k: v for k, v in zip(weights(model), weights(other).values(), strict=True)})


@pytest.mark.parametrize("name", ["matrices", "convolutions", "tables", "scales", "loops"])
def test_it_trains_any_model_and_resumes_bit_for_bit(name, tmp_path):
    assert name in GROUPS
    kinds = group(name)
    model, (x, y) = compiled(kinds.model(), make(weight_decay=0.01)), kinds.data()
    before = weights(model)
    fit(model, x, y)
    assert model.optimizer.skipped_steps == model.optimizer.failed_bases == model.optimizer.clipped_steps == 0
    assert model.optimizer.mean_step_scale == 1
    after = weights(model)
    assert all(np.isfinite(v).all() for v in after.values())
    trained = [v.path for v in model.trainable_variables]
    assert all(np.any(after[path] != before[path]) for path in trained)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        fit(each, x, y)
    for found, expected in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(array(found), array(expected))


def state(model):
    found = []
    for matrices in model.optimizer.gradient_blocks.groups:
        found += [*matrices.curvature.variables, *matrices.factors]
    return {f"{i} {v.path}": array(v) for i, v in enumerate(found)}


def test_a_batch_that_is_not_finite_leaves_matrices_and_their_state_as_they_were():
    x, y = regression(BATCH * 3)
    model = compiled(mlp(), make(inverse_interval=1))
    fit(model, x, y)
    before = {**state(model), **{k: v for k, v in weights(model).items() if "kernel" in k}}
    bad = x[:BATCH].copy()
    bad[1, 1] = np.nan
    fit(model, bad, y[:BATCH])
    assert_same({**state(model), **{k: v for k, v in weights(model).items() if "kernel" in k}}, before)
    assert model.optimizer.skipped_steps == 1
    fit(model, x, y)
    assert (model.optimizer.factor_updates, model.optimizer.inverse_updates) == (6, 6)
    assert all(np.isfinite(v).all() for v in weights(model).values())


@pytest.mark.skipif(JIT, reason="JAX compiles every step")
def test_xla_takes_the_same_steps():
    x, y = regression(BATCH * 3)
    found = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        model = mlp()
        # Its eigenvectors are rounded otherwise, which decides where there is little of a gradient.
        model.compile(optimizer=make(epsilon=0.1), loss="mse", jit_compile=jit_compile)
        fit(model, x, y)
        found.append(weights(model))
    assert_close(found[1], found[0], 1e-3)


def test_mixed_precision_and_a_loss_scale():
    x, y = regression(BATCH * 3)
    with policy("mixed_bfloat16"):
        model = compiled(mlp(), make())
    before = model.evaluate(x, y, verbose=0)
    assert fit(model, x, y, epochs=4).history["loss"][-1] < before
    found = []
    for scale in (None, 256.0):
        keras.utils.set_random_seed(0)
        model = compiled(mlp(), make(loss_scale_factor=scale))
        fit(model, x, y)
        found.append(weights(model))
    assert_close(found[1], found[0])


def test_a_model_without_matrices_takes_adams_steps():
    x, y = regression(BATCH * 3)
    found = []
    for optimizer in (make(learning_rate=0.01), keras.optimizers.Adam(0.01)):
        model = keras.Sequential([keras.Input((4,)), layers.LayerNormalization()])
        fit(compiled(model, optimizer), x, y)
        found.append(weights(model))
    assert_close(found[0], dict(zip(found[0], found[1].values(), strict=True)))


def test_capture_says_that_it_is_not_needed():
    with pytest.raises(ValueError, match="basis='gradient'.*needs no captured layers"):
        keras_ngd.capture(mlp(), make())
    with pytest.raises(ValueError, match="`basis`"):
        make(basis="hessian")


def test_a_model_that_was_captured_for_another_optimizer_trains_too():
    x, y = regression(BATCH * 3)
    model = mlp()
    keras_ngd.capture(model, keras_ngd.KFAC())
    before = model.evaluate(x, y, verbose=0) if model.compiled else None
    assert before is None
    compiled(model, make())
    history = fit(model, x, y, epochs=3).history["loss"]
    assert history[-1] < history[0]
