"""Training with drawn labels: all methods, draws that are reproduced and go on where they were, and what Keras's trainers do."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ngd
from keras_ngd.fisher import cotangents, sampled_rows
from tf_tests import small
from tf_tests.fisher import forms
from tf_tests.fisher.stepping import BATCH, all_statistics

EACH, ROWS = {"factor_interval": 1, "inverse_interval": 1}, {"interval": 1}
METHODS = {
    "KFAC": (keras_ngd.KFAC, EACH),
    "THOR": (keras_ngd.THOR, EACH | {"split": 2}),
    "SKFAC": (keras_ngd.SKFAC, ROWS),
    "SNGD": (keras_ngd.SNGD, ROWS | {"batch_size": 8}),
    "HyLo": (keras_ngd.HyLo, ROWS | {"mode": "random", "rank": 2, "steps_per_epoch": 2}),
    "EKFAC": (keras_ngd.EKFAC, EACH | {"scale": "examples"}),
    "EigenAdam": (keras_ngd.EigenAdam, EACH),
}


def sampled(name="KFAC", **arguments):
    method, own = METHODS[name]
    return method(**{"fisher": "sampled", **own, **arguments})


def model(optimizer, make=None, **compiling):
    keras.utils.set_random_seed(3)
    made = (make or forms.network())()
    keras_ngd.capture(made, optimizer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return small.compiled(made, optimizer, **{"loss": loss, **compiling})


def easy():
    """Classes that can be told apart."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype("float32")
    return x, np.argmax(x[:, :3], axis=1)


