"""The loss's own scale: reductions, weights and masks that Keras's compiled loss has are read from it.

Where these tests fail after an upgrade of Keras, names have changed that `keras_ngd/optimizers/compiled_loss.py` knows.
"""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ngd
from keras_ngd.optimizers import compiled_loss
from keras_ngd.optimizers.settings import PAPER_SETTINGS
from tf_tests import small

pytestmark = pytest.mark.neutral

BATCH, TIME = 8, 3

# The methods as their papers have them, in the loss's own units, everything at every step; clipping would hide the scale.
PAPER = {**PAPER_SETTINGS, "kl_clip": None}
METHODS = {
    "KFAC": lambda **a: keras_ngd.KFAC(**{"damping": 0.01, "factor_interval": 1, "inverse_interval": 1, **PAPER, **a}),
    "THOR": lambda **a: keras_ngd.THOR(
        **{"damping": 0.01, "factor_interval": 1, "inverse_interval": 1, "split": 2, "omega": (0.0, 0.0), **PAPER, **a}
    ),
    "SKFAC": lambda **a: keras_ngd.SKFAC(**{"damping": 0.03, "interval": 1, "batch_size": BATCH, **PAPER, **a}),
    "SNGD": lambda **a: keras_ngd.SNGD(**{"damping": 0.1, "interval": 1, "batch_size": BATCH, **PAPER, **a}),
    "HyLo": lambda **a: keras_ngd.HyLo(
        **{"damping": 0.1, "interval": 1, "batch_size": BATCH, "rank": 4, "mode": "kis", **PAPER, **a}
    ),
}


# What enters the total of each loss value


class Passing(keras.losses.Loss):
    """A loss whose values are the predictions, so that the compiled loss is linear in them."""

    def call(self, y_true, y_pred):
        return y_pred


def compiled(loss, weights=None, names=("out",)):
    from keras.src.trainers.compile_utils import CompileLoss

    return CompileLoss(loss, weights, output_names=list(names))


def masked(values, mask):
    from keras.src.backend import set_keras_mask

    tensor = ops.convert_to_tensor(values)
    if mask is not None:
        set_keras_mask(tensor, ops.convert_to_tensor(mask))
    return tensor


def told(loss, y_pred, sample_weight):
    heard = compiled_loss.Heard()
    compiled_loss.listen(loss, heard)
    loss(ops.zeros_like(y_pred), y_pred, sample_weight)
    return [float(t) for t in heard.take()]


RNG = np.random.default_rng(0)
WEIGHTS = {
    "no weights": None,
    "one each": RNG.uniform(0.1, 2.0, BATCH).astype("float32"),
    "one each, one axis more": RNG.uniform(0.1, 2.0, (BATCH, 1)).astype("float32"),
    "one per value": RNG.uniform(0.1, 2.0, (BATCH, TIME)).astype("float32"),
    "zeros": np.zeros((BATCH, 1), "float32"),
}
MASKS = {"no mask": None, "a mask": RNG.uniform(size=(BATCH, TIME)) < 0.6}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean", "mean_with_sample_weight", "sum", None])
@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, TIME)])
def test_coefficients_are_the_derivatives_of_the_compiled_loss(shape, reduction, weights, mask):
    weight, hidden = WEIGHTS[weights], MASKS[mask]
    if len(shape) == 1:
        weight = weight[:, 0] if weight is not None and weight.ndim == 2 else weight
        hidden = hidden[:, 0] if hidden is not None else None
    elif weight is not None and weight.ndim == 1 and (reduction is None or hidden is not None or TIME != BATCH):
        weight = weight[:, None]  # Keras multiplies shapes as they are
    loss = compiled(Passing(reduction=reduction))
    derivatives = []
    for i in range(np.prod(shape)):
        unit = np.zeros(shape, "float32").reshape(-1)
        unit[i] = 1.0
        derivatives.append(
            np.sum(ops.convert_to_numpy(loss(np.zeros(shape, "float32"), masked(unit.reshape(shape), hidden), weight)))
        )
    absolute, squares, whole = told(loss, masked(np.zeros(shape, "float32"), hidden), weight)
    np.testing.assert_allclose([absolute, squares], [np.sum(derivatives), np.sum(np.square(derivatives))], rtol=1e-5)
    assert whole == 0


