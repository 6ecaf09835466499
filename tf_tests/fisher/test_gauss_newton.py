"""Statistics of drawn labels are, in the mean over draws, the Gauss-Newton matrix of the loss: compared with one in float64."""

import keras
import numpy as np
import pytest

import keras_ngd
from tf_tests import small
from tf_tests.fisher import forms
from tf_tests.fisher.stepping import BATCH, DRAWN, Step, all_statistics

pytestmark = pytest.mark.neutral

DRAWS = 400


def sampled(**arguments):
    return keras_ngd.KFAC(**{"fisher": "sampled", "factor_interval": 1, "inverse_interval": 1, **arguments})


# The Hessian of one loss value with respect to the pre-activation `z` of the output layer, `[..., d, d]`.


def categorical(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    return np.einsum("...i,ij->...ij", p, np.eye(p.shape[-1])) - np.einsum("...i,...j->...ij", p, p)


def diagonal(values):
    return np.einsum("...i,ij->...ij", values, np.eye(values.shape[-1]))


def bernoulli(z):
    p = 1 / (1 + np.exp(-z))
    return diagonal(p * (1 - p) / z.shape[-1])


def squares(z):
    return diagonal(np.full(z.shape, 2 / z.shape[-1]))


def squares_of_tanh(z):
    return diagonal(2 / z.shape[-1] * (1 - np.tanh(z) ** 2) ** 2)


def half_squares(z):
    return diagonal(np.ones(z.shape))


# The coefficients with which loss values enter the loss.


def each(form):
    size = np.shape(form.y)[:2] if np.ndim(form.inputs()) == 3 else (BATCH,)
    return np.full(size, 1 / np.prod(size))


def visible(form):
    return (form.x > 0) / np.sum(form.x > 0)


def not_ignored(form):
    return (form.y != 1) / np.sum(form.y != 1)


EXPECTED = {
    "sparse logits": (categorical, each),
    "sparse softmax": (categorical, each),
    "activation layer": (categorical, each),
    "one hot logits": (categorical, each),
    "weights of examples": (categorical, lambda form: form.weights / BATCH),
    "mean of weights": (categorical, lambda form: form.weights / form.weights.sum()),
    "binary logits": (bernoulli, each),
    "binary sigmoid": (bernoulli, each),
    "squares": (squares, each),
    "squares of an activation": (squares_of_tanh, each),
    "squares at positions": (squares, each),
    "weights of positions": (squares, lambda form: form.weights / form.weights.size),
    "mask": (categorical, visible),
    "ignored class": (categorical, not_ignored),
    "weight of the loss": (squares, lambda form: 5 * each(form)),
    "subclassed": (categorical, each),
    "loss of one's own": (half_squares, each),
}
QUICK = ("sparse softmax", "weights of examples", "binary sigmoid", "weights of positions", "mask")


def parameters(step):
    """Those of the model before its step, in float64, by the ends of their paths."""
    for variable, value in zip(step.model.weights, step.start, strict=True):
        variable.assign(value)
    return {"/".join(path.split("/")[-2:]): v.astype("float64") for path, v in small.weights(step.model).items()}


def backwards(own, x, hessian):
    """The inputs of both dense layers, and the Gauss-Newton matrices of one loss value for both pre-activations."""
    hidden = np.tanh(x @ own["hidden/kernel"] + own["hidden/bias"])
    of_outputs = hessian(hidden @ own["outputs/kernel"] + own["outputs/bias"])
    jacobian = own["outputs/kernel"].T * (1 - hidden**2)[..., None, :]
    return (x, hidden), (np.einsum("...oi,...op,...pj->...ij", jacobian, of_outputs, jacobian), of_outputs)


def assert_mean(draws, expected, z_score=5.0):
    """Asserts that the mean of draws is what is expected, up to so many of its own standard deviations."""
    draws = np.asarray(draws, "float64")
    deviation = draws.std(axis=0) / np.sqrt(len(draws))
    # Where all draws are the same, rounding is what is left.
    floor = 1e-6 * np.max(np.abs(expected))
    assert np.max(np.abs(draws.mean(axis=0) - expected) / np.maximum(deviation, floor)) < z_score
    # Not so wide that anything would do.
    assert np.linalg.norm(deviation) < 0.2 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EXPECTED])
