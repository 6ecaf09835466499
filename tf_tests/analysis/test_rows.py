"""Rows and gradients of a model's layers."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from keras_ngd.analysis.layer_rows import RowProbe, layer_rows
from tf_tests.reference import rows as reference
from tf_tests.small import assert_same, captured, compiled, fit, gradients, mlp, regression, weights


def convolutional():
    """A grouped convolution, normalization and a dense layer, for `[n, 6, 6, 4]`."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            layers.Conv2D(6, 3, groups=2, activation="tanh", name="convolution"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(4, name="outputs"),
        ]
    )


def images(examples=5):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype("float32") for shape in ((examples, 6, 6, 4), (examples, 4))]


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_dense_layers():
    x, y = regression(examples=6)
    model = compiled(mlp(), "sgd")
    hidden, outputs = layer_rows(model, x, y)
    assert [hidden.layer, outputs.layer] == ["hidden", "outputs"]
    h = np.asarray(model.layers[1](x))
    upstream = 2 * (np.asarray(model(x)) - y) / y.size
    close(hidden.a, np.column_stack([x, np.ones(6)]))
    close(outputs.a, np.column_stack([h, np.ones(6)]))
    close(outputs.g, np.sqrt(6) * upstream)
    close(hidden.g, np.sqrt(6) * (upstream @ np.asarray(model.layers[2].kernel).T) * (1 - h**2))
    for rows in (hidden, outputs):
        close(rows.v, rows.a.T @ rows.g / np.sqrt(6))
        outer = np.einsum("ni,no->nio", rows.a, rows.g).reshape(6, -1)
        close(rows.kernel(), outer @ outer.T)
        close(rows.products(), outer @ rows.v.ravel())


def test_groups_and_normalization():
    x, y = images()
    model = convolutional()
    *groups, outputs = layer_rows(model, x, y, loss="mse")
    convolution = model.layers[0]
    assert [rows.layer for rows in groups] == [f"{convolution.path}:0", f"{convolution.path}:1"]
    a = reference.layer_rows(convolution, x).mean(axis=2)
    v = gradients(model, x, y)
    kernel, bias = (v[variable.path] for variable in (convolution.kernel, convolution.bias))
    for rows, of_group, matrix in zip(groups, a, reference.weight_matrix(kernel, bias, 2), strict=True):
        close(rows.a, of_group)
        close(rows.v, matrix)
        # The ones of `a`: a bias sees the gradients alone.
        close(rows.v[-1], rows.g.sum(axis=0) / np.sqrt(5))
    close(outputs.v[:-1], v[model.layers[-1].kernel.path])


def test_calls_of_one_layer():
    x, y = regression(examples=6)
    inputs = keras.Input((4,))
    shared = layers.Dense(4, use_bias=False)
    [rows] = layer_rows(compiled(keras.Model(inputs, shared(shared(inputs))), "sgd"), x, y)
    kernel = np.asarray(shared.kernel)
    second = 2 * (x @ kernel @ kernel - y) / y.size
    close(rows.a, (x + x @ kernel) / 2)
    close(rows.g, np.sqrt(6) * (second + second @ kernel.T))


def test_models_stay_as_they_are():
    x, y = images(8)
    model = compiled(convolutional(), "sgd")
    before = weights(model)
    layer_rows(model, x, y)
    assert_same(weights(model), before)
    assert not hasattr(model.layers[0], "statistics")


def test_captured_models_give_the_same():
    x, y = regression(examples=8)
    model = captured(mlp())
    fit(model, x, y)
    plain = mlp()
    plain.set_weights(list(weights(model).values()))
    before = weights(model)
    for found, expected in zip(layer_rows(model, x, y), layer_rows(plain, x, y, loss="mse"), strict=True):
        for name in ("a", "g", "v"):
            close(getattr(found, name), getattr(expected, name))
    assert_same(weights(model), before)
    assert type(model.layers[1].statistics).__name__ == "KroneckerStatistics"


def test_a_probe_follows_training_and_batch_sizes():
    x, y = regression(examples=16)
    model = compiled(mlp(), keras.optimizers.SGD(0.5))
    probe = RowProbe(model)
    for count in (8, 4, 16):
        fit(model, x, y)
        for found, fresh in zip(probe(x[:count], y[:count]), layer_rows(model, x[:count], y[:count]), strict=True):
            assert len(found.a) == count
            for name in ("a", "g", "v"):
                close(getattr(found, name), getattr(fresh, name))


def test_weights_of_several_losses():
    x, y = regression(examples=6)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [layers.Dense(4, name="first")(inputs), layers.Dense(4, name="second")(inputs)])
    model.compile("sgd", loss=["mse", "mse"], loss_weights=[1.0, 0.5])
    weighted = layer_rows(model, x, [y, y])
    plain = layer_rows(model, x, [y, y], loss=["mse", "mse"])
    for found, expected, weight in zip(weighted, plain, (1, 0.5), strict=True):
        close(found.g, weight * expected.g)
        close(found.v, weight * expected.v)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_layers_apart_from_the_loss_are_left_out():
    x, y = regression(examples=6)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [layers.Dense(4, name="used")(inputs), layers.Dense(4, name="unused")(inputs)])
    [rows] = layer_rows(model, x, [y, y], loss=["mse", None])
    assert rows.layer == "used"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": keras_ngd}, TypeError, "`model` must be a keras.Model"),
        ({"model": keras.Sequential([layers.Dense(4)])}, ValueError, "is not built"),
        ({"loss": None}, ValueError, "not compiled with a loss"),
        ({"x": None}, ValueError, "`x` must be one batch"),
        ({"y": None}, ValueError, "`y` must be one batch"),
        ({"x": np.zeros((0, 4), "float32")}, ValueError, "`x` must be one batch"),
        ({"x": np.float32(1)}, ValueError, "`x` must be one batch"),
        ({"y": np.zeros((5, 4), "float32")}, ValueError, "`x` has 6 examples and `y` has 5"),
        (
            {"x": np.full((6, 4), np.nan, "float32")},
            ValueError,
            "'hidden' sees inputs or gradients that are not finite",
        ),
        ({"losses_per_example": 0}, ValueError, "`losses_per_example`"),
    ],
)
def test_bad_arguments(arguments, error, message):
    x, y = regression(examples=6)
    with pytest.raises(error, match=message):
        layer_rows(**{"model": mlp(), "x": x, "y": y, "loss": "mse", **arguments})