def test_losses_of_several_outputs_are_told_together():
    """With their weights; a function that returns one number for the batch counts as a mean over the examples."""
    loss = compiled({"a": "mse", "b": lambda y, p: ops.mean(ops.square(y - p))}, {"a": 2.0, "b": 0.5}, ("a", "b"))
    y = {"a": np.zeros((BATCH, TIME, 2), "float32"), "b": np.zeros((BATCH, 1), "float32")}
    heard = compiled_loss.Heard()
    compiled_loss.listen(loss, heard)
    loss(y, {k: ops.convert_to_tensor(v) for k, v in y.items()})
    absolute, squares, whole = (float(t) for t in heard.take())
    np.testing.assert_allclose([absolute, squares, whole], [2.5, 4.0 / (BATCH * TIME), 0.25], rtol=1e-6)
    assert heard.take() is None


# Training


def sequences(inputs=4, outputs=2):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2 * BATCH, TIME, inputs)).astype("float32")
    return x, np.tanh(x @ rng.normal(size=(inputs, outputs))).astype("float32")


def network(seed=0):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((TIME, 4))
    hidden = layers.Dense(3, activation="tanh", name="hidden")(inputs)
    return keras.Model(inputs, layers.Dense(2, name="outputs")(hidden))


def trained(method, loss="mse", sample_weight=None, epochs=2, loss_weights=None, **arguments):
    arguments = {"damping": 0.1, **arguments}
    model = small.captured(network(), METHODS[method](**arguments), loss=loss, loss_weights=loss_weights)
    small.fit(model, *sequences(), epochs=epochs, sample_weight=sample_weight)
    assert model.optimizer.factor_updates == 2 * epochs
    return model


@functools.cache
def of_a_mean(method):
    """The ratio and the weights after training with a mean over positions, which several tests compare with."""
    model = trained(method)
    return model.optimizer.loss_ratio, small.weights(model)


