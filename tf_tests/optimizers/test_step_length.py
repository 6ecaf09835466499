"""Steps relative to the loss: what its units change (nothing), what learning rates do, what the rest of a model follows."""

import functools
import warnings

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests import small

pytestmark = pytest.mark.neutral

METHODS = {
    "KFAC": keras_ngd.KFAC,
    "THOR": lambda **a: keras_ngd.THOR(split=3, **a),
    "SKFAC": lambda **a: keras_ngd.SKFAC(batch_size=8, **a),
    "SNGD": lambda **a: keras_ngd.SNGD(batch_size=8, **a),
    "HyLo": lambda **a: keras_ngd.HyLo(batch_size=8, rank=4, mode="kid", **a),
}
# How it is compiled, and the ways to train it.
SCALES = {
    "weights": ({}, [{"sample_weight": np.full(32, scale, "float32")} for scale in (1000.0, 0.001)]),
    "a sum": ({"loss": keras.losses.MeanSquaredError(reduction="sum")}, [{}]),
    "a loss weight": ({"loss": ["mse"], "loss_weights": [50.0]}, [{}]),
}


def prepared(optimizer, model=None, **kwargs):
    model = small.mlp() if model is None else model
    for i, variable in enumerate(model.trainable_variables):
        rng = np.random.default_rng(i)
        variable.assign(rng.normal(size=variable.shape).astype("float32") / 2)
    return model if optimizer is None else small.captured(model, optimizer, **kwargs)


def trained(optimizer, model=None, epochs=2, **kwargs):
    model = prepared(optimizer, model, **kwargs)
    small.fit(model, *small.regression(), epochs=epochs)
    return model


@functools.cache
def plain_weights(method):
    return small.weights(trained(METHODS[method]()))


