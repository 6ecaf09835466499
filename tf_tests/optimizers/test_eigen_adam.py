"""EigenAdam: whole trainings against float64, its limits, and what must leave its state alone."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests import small
from tf_tests.optimizers import test_layers_not_called as not_called
from tf_tests.reference import eigenbasis, kronecker, rows
from tf_tests.reference.running import close
from tf_tests.small import array, assert_close, assert_same, captured, compiled, fit, mlp, regression, weights

pytestmark = pytest.mark.neutral

BATCH, STEPS, DECAY = 8, 6, 0.8
EACH = {"factor_interval": 1, "inverse_interval": 1, "factor_decay": DECAY}


def make(**arguments):
    return keras_ngd.EigenAdam(**{**EACH, **arguments})


def data(seed=0):
    x, y = regression(BATCH * STEPS)
    return x, y


def state(model):
    """Copies of the curvature's state, by path."""
    return {v.path: array(v) for group in model.optimizer.layout.groups for v in group.curvature.variables}


def signals(parameters, x, y):
    """Of both layers of `small.mlp` the rows, those of the gradients, and the gradient, in float64."""
    w1, b1, w2, b2 = parameters
    hidden = np.tanh(x @ w1 + b1)
    outputs = 2 * (hidden @ w2 + b2 - y) / y.size
    upstream = (outputs @ w2.T) * (1 - hidden**2)
    found = []
    for inputs, gradients in ((x, upstream), (hidden, outputs)):
        a, ghat = rows.append_ones(rows.dense_rows(inputs)), rows.dense_rows(gradients)
        found.append((a, ghat, np.einsum("knti,knto->io", a, ghat)))
    return found


def test_a_training_is_that_of_the_reference():
    """With eigendecompositions at every step, and the decoupled decay of all weights."""
    rate, decay = 0.02, 0.1
    x, y = data()
    model = captured(mlp(), make(learning_rate=rate, weight_decay=decay, decomposition="eigh", basis_tolerance=0.0))
    parameters = [v.astype("float64") for v in weights(model).values()]
    fit(model, x, y)
    adams, history = [eigenbasis.Adam((5, 4)) for _ in range(2)], [[], []]
    for step in range(STEPS):
        batch = slice(BATCH * step, BATCH * (step + 1))
        new = []
        found = signals(parameters, x[batch].astype("float64"), y[batch].astype("float64"))
        for i, (a, ghat, v) in enumerate(found):
            history[i].append((kronecker.input_factor(a)[0], kronecker.output_factor(ghat, BATCH)[0]))
            averages = [kronecker.running_average(side, DECAY) for side in zip(*history[i], strict=True)]
            # The library's order, which decides on the entries of S.
            bases = [basis[:, ::-1] for basis in eigenbasis.bases(*averages)]
            p = adams[i].direction(v, *bases)
            w, b = parameters[2 * i : 2 * i + 2]
            new += [w - rate * p[:-1] - rate * decay * w, b - rate * p[-1] - rate * decay * b]
        parameters = new
    for found, expected in zip(weights(model).values(), parameters, strict=True):
        close(found, expected, 2e-3)


def test_without_bases_it_is_keras_adam():
    """Blocks of size 1 have none."""
    x, y = data()
    arguments = {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.97, "epsilon": 1e-12}
    models = [captured(mlp(), make(split=1, **arguments)), compiled(mlp(), keras.optimizers.Adam(**arguments))]
    models[1].set_weights([*weights(models[0]).values()])
    for model in models:
        fit(model, x, y, epochs=2)
    assert_close(weights(models[0]), weights(models[1]))


