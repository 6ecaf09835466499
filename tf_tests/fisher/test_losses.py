"""Losses whose likelihoods are known: what weights learn from where labels are drawn, and what is refused."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ngd
from tf_tests import small
from tf_tests.fisher import forms
from tf_tests.fisher.stepping import BATCH, DRAWN, Step, assert_equal_gradients, part

pytestmark = pytest.mark.neutral


def sampled(**arguments):
    return keras_ngd.KFAC(**{"fisher": "sampled", "factor_interval": 1, "inverse_interval": 1, **arguments})


QUICK = (
    "sparse logits",
    "activation layer",
    "mean of weights",
    "binary sigmoid",
    "weights of positions",
    "mask",
    "two outputs",
)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in forms.FORMS])
def test_gradients_are_those_of_the_mean_over_the_others(name):
    form = forms.FORMS[name]
    captured = Step(form.make, sampled(**form.optimizer), loss=form.loss, **form.compiling)
    plain = Step(form.make, loss=form.loss, **form.compiling)
    x, y, weights, others = form.inputs(), form.y, form.weights, slice(DRAWN, None)
    found = captured(x, y, weights, draw=0)
    assert_equal_gradients(found, plain(part(x, others), part(y, others), part(weights, others)))
    assert_equal_gradients(captured(x, y, weights), plain(x, y, weights), 2e-6)


@pytest.mark.skipif(small.JIT, reason="JAX's steps are compiled wherever they are tested")
@pytest.mark.parametrize("name", ["sparse logits", pytest.param("two outputs", marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_others_under_xla(name):
    form, others = forms.FORMS[name], slice(DRAWN, None)
    captured = Step(form.make, sampled(**form.optimizer), loss=form.loss, **{**form.compiling, "jit_compile": True})
    plain = Step(form.make, loss=form.loss, **form.compiling)
    x, y, weights = form.inputs(), form.y, form.weights
    found = captured(x, y, weights, draw=0)
    assert_equal_gradients(found, plain(part(x, others), part(y, others), part(weights, others)))
    assert_equal_gradients(captured(x, y, weights), plain(x, y, weights), 2e-6)


def test_added_losses_and_regularizers_are_not_rescaled():
    def model():
        x = keras.Input((4,))
        h = layers.Dense(5, "tanh", kernel_regularizer=keras.regularizers.L2(0.3))(x)
        return keras.Model(x, layers.Dense(3, bias_regularizer="l2")(h))

    x, y = forms.INPUTS, forms.NUMBERS
    found = Step(model, sampled(), loss="mse")(x, y, draw=0)
    assert_equal_gradients(found, Step(model, loss="mse")(x[DRAWN:], y[DRAWN:]))


def refused(model, loss, x, y, message, **arguments):
    keras_ngd.capture(model, optimizer := sampled(**arguments))
    small.compiled(model, optimizer, loss=loss)
    with pytest.raises(ValueError, match=message):
        model.train_on_batch(x, y)


class Whole(keras.losses.Loss):
    """A loss with a `__call__` of its own."""

    def __call__(self, y_true, y_pred, sample_weight=None):
        return ops.mean(ops.square(y_true - y_pred))


UNKNOWN = {
    "poisson": "poisson",
    "huber": keras.losses.Huber(),
    "hinge": "hinge",
    "own": forms.squares,
    "whole": Whole(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_loss_whose_likelihood_is_not_known_is_refused(name):
    message = "it is not known from which distribution the loss .* takes them to be.*`likelihood`.*fisher='empirical'"
    refused(forms.network()(), UNKNOWN[name], forms.INPUTS, forms.NUMBERS, message)


def test_predictions_without_an_axis_are_refused():
    x = keras.Input((4,))
    model = keras.Model(x, ops.squeeze(layers.Dense(1)(x), -1))
    refused(model, "mse", forms.INPUTS, forms.NUMBERS[:, 0], "with an axis behind that of the examples")


def test_a_layer_that_sees_other_examples_is_refused():
    """A table of positions, which all examples share."""

    @keras.saving.register_keras_serializable("tests")
    class Positions(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.table = layers.Embedding(forms.TIME, 4, name="positions")

        def build(self, shape):
            self.table.build(None)

        def call(self, x):
            return x + self.table(ops.arange(forms.TIME))

    x = keras.Input((forms.TIME, 4))
    model = keras.Model(x, layers.Dense(2)(Positions()(x)))
    message = r"another number of examples than the loss is of \(3 and .*every captured layer is to see the same.*skip="
    refused(model, "mse", forms.SEQUENCES, forms.NUMBERS_OF_EACH, message)


def test_a_step_without_the_compiled_loss_is_refused():
    model = forms.network()()
    keras_ngd.capture(model, optimizer := sampled())
    small.compiled(model, optimizer)
    gradients = list(small.gradients(model, forms.INPUTS, forms.NUMBERS).values())
    with pytest.raises(ValueError, match="has not used that after it called the model.*`model.compute_loss`"):
        optimizer.apply([ops.convert_to_tensor(g) for g in gradients], model.trainable_variables)


ARGUMENTS = [
    ({"fisher": "true"}, "`fisher` must be one of .*'empirical', 'sampled'.*fisher='true'"),
    ({"fisher": "sampled", "statistics_fraction": 1.0}, "`statistics_fraction` must be below 1 with fisher='sampled'"),
    ({"fisher": "sampled", "statistics_fraction": 0}, r"`statistics_fraction` must be in \(0, 1\]"),
    ({"fisher": "sampled", "fisher_scale": "loss"}, "With fisher='sampled' it is that: leave `fisher_scale` out"),
    (
        {"fisher": "sampled", "likelihood": "softmax"},
        "`likelihood` must be one of .*'categorical'.*likelihood='softmax'",
    ),
    ({"likelihood": "gaussian"}, "`likelihood` says what labels are drawn from.*fisher='empirical'"),
    ({"fisher": "sampled", "seed": -1}, r"`seed` must be an int in \[0, 2\*\*12\)"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_ngd.KFAC(**arguments)


def test_the_number_of_losses_is_not_to_be_given():
    with pytest.raises(ValueError, match="`losses_per_example` is to be left at 'auto' with fisher='sampled'"):
        keras_ngd.capture(forms.network()(), sampled(losses_per_example=3))


def test_a_model_that_was_captured_for_the_other_kind_is_refused():
    model = forms.network()()
    keras_ngd.capture(model, keras_ngd.KFAC())
    small.compiled(model, sampled())
    with pytest.raises(ValueError, match="was captured for another optimizer"):
        small.fit(model, forms.INPUTS, forms.NUMBERS)


def test_configs():
    optimizer = sampled(
        likelihood={"a": keras_ngd.fisher.Categorical(from_logits=True), "b": "gaussian"},
        statistics_fraction=0.5,
        seed=3,
    )
    again = keras_ngd.KFAC.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    assert repr(again.likelihood) == repr(optimizer.likelihood)
    assert "Categorical(from_logits=True, axis=-1)" in repr(again.likelihood)
    assert (again.fisher, again.statistics_fraction, again.seed, again.fisher_scale) == ("sampled", 0.5, 3, None)
    assert keras_ngd.KFAC().fisher_scale == "loss"
    assert "fisher" not in keras_ngd.KFAC().get_config()
    assert sampled().statistics_fraction == 0.25


def test_batches_of_one_are_counted():
    keras.utils.set_random_seed(0)
    model = forms.network()()
    keras_ngd.capture(model, optimizer := sampled())
    small.compiled(model, optimizer)
    with pytest.warns(UserWarning, match="in 1 of 3 updates of the statistics the batch was a single example"):
        model.fit(forms.INPUTS[:9], forms.NUMBERS[:9], batch_size=4, verbose=0)
    assert (optimizer.factor_updates, optimizer.unsampled_updates) == (3, 1)
    assert optimizer.skipped_steps == 0
    assert np.isfinite(model.evaluate(forms.INPUTS, forms.NUMBERS, verbose=0))
    assert BATCH > 9
