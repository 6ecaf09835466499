"""EKFAC: steps against dense solves in float64, and the scale of its second moments."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests.reference.running import close, drawn
from tf_tests.small import array, assert_close, captured, compiled, fit, gradients, mlp, regression, weights

BATCH = 8
PLAIN = {"momentum": 0.0, "loss_clip": 1e9, "factor_interval": 1, "inverse_interval": 1}


def network():
    """A convolution and a dense layer."""
    inputs = keras.Input((4, 4, 2))
    arguments = {"kernel_initializer": drawn, "bias_initializer": drawn}
    h = layers.Conv2D(3, 3, activation="tanh", name="convolution", **arguments)(inputs)
    return keras.Model(inputs, layers.Dense(4, name="outputs", **arguments)(layers.Flatten()(h)))


def data(steps=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(BATCH * steps, 4, 4, 2)), rng.normal(size=(BATCH * steps, 4))


def test_steps_are_dense_solves_in_the_basis(float64):
    x, y = data()
    model = captured(network(), keras_ngd.EKFAC(0.125, 2.0**-5, fisher_scale=None, **PLAIN))
    fit(model, x[:-BATCH], y[:-BATCH])
    before = weights(model)
    found = gradients(model, x[-BATCH:], y[-BATCH:])
    fit(model, x[-BATCH:], y[-BATCH:])
    assert model.optimizer.factor_updates == 3
    assert len(model.optimizer.layout.groups) == 2
    for group in model.optimizer.layout.groups:
        [block] = group.blocks
        qa, qg, _, second = (array(v)[0] for v in group.curvature.variables)
        kernel, bias = (v.path for v in block.variables)
        v = np.concatenate([np.reshape(found[kernel], (-1, second.shape[1])), found[bias][None]])
        both = np.kron(qa[0], qg[0])
        fisher = both @ np.diag(second.reshape(-1)) @ both.T + 2.0**-5 * np.eye(v.size)
        step = -0.125 * np.linalg.solve(fisher, v.reshape(-1)).reshape(v.shape)
        close(weights(model)[kernel] - before[kernel], step[:-1].reshape(before[kernel].shape), 1e-8)
        close(weights(model)[bias] - before[bias], step[-1], 1e-8)


@pytest.mark.parametrize("losses_per_example", ["auto", 3.0])
def test_squares_of_one_example_have_the_trace_of_its_fisher_matrix(losses_per_example, float64):
    """Of a dense layer both are those of `a g^T`."""
    x, y = data(1)
    arguments = {**PLAIN, "factor_decay": 0.5, "basis_tolerance": 0.9, "losses_per_example": losses_per_example}
    model = captured(network(), keras_ngd.EKFAC(1e-12, 0.05, fisher_scale=None, **arguments), skip="convolution")
    fit(model, x[:1], y[:1], batch_size=1, epochs=30)
    [group] = model.optimizer.layout.groups
    [block] = group.blocks
    traces = [np.trace(array(v)[0, 0]) for v in block.statistics.averages]
    assert array(group.curvature.variables[-1]).sum() == pytest.approx(np.prod(traces), rel=1e-6)


def trained(**arguments):
    keras.utils.set_random_seed(0)
    model = mlp()
    optimizer = keras_ngd.EKFAC(factor_interval=1, inverse_interval=1, **arguments.pop("optimizer", {}))
    keras_ngd.capture(model, optimizer)
    compiled(model, optimizer, **arguments)
    fit(model, *regression(BATCH * 6))
    return model


def test_steps_do_not_depend_on_the_units_of_the_loss():
    plain = weights(trained())
    assert_close(weights(trained(loss_weights=[8.0])), plain)
    assert_close(weights(trained(optimizer={"loss_scale_factor": 256.0})), plain)


def test_a_sum_takes_the_steps_of_a_mean():
    plain = weights(trained(loss=keras.losses.MeanSquaredError()))
    assert_close(weights(trained(loss=keras.losses.MeanSquaredError(reduction="sum"))), plain, 1e-4)


@pytest.mark.parametrize(
    "arguments", [{"damping": 0}, {"damping": 0.1, "damping_mode": "pi"}, {"losses_per_example": 0}], ids=str
)
def test_arguments_out_of_range_are_named(arguments):
    with pytest.raises(ValueError, match=f"`{[*arguments][-1]}`"):
        keras_ngd.EKFAC(**arguments)
