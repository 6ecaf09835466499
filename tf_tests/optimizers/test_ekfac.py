"""EKFAC: steps against dense solves in float64, and the scale of its second moments."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests.reference import fisher
from tf_tests.reference.running import close, drawn
from tf_tests.small import array, assert_close, captured, compiled, fit, gradients, mlp, regression, weights

pytestmark = pytest.mark.neutral

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


# Second moments of examples


def recorded(model, x, y, **arguments):
    """Of each block its bases, `S` in them, and the factors, all of one batch, after two steps with it that change nothing."""
    optimizer = keras_ngd.EKFAC(
        **{
            "learning_rate": 1e-30,
            "scale": "examples",
            "fisher_scale": None,
            "factor_decay": 0.0,
            "interval_growth": None,
            "inverse_interval": 100,
            "factor_interval": 1,
            **arguments,
        }
    )
    captured(model, optimizer)
    fit(model, x, y, epochs=2)
    assert (optimizer.factor_updates, optimizer.inverse_updates) == (2, 1)
    found = {}
    for group in optimizer.layout.groups:
        for number, block in enumerate(group.blocks):
            bases = [array(v)[number, 0] for v in group.curvature.variables[:2]]
            *factors, second = (array(v)[0] for v in block.statistics.averages)
            np.testing.assert_array_equal([array(c)[0, 0] for c in block.statistics.controls][0], bases[0])
            found[block.layer] = (*bases, second.reshape(len(bases[0]), -1), *(f[0] for f in factors))
    return found


@pytest.mark.parametrize("chunk", [1, 2**21])
def test_second_moments_of_examples_are_the_diagonal_of_the_fisher_matrix(chunk, float64, monkeypatch):
    """In its basis; so they have its trace, and are nearer to it than Kronecker factors are."""
    monkeypatch.setattr("keras_ngd.statistics.second_moments._CHUNK_ENTRIES", chunk * 57 * 3)
    x, y = data(1)
    model = network()
    start = [v.copy() for v in weights(model).values()]
    found = recorded(model, x, y, losses_per_example=1)
    w, b, w2, b2 = start
    patches = unfolded(x)
    z = np.einsum("npi,io->npo", patches, w.reshape(-1, 3)) + b
    h = np.tanh(z)
    flat = h.reshape(BATCH, -1)
    outputs = 2 * (flat @ w2 + b2 - y) / y.size
    upstream = (outputs @ w2.T).reshape(h.shape) * (1 - h**2)
    rows = {
        "convolution": (np.concatenate([patches, np.ones_like(patches[..., :1])], -1)[None], upstream[None]),
        "outputs": (np.concatenate([flat, np.ones((BATCH, 1))], 1)[None, :, None], outputs[None, :, None]),
    }
    for layer, (a, ghat) in rows.items():
        qa, qg, second, factor_a, factor_g = found[layer]
        [block] = fisher.fisher_blocks(a, ghat, BATCH)
        both = np.kron(qa, qg)
        # Keras takes means in float32 on JAX.
        close(second.reshape(-1), np.diag(both.T @ block @ both), 1e-6)
        assert second.sum() == pytest.approx(np.trace(block), rel=1e-6)
        errors = [
            np.linalg.norm(block - m)
            for m in (both @ np.diag(second.reshape(-1)) @ both.T, np.kron(factor_a, factor_g))
        ]
        assert errors[0] <= errors[1]


def unfolded(x, size=3):
    """The patches of images, `[n, positions, size * size * channels]`."""
    n, height, width, _ = x.shape
    found = [
        x[:, i : i + size, j : j + size].reshape(n, -1)
        for i in range(height - size + 1)
        for j in range(width - size + 1)
    ]
    return np.stack(found, axis=1)


def test_a_new_basis_begins_them_anew():
    """With the eigenvalues of the Kronecker factors, in which the step is taken, too."""
    x, y = regression(BATCH)
    optimizer = keras_ngd.EKFAC(scale="examples", **{**PLAIN, "learning_rate": 1e-30})
    model = captured(mlp(), optimizer)
    fit(model, x, y)
    [group] = optimizer.layout.groups
    for number, block in enumerate(group.blocks):
        qa, qg = (array(v)[number, 0] for v in group.curvature.variables[:2])
        a, g, second = (array(v)[0] for v in block.statistics.averages)
        values = np.outer(*(np.diag(q.T @ f[0] @ q) for q, f in ((qa, a), (qg, g))))
        close(second.reshape(5, 4), values, 1e-4)
        np.testing.assert_array_equal(array(block.statistics.controls[1])[0, 0], qg)


def trained(**arguments):
    keras.utils.set_random_seed(0)
    model = mlp()
    optimizer = keras_ngd.EKFAC(factor_interval=1, inverse_interval=1, **arguments.pop("optimizer", {}))
    keras_ngd.capture(model, optimizer)
    compiled(model, optimizer, **arguments)
    fit(model, *regression(BATCH * 6))
    return model


@pytest.mark.parametrize("scale", ["running", "examples"])
def test_steps_do_not_depend_on_the_units_of_the_loss(scale):
    plain = weights(trained(optimizer={"scale": scale}))
    assert_close(weights(trained(optimizer={"scale": scale}, loss_weights=[8.0])), plain)
    assert_close(weights(trained(optimizer={"scale": scale, "loss_scale_factor": 256.0})), plain)


def test_a_sum_takes_the_steps_of_a_mean():
    plain = weights(trained(loss=keras.losses.MeanSquaredError()))
    assert_close(weights(trained(loss=keras.losses.MeanSquaredError(reduction="sum"))), plain, 1e-4)


@pytest.mark.parametrize(
    "arguments",
    [{"damping": 0}, {"damping": 0.1, "damping_mode": "pi"}, {"losses_per_example": 0}, {"scale": "x"}],
    ids=str,
)
def test_arguments_out_of_range_are_named(arguments):
    with pytest.raises(ValueError, match=f"`{[*arguments][-1]}`"):
        keras_ngd.EKFAC(**arguments)


def test_batches_of_unknown_size_are_recorded_as_a_whole():
    """TensorFlow does not know the size of batches that do not divide the data."""
    x, y = (t.astype("float32") for t in data(2))
    model = captured(network(), keras_ngd.EKFAC(scale="examples", **PLAIN))
    fit(model, x[: BATCH + 5], y[: BATCH + 5], epochs=2)
    assert model.optimizer.factor_updates == 4
    assert model.optimizer.skipped_steps == model.optimizer.skipped_statistics == 0
    assert all(np.isfinite(v).all() for v in weights(model).values())