def test_the_mean_of_draws_is_the_gauss_newton_matrix(name):
    form, (hessian, coefficients) = forms.FORMS[name], EXPECTED[name]
    step = Step(form.make, sampled(**form.optimizer), loss=form.loss, **form.compiling)
    found, statistics = [], [s for s in all_statistics(step.model) if s.owner().name != "embedding"]
    for number in range(DRAWS):
        step(form.inputs(), form.y, form.weights, draw=number)
        found.append([small.array(s.output_factor)[0] for s in statistics])
    own, x, c = parameters(step), form.inputs()[:DRAWN], coefficients(form)[:DRAWN]
    x = own["embedding/embeddings"][x] if x.dtype.kind == "i" else x.astype("float64")
    _, matrices = backwards(own, x, hessian)
    for draws, matrix in zip(zip(*found, strict=True), matrices, strict=True):
        weighted = (c[..., None, None] * matrix).reshape(-1, *matrix.shape[-2:])
        # Of a loss over the whole batch.
        assert_mean(draws, np.sum(weighted, axis=0) * BATCH / DRAWN)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mean_of_products_is_the_gauss_newton_matrix_of_the_loss(seed):
    """Of one example whose label is drawn, where the matrix of each layer, kernel and bias, is a product."""
    form = forms.FORMS["sparse logits"]
    step = Step(form.make, sampled(statistics_fraction=1 / BATCH), loss=form.loss)
    x, y = np.roll(form.inputs(), seed, axis=0), np.roll(form.y, seed)
    found, statistics = [], all_statistics(step.model)
    for number in range(DRAWS):
        step(x, y, draw=number, seed=seed)
        found.append([np.kron(small.array(s.input_factor)[0], small.array(s.output_factor)[0]) for s in statistics])
    inputs, matrices = backwards(parameters(step), x[0].astype("float64"), categorical)
    for draws, a, matrix in zip(zip(*found, strict=True), inputs, matrices, strict=True):
        assert_mean(draws, np.kron(np.outer(np.append(a, 1), np.append(a, 1)), matrix))


def trained(size, method, **arguments):
    keras.utils.set_random_seed(0)
    model = forms.network()()
    keras_ngd.capture(model, optimizer := method(fisher="sampled", **arguments))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    small.compiled(model, optimizer, loss, loss_weights=[size])
    small.fit(model, forms.INPUTS, forms.CLASS, batch_size=8, epochs=2)
    assert optimizer.loss_ratio == 1
    assert optimizer.factor_updates == 4
    return small.weights(model)


METHODS = {
    "KFAC": (keras_ngd.KFAC, {"factor_interval": 1, "inverse_interval": 1}),
    "THOR": (keras_ngd.THOR, {"factor_interval": 1, "inverse_interval": 1, "split": 2, "omega": (0.0, 0.0)}),
    "SKFAC": (keras_ngd.SKFAC, {"interval": 1, "batch_size": 8}),
    "SNGD": (keras_ngd.SNGD, {"interval": 1, "batch_size": 8}),
    "HyLo": (keras_ngd.HyLo, {"interval": 1, "batch_size": 8, "mode": "kid", "rank": 2}),
    "EKFAC": (keras_ngd.EKFAC, {"factor_interval": 1, "inverse_interval": 1, "scale": "examples"}),
}


@pytest.mark.parametrize("name", [m if m == "KFAC" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_a_scaled_loss_takes_the_same_steps_with_the_damping_scaled_alike(name):
    method, arguments = METHODS[name]
    # A power of four, of which roots are exact: what rounding changes of a factor may turn its basis.
    plain, scaled = (trained(s, method, damping=0.05 * s, **arguments) for s in (1.0, 4.0))
    small.assert_close(scaled, plain, tolerance=2e-4)