# THOR takes KFAC's factors, and longest to compile.
@pytest.mark.parametrize("method", [m if m != "THOR" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_a_loss_averaged_over_positions_needs_no_number(method):
    (ratio, inferred), given = of_a_mean(method), trained(method, losses_per_example=TIME)
    assert ratio == pytest.approx(TIME)
    assert given.optimizer.loss_ratio == 1
    small.assert_close(inferred, small.weights(given), tolerance=1e-6)


SCALED = {
    BATCH * TIME: {"loss": keras.losses.MeanSquaredError(reduction="sum")},
    1000.0: {"sample_weight": np.full((2 * BATCH, 1), 1000.0, "float32")},
    0.001: {"sample_weight": np.full((2 * BATCH, 1), 0.001, "float32")},
    100.0: {"loss_weights": [100.0]},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_scaled_loss_takes_the_same_steps_with_the_damping_scaled_alike(method):
    """What it is scaled by: a sum in place of a mean, weights of examples, a weight of the loss."""
    for scale, arguments in SCALED.items():
        model = trained(method, damping=0.1 * scale, **arguments)
        assert model.optimizer.loss_ratio == pytest.approx(TIME / scale, rel=1e-5)
        small.assert_close(small.weights(model), of_a_mean(method)[1], tolerance=2e-4)


@pytest.mark.parametrize("method", ["KFAC", pytest.param("THOR", marks=pytest.mark.slow)])
def test_a_scaled_loss_takes_the_same_steps_at_defaults(method):
    """Where the Fisher matrix is relative to the loss, and the damping to the factors."""
    plain, *others = [
        trained(method, fisher_scale="loss", loss_clip=1.0, damping=None, **arguments)
        for arguments in ({}, SCALED[BATCH * TIME], SCALED[1000.0])
    ]
    for model in others:
        small.assert_close(small.weights(model), small.weights(plain), tolerance=2e-4)


def test_a_sum_takes_the_steps_of_the_mean_with_the_damping_scaled_alike():
    model = trained("KFAC", damping=0.1 * BATCH * TIME, loss=keras.losses.MeanSquaredError(reduction="sum"))
    assert model.optimizer.loss_ratio == pytest.approx(1 / BATCH)
    small.assert_close(small.weights(model), of_a_mean("KFAC")[1], tolerance=1e-4)


def ratio(coefficients):
    """Of a batch, from the coefficients of its loss values."""
    return np.sum(coefficients) / (BATCH * np.sum(np.square(coefficients)))


def test_masks_and_weights_of_words():
    """A mask that an embedding makes; padding counts neither in the loss nor in how many values there are."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(2)
    x = rng.integers(1, 5, (BATCH, TIME))
    x[::2, 1:] = 0
    y, weight = rng.integers(0, 2, (BATCH, TIME)), rng.uniform(0.5, 2.0, (BATCH, TIME)).astype("float32")
    inputs = keras.Input((TIME,), dtype="int32")
    hidden = layers.Dense(3, activation="tanh")(layers.Embedding(5, 4, mask_zero=True)(inputs))
    model = keras.Model(inputs, layers.Dense(2, activation="softmax")(hidden))
    report = keras_ngd.capture(model, optimizer := small.kfac())
    assert report.losses_per_example is None
    assert "losses per example: ? (to be read from the compiled loss)" in str(report)
    small.compiled(model, optimizer, loss="sparse_categorical_crossentropy")
    # What an evaluation's losses are like is no matter.
    model.evaluate(x[:2], y[:2], verbose=0)
    small.fit(model, x, y, sample_weight=weight)
    visible = (x > 0) * weight
    # A common factor: the loss is divided by how many are visible.
    assert optimizer.loss_ratio == pytest.approx(ratio(visible / np.sum(x > 0)), rel=1e-5)
    assert f"losses per example: {report.losses_per_example:.6g} (from the compiled loss)" in str(report)


@pytest.mark.parametrize("method", ["KFAC", "SNGD"])
def test_weights_of_classes(method):
    """Averaged as the statistics are: KFAC's over batches, SNGD's not at all."""
    keras.utils.set_random_seed(0)
    x, _ = small.regression(2 * BATCH)
    y = np.array([0] * (BATCH - 1) + [1] + [1] * (BATCH - 2) + [0] * 2)
    model = small.captured(
        small.mlp(), METHODS[method](), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    small.fit(model, x, y, class_weight={0: 1.0, 1: 20.0})
    batches = [np.where(part == 1, 20.0, 1.0) / BATCH for part in (y[:BATCH], y[BATCH:])]
    sums = np.array([[np.sum(c), BATCH * np.sum(np.square(c))] for c in batches])
    if method == "KFAC":
        decay = model.optimizer.factor_decay
        sums = (decay * sums[0] + sums[1]) / (1 + decay)
    else:
        sums = sums[1]
    assert model.optimizer.loss_ratio == pytest.approx(sums[0] / sums[1], rel=1e-5)


def test_a_model_inside_of_the_one_that_is_trained():
    inner = network()
    optimizer = small.kfac()
    keras_ngd.capture(inner, optimizer)
    inputs = keras.Input((TIME, 4))
    outer = small.compiled(keras.Model(inputs, inner(inputs)), optimizer)
    small.fit(outer, *sequences())
    assert optimizer.loss_ratio == pytest.approx(TIME)


def test_a_loop_of_ones_own_counts_as_a_mean_over_the_examples():
    model = network()
    report = keras_ngd.capture(model, optimizer := small.kfac())
    small.compiled(model, optimizer)
    x, y = sequences()
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(model(x, training=True) - y))
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    else:
        optimizer.build(model.trainable_variables)
        gradients = list(small.gradients(model, x, y).values())
        gradients = [ops.convert_to_tensor(g) for g in gradients]
    optimizer.apply(gradients, model.trainable_variables)
    assert optimizer.loss_ratio == 1
    assert "losses per example: 1 (there is no compiled loss)" in str(report)


@pytest.mark.parametrize("method", METHODS)
def test_the_argument(method):
    assert METHODS[method]().losses_per_example == "auto"
    config = METHODS[method](losses_per_example=3).get_config()
    assert type(METHODS[method]()).from_config(config).losses_per_example == 3
    with pytest.raises(ValueError, match="`losses_per_example` must be a number above 0, or 'auto'.*'most'"):
        METHODS[method](losses_per_example="most")