def test_rotating_the_inputs_rotates_the_steps():
    x, y = data()
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0].astype("float32")
    models = []
    for rotation in (np.eye(4, dtype="float32"), turn):
        # A bias would not be rotated, but belongs to the same factor.
        inputs = keras.Input((4,))
        keras.utils.set_random_seed(3)
        hidden = layers.Dense(4, activation="tanh", use_bias=False, name="hidden")(inputs)
        model = captured(keras.Model(inputs, layers.Dense(4, name="outputs")(hidden)), make(basis_tolerance=0.0))
        kernel = model.get_layer("hidden").kernel
        before = array(kernel)
        kernel.assign(rotation.T @ before)
        fit(model, (x @ rotation).astype("float32")[: 3 * BATCH], y[: 3 * BATCH])
        models.append(rotation @ array(kernel) - before)
    close(models[1], models[0], 1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_leaves_all_as_it_was(value):
    """Weights, decayed ones too where nothing says otherwise, bases, moments and numbers of steps; and then it goes on."""
    x, y = data()
    model = captured(mlp(), make())
    fit(model, x[: 2 * BATCH], y[: 2 * BATCH])
    before = {**weights(model), **state(model)}
    bad = x[:BATCH].copy()
    bad[3, 1] = value
    fit(model, bad, y[:BATCH])
    assert_same({**weights(model), **state(model)}, before)
    assert model.optimizer.skipped_steps == model.optimizer.skipped_statistics == 1
    assert model.optimizer.failed_bases == 0
    fit(model, x[: 2 * BATCH], y[: 2 * BATCH])
    steps = [v for path, v in state(model).items() if "steps" in path]
    assert [v.tolist() for v in steps] == [[4, 4]]
    assert all(np.isfinite(v).all() for v in {**weights(model), **state(model)}.values())


def test_gradients_whose_squares_are_too_large_leave_all_as_it_was():
    x, y = data()
    model = captured(mlp(), make())
    fit(model, x[: 2 * BATCH], y[: 2 * BATCH])
    before = {**weights(model), **state(model)}
    fit(model, x[:BATCH], 1e25 * y[:BATCH])
    assert_same({**weights(model), **state(model)}, before)
    assert model.optimizer.skipped_steps == 1


def test_a_layer_that_is_not_called_keeps_its_weights_and_its_state():
    model = captured(not_called.network(), make())
    kernel = model.get_layer("branch").dense.kernel

    def of_the_branch():
        [group] = model.optimizer.layout.groups
        number = [block.layer for block in group.blocks].index(model.get_layer("branch").dense.path)
        return [array(v)[number] for v in group.curvature.variables] + [array(kernel)]

    not_called.train(model, 0, True)
    before = of_the_branch()
    for step in (1, 2):
        not_called.train(model, step, False)
        for found, expected in zip(of_the_branch(), before, strict=True):
            np.testing.assert_array_equal(found, expected)
    not_called.train(model, 3, True)
    assert of_the_branch()[-2] == 2
    assert not np.array_equal(of_the_branch()[-1], before[-1])


def test_a_loss_scale_changes_no_step():
    x, y = data()
    found = []
    for scale in (None, 1024.0):
        model = small.trained(make(loss_scale_factor=scale))
        found.append(weights(model))
    assert_close(found[1], found[0])


def test_the_rest_of_a_model_takes_adams_steps_at_the_same_rate():
    x, y = data()
    found = []
    for optimizer in (make(learning_rate=0.02), keras.optimizers.Adam(0.02)):
        model = mlp()
        if isinstance(optimizer, keras_ngd.EigenAdam):
            keras_ngd.capture(model, optimizer, skip="outputs")
        else:
            model.get_layer("hidden").trainable = False
        found.append(compiled(model, optimizer))
    found[1].set_weights([*weights(found[0]).values()])
    # The first step does not depend on the other layer's.
    for model in found:
        fit(model, x[:BATCH], y[:BATCH])
    outputs = [{path: v for path, v in weights(model).items() if "outputs" in path} for model in found]
    assert_close(outputs[0], outputs[1])


def test_weight_decay_may_leave_variables_out():
    x, y = data()
    model = mlp()
    optimizer = make(learning_rate=1e-6, weight_decay=1e4)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    captured(model, optimizer)
    model.get_layer("hidden").bias.assign(np.ones(4))
    before = weights(model)
    fit(model, x[:BATCH], y[:BATCH])
    after = weights(model)
    close(after["hidden/kernel"], 0.99 * before["hidden/kernel"], 1e-4)
    close(after["hidden/bias"], before["hidden/bias"], 1e-4)


def test_bases_follow_the_eigenvectors_over_a_training():
    x, y = data()
    model = captured(mlp(), make(basis_tolerance=0.0))
    fit(model, x, y, epochs=4)
    [group] = model.optimizer.layout.groups
    for side in range(2):
        bases = array(group.curvature.variables[side])[:, 0]
        for block, basis in zip(group.blocks, bases, strict=True):
            factor = array(block.statistics.averages[side])[0, 0].astype("float64")
            assert eigenbasis.residual(factor, basis.astype("float64")) < 0.2


def test_failed_bases_are_counted_and_said_once():
    model = captured(mlp(), make())
    fit(model, *data())
    assert model.optimizer.failed_bases == 0
    [failures] = model.optimizer._failures()
    failures.assign([2.0, 1.0])
    assert model.optimizer.failed_bases == 3
    with pytest.warns(UserWarning, match="3 times a basis could not be renewed"):
        fit(model, *data())


@pytest.mark.parametrize(
    "arguments",
    [
        {"beta_1": 1.0},
        {"beta_2": -0.1},
        {"epsilon": 0},
        {"decomposition": "svd"},
        {"basis_tolerance": 1},
        {"split": 0},
        {"weight_sharing": "sum"},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_named(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        keras_ngd.EigenAdam(**arguments)


def test_state_that_would_not_be_saved_is_refused():
    """Of a method of one's own, which may take the argument."""
    model = mlp()
    keras_ngd.capture(model, optimizer := make())
    optimizer.gradient_worker_fraction = 0.5
    with pytest.raises(ValueError, match="`gradient_worker_fraction` at 1. Received: gradient_worker_fraction=0.5"):
        fit(compiled(model, optimizer), *data())


def test_bases_of_gradients_train_after_a_captured_model_was():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 4)).astype("float32"), rng.normal(size=(16, 2)).astype("float32")
    for optimizer in (keras_ngd.KFAC(), keras_ngd.EigenAdam(basis="gradient")):
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(2)])
        if isinstance(optimizer, keras_ngd.KFAC):
            keras_ngd.capture(model, optimizer)
        model.compile(optimizer=optimizer, loss="mse")
        # The loss of the evaluation is what the layers of the first saw last.
        losses = model.fit(x, y, batch_size=8, epochs=3, validation_data=(x, y), verbose=0).history["loss"]
        assert np.isfinite(losses).all()