@pytest.mark.parametrize(
    "name", [m if m in ("KFAC", "HyLo") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_every_method_trains(name):
    """With partial batches, and what of a batch is recorded."""
    x, y = easy()
    optimizer = sampled(name)
    trained = model(optimizer)
    losses = trained.fit(x[:60], y[:60], batch_size=8, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    assert (optimizer.factor_updates, optimizer.skipped_steps, optimizer.skipped_statistics) == (80, 0, 0)
    assert optimizer.unsampled_updates == 0
    assert optimizer.loss_ratio == 1
    if hasattr(optimizer, "capacity"):
        # Room for a quarter of a batch, or of 128 where TensorFlow does not know its size.
        assert optimizer.capacity == (2 if small.JIT or name == "SNGD" else 32)


def test_draws_count_the_steps_in_which_there_are_some():
    x, y = easy()
    trained = model(sampled(factor_interval=3, interval_growth=None, seed=9))
    trained.fit(x, y, batch_size=8, verbose=0)
    found = [small.array(s.label_draw) for s in all_statistics(trained)]
    # After eight steps three have recorded; the ninth does not.
    np.testing.assert_array_equal(found, [[0, 9, 3]] * len(found))


def test_seeds():
    x, y = easy()

    def weights(**arguments):
        trained = model(sampled(**arguments))
        small.fit(trained, x, y)
        return small.weights(trained)

    first = weights()
    small.assert_same(weights(), first)
    assert small.relative_distance(weights(seed=1), first) > 1e-4


def test_it_goes_on_where_it_was(tmp_path):
    """To the last bit."""
    x, y = easy()
    arguments = {"factor_interval": 2, "inverse_interval": 3, "interval_growth": None}
    whole = model(sampled(**arguments))
    small.fit(whole, x, y, epochs=2)
    half = model(sampled(**arguments))
    small.fit(half, x, y)
    half.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    small.fit(again, x, y)
    small.assert_same(small.weights(again), small.weights(whole))
    small.assert_same(small.statistics(again), small.statistics(whole))
    assert again.optimizer.get_config() == whole.optimizer.get_config()


def test_several_steps_at_once():
    x, y = easy()
    one, several = model(sampled()), model(sampled(), steps_per_execution=4)
    for trained in (one, several):
        small.fit(trained, x, y, epochs=2)
    small.assert_close(small.weights(several), small.weights(one), tolerance=1e-5)


def test_a_static_loss_scale():
    x, y = easy()
    plain, scaled = model(sampled()), model(sampled(loss_scale_factor=64.0), auto_scale_loss=False)
    for trained in (plain, scaled):
        small.fit(trained, x, y, epochs=2)
    small.assert_close(small.weights(scaled), small.weights(plain), tolerance=2e-4)


@pytest.mark.skipif(small.JIT, reason="on JAX that is how it is trained anyway")
def test_compiled_by_xla():
    x, y = easy()
    # XLA draws other numbers; nothing else is different.
    trained = model(sampled(), jit_compile=True)
    losses = trained.fit(x, y, batch_size=8, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.skipif(not small.JIT, reason="it is about what XLA compiles")
def test_no_convolution_is_in_a_conditional():
    """XLA's CPU compiler makes naive loops of those, a hundred times as slow."""
    import jax
    from jax.extend import core

    def network():
        return keras.Sequential(
            [keras.Input((8, 8, 2)), layers.Conv2D(4, 3), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(3)]
        )

    def convolutions(jaxpr, inside=False):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "conv_general_dilated":
                yield inside
            for value in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, core.ClosedJaxpr)):
                inner = getattr(value, "jaxpr", value)
                if isinstance(inner, core.Jaxpr):
                    yield from convolutions(inner, inside or equation.primitive.name == "cond")

    trained = model(sampled(), network)
    x, y = np.zeros((BATCH, 8, 8, 2), "float32"), np.zeros(BATCH, "int32")
    trained._symbolic_build(data_batch=(x, y))
    kinds = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
    state = trained._get_jax_state(**dict.fromkeys(kinds, True))
    found = list(convolutions(jax.make_jaxpr(trained.train_step)(state, (x, y)).jaxpr))
    # Of two layers, and the gradients of both kernels and of one input.
    assert len(found) >= 5
    assert not any(found)


def test_low_precision():
    with small.policy("mixed_bfloat16"):
        x, y = easy()
        trained = model(sampled(), forms.network(activation="softmax"), loss="sparse_categorical_crossentropy")
        losses = trained.fit(x, y, batch_size=8, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < 0.6 * losses[0]
    assert trained.optimizer.skipped_steps == 0


class Own(keras.Model):
    """A model with a training step of its own that computes the compiled loss."""

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            loss = self.optimizer.scale_loss(self.compute_loss(x=x, y=y, y_pred=self(x, training=True)))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        return {"loss": loss}


@pytest.mark.skipif(small.JIT, reason="training steps of TensorFlow's")
@pytest.mark.parametrize("eagerly", [False, True])
def test_a_training_step_of_ones_own(eagerly):
    x, y = easy()

    def own():
        made = forms.network()()
        return Own(made.inputs, made.outputs)

    found = model(sampled(), own, run_eagerly=eagerly)
    plain = model(sampled())
    for trained in (found, plain):
        small.fit(trained, x, y)
    small.assert_close(small.weights(found), small.weights(plain), tolerance=1e-5)


def test_evaluation_and_other_derivatives_in_between():
    """Nothing is drawn for these, and nothing of them stays."""
    x, y = easy()
    interrupted, plain = model(sampled()), model(sampled())
    before = interrupted.evaluate(x, y, verbose=0)
    assert before == pytest.approx(plain.evaluate(x, y, verbose=0))
    expected = small.gradients(forms_of(plain), x, ops.zeros((64, 3)))
    found = small.gradients(interrupted, x, ops.zeros((64, 3)))
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-4, atol=1e-6)
    small.fit(interrupted, x, y, validation_data=(x, y))
    interrupted.predict(x, verbose=0)
    small.fit(plain, x, y)
    small.assert_same(small.weights(interrupted), small.weights(plain))


def forms_of(captured):
    """A plain model with the weights of a captured one."""
    keras.utils.set_random_seed(3)
    made = forms.network()()
    for variable, value in zip(made.weights, small.weights(captured).values(), strict=True):
        variable.assign(value)
    return made


SHARES = [(1, 0.25, 0), (2, 0.25, 1), (2, 0.99, 1), (10, 0.3, 3), (100, 0.29, 28), (3, 0.999, 2)]


@pytest.mark.parametrize(("examples", "fraction", "expected"), SHARES)
def test_the_share_of_a_batch(examples, fraction, expected):
    """At least one example has its label drawn, and not all, whatever the batch; whether its size is static or not."""
    x = ops.zeros((examples, 2))
    assert sampled_rows.drawn(x, fraction) == expected
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        specs = [tf.TensorSpec((None, 2), "float32")]
        found = tf.function(lambda x: sampled_rows.drawn(x, fraction), input_signature=specs)
        assert int(found(x)) == expected


def test_predictions_that_are_certain():
    """Where nothing but one label can be drawn, gradients are finite."""
    noise = lambda shape: ops.convert_to_tensor(np.full(shape, 0.5, "float32"))  # noqa: E731
    sure = ops.convert_to_tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    for likelihood in (
        keras_ngd.fisher.Categorical(),
        keras_ngd.fisher.Categorical(from_logits=True),
        keras_ngd.fisher.Bernoulli(),
    ):
        predictions = 1e5 * sure if getattr(likelihood, "from_logits", False) else sure
        found = ops.convert_to_numpy(likelihood.gradient(predictions, noise))
        assert np.all(np.isfinite(found)), likelihood
    assert np.isfinite(ops.convert_to_numpy(keras_ngd.fisher.Gaussian().gradient(sure, noise))).all()
    numbers = ops.convert_to_numpy(cotangents.noise((1000, 100), ops.convert_to_tensor([1.0, 4095.0, 2.0**24]), 3))
    assert 0 < numbers.min() < numbers.max() < 1


def test_several_outputs_draw_numbers_of_their_own():
    draws = [
        ops.convert_to_numpy(cotangents.noise((8,), ops.convert_to_tensor([1.0, seed, number]), loss))
        for seed, number, loss in [(0.0, 0.0, 0), (0.0, 0.0, 1), (0.0, 1.0, 0), (1.0, 0.0, 0)]
    ]
    assert len({tuple(draw) for draw in draws}) == 4


def test_the_layer_before_a_frozen_one_learns_from_the_others():
    """A frozen layer in between, captured or not, passes gradients on."""
    x, y = easy()

    def make():
        h = inputs = keras.Input((4,))
        for number in range(3):
            h = layers.Dense(4, "tanh", trainable=number != 1)(h)
        return keras.Model(inputs, layers.Dense(3)(h))

    trained = model(sampled(), make)
    losses = trained.fit(x, y, batch_size=BATCH, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