@pytest.mark.parametrize("method", [m if m == "KFAC" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
@pytest.mark.parametrize("scale", SCALES)
def test_steps_do_not_depend_on_the_units_of_the_loss(method, scale):
    how_to_compile, ways_to_fit = SCALES[scale]
    scaled = small.Restarting(prepared(METHODS[method](), **how_to_compile))
    for how_to_fit in ways_to_fit:
        model = scaled.restarted()
        small.fit(model, *small.regression(), epochs=2, **how_to_fit)
        assert small.relative_distance(small.weights(model), plain_weights(method)) < 1e-4


def test_steps_do_not_depend_on_the_units_of_the_targets():
    """A linear model of scaled targets is the scaled model: its steps are, too, as Newton's are."""

    def linear(scale):
        x, y = small.regression()
        inputs = keras.Input((4,))
        model = keras.Model(inputs, layers.Dense(4, kernel_initializer="zeros", name="outputs")(inputs))
        small.captured(model, keras_ngd.KFAC())
        small.fit(model, x, scale * y, epochs=2)
        return {path: value / scale for path, value in small.weights(model).items()}

    assert small.relative_distance(linear(1000.0), linear(1.0)) < 1e-3


def test_the_loss_arrives():
    x, y = small.regression()
    model = small.captured(small.mlp(), keras_ngd.KFAC(factor_decay=0.0))
    first = model.evaluate(x[:8], y[:8], verbose=0)
    small.fit(model, x[:8], y[:8])
    np.testing.assert_allclose(float(small.array(model.optimizer.mean_loss.variable)), first, rtol=1e-5)
    second = model.evaluate(x[:8], y[:8], verbose=0)
    small.fit(model, x[:8], y[:8])
    np.testing.assert_allclose(float(small.array(model.optimizer.mean_loss.variable)), second, rtol=1e-5)


def first_steps(rates, **arguments):
    """What the first step changes, at each learning rate."""
    model = small.mlp()
    for i, variable in enumerate(model.trainable_variables):
        variable.assign(np.random.default_rng(i).normal(size=variable.shape).astype("float32"))
    before = small.weights(model)
    restarting = small.Restarting(small.captured(model, keras_ngd.KFAC(**arguments)))
    x, y = small.regression(8)
    for rate in rates:
        restarting.restarted().optimizer.learning_rate = rate
        small.fit(model, x, 10 * y)
        assert model.optimizer.clipped_steps == 1
        yield np.concatenate([np.ravel(v - before[k]) for k, v in small.weights(model).items()])


def test_learning_rates_act_on_clipped_steps_unless_kl_clip_clips_them():
    close = {"rtol": 1e-3, "atol": 1e-6}
    for clip in ("loss_clip", "length_clip"):
        once, twice = first_steps([0.01, 0.02], **{clip: 0.01})
        np.testing.assert_allclose(twice, 2 * once, **close)
    once, twice = first_steps([0.1, 0.2], kl_clip=1e-7)
    np.testing.assert_allclose(twice, once, **close)


@pytest.mark.parametrize(("clip", "power"), [("length_clip", 0.5), ("loss_clip", 1.0)])
def test_a_clipped_step_is_as_long_as_its_bound(clip, power):
    """Each layer's step is shortened to the bound, and then that of all, with `V` the gradient and `P` as without a bound."""
    rate, bound = 1e-3, 0.01
    x, y = small.regression(8)

    def step(value):
        model = prepared(keras_ngd.KFAC(rate, momentum=0.0, **{clip: value}))
        before = small.weights(model)
        small.fit(model, x, y)
        return model.optimizer, {k: (before[k] - v) / rate for k, v in small.weights(model).items()}

    start = prepared(None)
    gradients, loss = small.gradients(start, x, y), float(np.mean((np.array(start(x)) - y) ** 2))
    (_, unbounded), (optimizer, bounded) = step(None), step(bound)

    def nu(length):
        return min(1.0, (bound * loss / length) ** power)

    by_layer = {}
    for path, p in unbounded.items():
        layer = path.rpartition("/")[0]
        by_layer[layer] = by_layer.get(layer, 0.0) + np.sum(p * gradients[path])
    of_all = nu(sum(nu(length) * length for length in by_layer.values()))
    for path, p in unbounded.items():
        expected = of_all * nu(by_layer[path.rpartition("/")[0]]) * p
        np.testing.assert_allclose(bounded[path], expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())
    np.testing.assert_allclose(optimizer.mean_step_scale, of_all, rtol=1e-2)


def test_a_schedule_shortens_steps_once_they_are_shorter_than_their_bound():
    """The bound is that of the largest learning rate so far."""

    class Falling(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return keras.ops.where(step < 1, 0.02, 0.01)

    x, y = small.regression(8)

    def second_step(rate, length_clip):
        model = prepared(
            keras_ngd.KFAC(rate, length_clip=length_clip, momentum=0.0, inverse_interval=10, interval_growth=None)
        )
        small.fit(model, x, y)
        before = small.weights(model)
        small.fit(model, x, y)
        return np.concatenate([np.ravel(before[k] - v) for k, v in small.weights(model).items()])

    for clip, share in ((1e-4, 1.0), (100.0, 0.5)):
        constant, falling = (second_step(rate, clip) for rate in (0.02, Falling()))
        np.testing.assert_allclose(falling, share * constant, rtol=1e-3, atol=1e-7)


def test_a_learning_rate_that_has_no_say_is_warned_of_once():
    x, y = small.regression(800)
    model = small.captured(small.mlp(), keras_ngd.KFAC(kl_clip=1e-9))
    with pytest.warns(UserWarning, match="`kl_clip=1e-09` shortened .* of .* steps"):
        small.fit(model, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        small.fit(model, x, y)


def test_the_monitor_logs_what_the_clips_do():
    x, y = small.regression(16)
    model = small.captured(small.mlp(), keras_ngd.KFAC(loss_clip=1e-6))
    history = small.fit(model, x, y, epochs=2, callbacks=[keras_ngd.callbacks.StepMonitor()]).history
    assert history["clipped_share"] == [1.0, 1.0]
    assert 0 < history["step_scale"][0] < 1
    plain = small.compiled(small.mlp(), "sgd")
    with pytest.raises(ValueError, match="`StepMonitor` is for optimizers of keras_ngd"):
        small.fit(plain, x, y, callbacks=[keras_ngd.callbacks.StepMonitor()])


def with_a_rest():
    inputs = keras.Input((4,))
    hidden = layers.LayerNormalization(name="normal")(layers.Dense(4, name="hidden")(inputs))
    return keras.Model(inputs, layers.Dense(4, name="outputs")(hidden))


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_rest_follows_adam(momentum):
    """Captured layers at a learning rate of 0, the rest as under Keras's Adam on it alone."""
    optimizer = keras_ngd.KFAC(0.0, momentum=momentum, rest_learning_rate=0.01)
    model = trained(optimizer, with_a_rest())
    plain = with_a_rest()
    for i, variable in enumerate(plain.trainable_variables):
        rng = np.random.default_rng(i)
        variable.assign(rng.normal(size=variable.shape).astype("float32") / 2)
    for layer in plain.layers:
        layer.trainable = layer.name == "normal"
    small.compiled(plain, keras.optimizers.Adam(0.01))
    small.fit(plain, *small.regression(), epochs=2)
    small.assert_close(small.weights(model), {v.path: small.array(v) for v in plain.weights}, 1e-5)


def test_the_rests_learning_rate_is_a_share_of_the_optimizers():
    shared = trained(keras_ngd.KFAC(0.05), with_a_rest())
    given = trained(keras_ngd.KFAC(0.05, rest_learning_rate=0.005), with_a_rest())
    small.assert_close(small.weights(shared), small.weights(given), 1e-5)


def test_the_rest_may_follow_the_same_rule():
    model = trained(keras_ngd.KFAC(0.0, rest="sgd", rest_learning_rate=0.01, momentum=0.0), with_a_rest(), epochs=1)
    plain = with_a_rest()
    for i, variable in enumerate(plain.trainable_variables):
        variable.assign(np.random.default_rng(i).normal(size=variable.shape).astype("float32") / 2)
    for layer in plain.layers:
        layer.trainable = layer.name == "normal"
    small.compiled(plain, keras.optimizers.SGD(0.01))
    small.fit(plain, *small.regression())
    small.assert_close(small.weights(model), {v.path: small.array(v) for v in plain.weights}, 1e-5)


def test_intervals_grow_to_those_asked_for():
    x, y = small.regression(800)
    model = small.captured(small.mlp(), keras_ngd.KFAC(factor_interval=3, inverse_interval=7))
    small.fit(model, x, y)

    def updates(interval):
        found, due = 0, 0
        for step in range(100):
            if step >= due:
                found, due = found + 1, step + min(max(step // 10, 1), interval)
        return found

    assert model.optimizer.factor_updates == updates(3)
    # An inverse waits for no factors here: every refresh falls on a step of its own.
    assert model.optimizer.inverse_updates == updates(7)


def test_arguments_survive_saving(tmp_path):
    arguments = {
        "loss_clip": 0.5,
        "length_clip": 0.2,
        "fisher_scale": None,
        "interval_growth": 0.2,
        "rest": "sgd",
        "rest_learning_rate": 0.01,
    }
    config = keras_ngd.KFAC(0.1, **arguments).get_config()
    assert {name: config[name] for name in arguments} == arguments
    assert keras_ngd.KFAC.from_config(config).get_config() == config
    papers = keras_ngd.SNGD(0.1, 0.1, **keras_ngd.PAPER_SETTINGS)
    assert (papers.kl_clip, papers.loss_clip, papers.length_clip, papers.damping_mode) == (1e-3, None, None, "absolute")


@pytest.mark.parametrize("method", METHODS)
def test_a_bound_that_is_asked_for_is_the_only_one(method):
    default = {"length_clip": 0.4} if method in ("KFAC", "THOR") else {"loss_clip": 1.0}
    for arguments, bounds in (
        ({}, default),
        ({"loss_clip": None}, {}),
        ({"length_clip": None}, {}),
        ({"loss_clip": 2}, {"loss_clip": 2.0}),
        ({"length_clip": 0.1, "kl_clip": 0.2}, {"length_clip": 0.1, "kl_clip": 0.2}),
    ):
        optimizer = METHODS[method](**arguments)
        assert {
            n: v for n in ("length_clip", "loss_clip", "kl_clip") if (v := getattr(optimizer, n)) is not None
        } == bounds
