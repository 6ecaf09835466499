"""The Kronecker block against the exact Fisher block, where theory says that they are equal.

The exact blocks come from per-example gradients computed in float64, by NumPy.
"""

import keras
import numpy as np
import pytest

import keras_ngd
from tf_tests import paper
from tf_tests.reference import fisher, kronecker
from tf_tests.reference import rows as reference
from tf_tests.reference.running import close, drawn, error

# TensorFlow takes much longer to compile such a step than to run it once.
ON_JAX = keras.backend.backend() == "jax"


@pytest.fixture(autouse=True)
def double_precision(float64):
    """All comparisons in this module are exact but for rounding."""


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def dense(units, **arguments):
    return keras.layers.Dense(units, kernel_initializer=drawn, bias_initializer=drawn, **arguments)


def convolution(filters, size, **arguments):
    return keras.layers.Conv2D(filters, size, kernel_initializer=drawn, bias_initializer=drawn, **arguments)


def linear_loss(coefficients, outputs):
    """`<c, s>` per example, whose gradient is `c`, whatever the network computes."""
    product = coefficients * outputs
    return keras.ops.sum(keras.ops.reshape(product, (keras.ops.shape(product)[0], -1)), axis=1)


def blocks_after_a_step(model, x, y, loss, sharing="expand"):
    """`A (x) G` of every captured layer, from the factors that one training step leaves."""
    keras_ngd.capture(model, paper.KFAC(weight_sharing=sharing))
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=loss, jit_compile=ON_JAX)
    model.train_on_batch(x, y)
    captured = [layer for layer in model.layers if isinstance(layer, keras_ngd.layers.captured.Captured)]
    factors = [[np.asarray(v)[0] for v in layer.statistics.averages] for layer in captured]
    return [np.kron(a, g) for a, g in factors]


def squares(s):
    """An activation; Keras computes its own in float32 on JAX."""
    return s * s


def squares_network(x, y, *layers):
    """Inputs' rows and gradients' rows of each dense layer of a network of squares under mean squared error."""
    inputs, sums, outputs = [], [], [x]
    for layer in layers:
        inputs.append(reference.append_ones(reference.dense_rows(outputs[-1])))
        sums.append((inputs[-1] @ reference.layer_matrix(layer)[:, None])[0, :, 0])
        outputs.append(sums[-1] ** 2)
    gradients, upstream = [], 2 * (outputs[-1] - y) / outputs[-1].size
    for layer, s in zip(layers[::-1], sums[::-1], strict=True):
        ds = upstream * 2 * s
        gradients.insert(0, reference.dense_rows(ds))
        upstream = ds @ np.asarray(layer.kernel).T
    return list(zip(inputs, gradients, strict=True))


def test_one_example():
    """The gradient of one example is an outer product, so its Fisher block is a Kronecker product."""
    layers = [dense(4, activation=squares), dense(3, activation=squares), dense(2, activation=squares)]
    model = keras.Sequential([keras.Input((5,)), *layers])
    x, y = draw(1, 5), draw(1, 2)
    expected = [fisher.fisher_blocks(a, ghat, 1)[0] for a, ghat in squares_network(x, y, *layers)]
    for block, exact in zip(blocks_after_a_step(model, x, y, "mse"), expected, strict=True):
        close(block, exact, 1e-10)


def test_several_examples_differ():
    """The guard of this module: what is compared here is an approximation, and the comparisons would show it."""
    layers = [dense(4, activation=squares), dense(3, activation=squares)]
    model = keras.Sequential([keras.Input((5,)), *layers])
    x, y = draw(8, 5), draw(8, 3)
    expected = [fisher.fisher_blocks(a, ghat, 8)[0] for a, ghat in squares_network(x, y, *layers)]
    for block, exact in zip(blocks_after_a_step(model, x, y, "mse"), expected, strict=True):
        assert error(block, exact) > 0.05


def test_independent_inputs_and_gradients():
    """Every input meets every gradient: `E[a a^T (x) g g^T] = E[a a^T] (x) E[g g^T]`."""
    layer = dense(3)
    model = keras.Sequential([keras.Input((5,)), layer])
    x, gradients = np.repeat(draw(4, 5), 2, axis=0), np.tile(draw(2, 3), (4, 1))
    a, ghat = reference.layer_rows(layer, x), reference.dense_rows(gradients) / 8
    close(blocks_after_a_step(model, x, gradients, linear_loss)[0], fisher.fisher_blocks(a, ghat, 8)[0], 1e-10)


def test_deep_linear_network():
    """With noise of unit covariance about its own outputs, a linear network's gradients do not depend on its inputs.

    The noise takes the values `+-sqrt(d) e_j`, whose covariance is the identity, at every input, so that the batch's
    Fisher matrix is the true one, which is the Gauss-Newton matrix.
    """
    sizes, count = (4, 3, 3, 2), 4
    layers = [dense(units, use_bias=False) for units in sizes[1:]]
    model = keras.Sequential([keras.Input((sizes[0],)), *layers])
    weights = [np.asarray(layer.kernel) for layer in layers]
    x = draw(count, sizes[0])
    noise = np.sqrt(2) * np.concatenate([np.eye(2), -np.eye(2)])
    inputs = np.repeat(x, len(noise), axis=0)
    targets = inputs @ weights[0] @ weights[1] @ weights[2] + np.tile(noise, (count, 1))

    def negative_log_likelihood(targets, outputs):
        return keras.ops.sum(keras.ops.square(targets - outputs), axis=-1) / 2

    blocks = blocks_after_a_step(model, inputs, targets, negative_log_likelihood)
    for block, exact in zip(blocks, fisher.gauss_newton_blocks(weights, x), strict=True):
        close(block, exact, 1e-10)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_convolution_over_one_position(sharing):
    """A kernel as large as the map makes a convolution a dense layer."""
    layer = convolution(3, (2, 3))
    model = keras.Sequential([keras.Input((2, 3, 2)), layer])
    x, gradients = np.repeat(draw(4, 2, 3, 2), 2, axis=0), np.tile(draw(2, 1, 1, 3), (4, 1, 1, 1))
    a, ghat = reference.layer_rows(layer, x), reference.layer_gradient_rows(layer, gradients) / 8
    block = blocks_after_a_step(model, x, gradients, linear_loss, sharing)[0]
    close(block, fisher.fisher_blocks(a, ghat, 8)[0], 1e-10)


def test_expand_with_independent_positions():
    """`expand` is exact where each example's gradient sits at one position, any as often as any other."""
    layer = convolution(2, 2, padding="same")
    model = keras.Sequential([keras.Input((2, 2, 3)), layer])
    images, values = draw(2, 2, 2, 3), draw(2, 2)
    x, gradients = [], []
    for image in images:
        for position in range(4):
            for value in values:
                gradient = np.zeros((2, 2, 2))
                gradient.reshape(4, 2)[position] = value
                x.append(image)
                gradients.append(gradient)
    x, gradients = np.stack(x), np.stack(gradients)
    a, ghat = reference.layer_rows(layer, x), reference.layer_gradient_rows(layer, gradients) / 16
    block = blocks_after_a_step(model, x, gradients, linear_loss)[0]
    close(block, fisher.fisher_blocks(a, ghat, 16)[0], 1e-10)


def test_reduce_with_constant_inputs():
    """`reduce` is exact where an example's positions all see the same, whatever their gradients."""
    layer = convolution(2, 2)
    model = keras.Sequential([keras.Input((3, 3, 2)), layer])
    colours = np.broadcast_to(draw(4, 1, 1, 2), (4, 3, 3, 2))
    x, gradients = np.repeat(colours, 2, axis=0), np.tile(draw(2, 2, 2, 2), (4, 1, 1, 1))
    a, ghat = reference.layer_rows(layer, x), reference.layer_gradient_rows(layer, gradients) / 8
    exact = fisher.fisher_blocks(a, ghat, 8)[0]
    close(blocks_after_a_step(model, x, gradients, linear_loss, "reduce")[0], exact, 1e-10)
    assert error(blocks_after_a_step(model, x, gradients, linear_loss, "expand")[0], exact) > 0.05


def test_expand_is_omega_times_gamma():
    """The same product as Grosse and Martens (2016) write it: `T E[a a^T] (x) E[g g^T]`, expectations over positions."""
    layer = convolution(3, 3, padding="same")
    model = keras.Sequential([keras.Input((3, 4, 2)), layer])
    x, gradients = draw(8, 3, 4, 2), draw(8, 3, 4, 3)
    positions = 12
    a, g = reference.layer_rows(layer, x)[0], reference.layer_gradient_rows(layer, gradients)[0]
    omega = np.einsum("nti,ntj->ij", a, a) / 8
    gamma = np.einsum("nti,ntj->ij", g, g) / (8 * positions)
    close(blocks_after_a_step(model, x, gradients, linear_loss)[0], np.kron(omega, gamma), 1e-10)


def test_preconditioning_with_an_exact_block_is_the_natural_gradient():
    """From the step's own numbers to `(F + damping I)^-1 gradient`, F made of per-example gradients."""
    layer, damping = dense(3), 2.0**-6
    model = keras.Sequential([keras.Input((5,)), layer])
    x, gradients = np.repeat(draw(4, 5), 2, axis=0), np.tile(draw(2, 3), (4, 1))
    a, ghat = reference.layer_rows(layer, x), reference.dense_rows(gradients) / 8
    exact = fisher.fisher_blocks(a, ghat, 8)[0] + damping * np.eye(18)
    gradient = np.einsum("knti,knto->io", a, ghat)
    expected = np.linalg.solve(exact, gradient.reshape(-1)).reshape(gradient.shape)
    before = reference.layer_matrix(layer)[0]
    optimizer = paper.KFAC(1.0, damping, momentum=0.0, inverse="eigen", damping_mode="exact", kl_clip=None)
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, loss=linear_loss, jit_compile=ON_JAX)
    model.train_on_batch(x, gradients)
    close(before - reference.layer_matrix(layer)[0], expected, 1e-10)
    assert error(kronecker.dense_preconditioned(np.eye(6), np.eye(3), gradient, damping), expected) > 0.05
