"""Training steps that clip, penalise, disturb or add up all gradients, those of the statistics too."""

import pathlib
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_ngd
from tf_tests.loops import by_norm, by_value, custom_step, each_by_norm
from tf_tests.reference import kronecker, rows
from tf_tests.reference.running import close
from tf_tests.small import JIT, array, captured, fit, kfac, mlp, regression, weights

BATCH = 8
OPTIMIZERS = {
    "kfac": lambda **kwargs: kfac(**kwargs),
    "thor": lambda **kwargs: keras_ngd.THOR(factor_interval=1, inverse_interval=1, **kwargs),
    "skfac": lambda **kwargs: keras_ngd.SKFAC(interval=1, batch_size=BATCH, **kwargs),
    "sngd": lambda **kwargs: keras_ngd.SNGD(interval=1, batch_size=BATCH, **kwargs),
    "hylo": lambda **kwargs: keras_ngd.HyLo(interval=1, batch_size=BATCH, mode="kid", **kwargs),
}

# Of the methods whose statistics pass through the same lines as another's, the others run with the slow tests.
METHODS = [m if m in ("kfac", "hylo") else pytest.param(m, marks=pytest.mark.slow) for m in OPTIMIZERS]


def prepared(optimizer, **arguments):
    """A captured network and its custom step."""
    model = mlp()
    keras_ngd.capture(model, optimizer)
    return model, custom_step(model, optimizer, **arguments)


def factors(model, x, y):
    """`A` and `G` of both layers on one batch, in float64."""
    w1, b1, w2, b2 = (array(v).astype("float64") for v in keras_ngd.trainable_weights(model))
    hidden = np.tanh(x @ w1 + b1)
    outputs = 2 * (hidden @ w2 + b2 - y) / y.size
    upstream = (outputs @ w2.T) * (1 - hidden**2)
    found = []
    for inputs, gradients in ((x, upstream), (hidden, outputs)):
        a = rows.append_ones(rows.dense_rows(inputs.astype("float64")))
        ghat = rows.dense_rows(gradients)
        found.append((kronecker.input_factor(a), kronecker.output_factor(ghat, len(x))))
    return found


def batches(count, seed=0):
    x, y = regression(BATCH * count)
    return [(x[i * BATCH : (i + 1) * BATCH], y[i * BATCH : (i + 1) * BATCH]) for i in range(count)]


def averages(layer):
    return [array(v) for v in layer.statistics.averages]


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_factor_common_to_all_gradients_drops_out(decay):
    optimizer = kfac(learning_rate=0.0, factor_decay=decay, factor_interval=2, interval_growth=None)
    model, step = prepared(optimizer, change=by_norm)
    expected = None
    for number, (x, y) in enumerate(batches(4)):
        step(x, y)
        if number % 2 == 0:  # in between, the averages stay to the last bit
            new = factors(model, x, y)
            share = 0 if expected is None else decay / (1 + decay)
            expected = [
                [share * (0 if expected is None else expected[i][j]) + (1 - share) * new[i][j] for j in range(2)]
                for i in range(2)
            ]
            kept = [averages(layer) for layer in model.layers[1:]]
        for layer, sides, before in zip(model.layers[1:], expected, kept, strict=True):
            for found, side, old in zip(averages(layer), sides, before, strict=True):
                close(found, side, 1e-5)
                np.testing.assert_array_equal(found, old)
    assert optimizer.factor_updates == 2
    assert optimizer.distorted_statistics == optimizer.skipped_statistics == 0
    with pytest.warns(UserWarning, match="trainable_weights"):
        optimizer.give_notices()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer.give_notices()  # once


def test_a_penalty_on_all_variables_mixes_old_averages_in():
    """What arrives is `A + 2 l A_old`, of calls `1 + 2 l`."""
    rate = 0.05
    optimizer = kfac(learning_rate=0.0, factor_decay=0.0)
    model, step = prepared(optimizer, penalty=lambda values: rate * sum(ops.sum(ops.square(v)) for v in values))
    old = [(np.zeros(1), np.zeros(1))] * 2
    for x, y in batches(3):
        step(x, y)
        old = [
            tuple((new + 2 * rate * before) / (1 + 2 * rate) for new, before in zip(*pair, strict=True))
            for pair in zip(factors(model, x, y), old, strict=True)
        ]
        for layer, sides in zip(model.layers[1:], old, strict=True):
            for found, side in zip(averages(layer), sides, strict=True):
                close(found, side, 1e-5)
    assert optimizer.factor_updates == 3
    assert optimizer.distorted_statistics == optimizer.skipped_statistics == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("treatment", ["norm", "penalty"])
def test_all_methods_train_with_a_clip_or_a_penalty_of_everything(treatment, method):
    arguments = {
        "norm": {"change": by_norm},
        "penalty": {"penalty": lambda v: 1e-3 * sum(map(ops.sum, map(ops.square, v)))},
    }
    optimizer = OPTIMIZERS[method](learning_rate=0.02, kl_clip=None)
    model, step = prepared(optimizer, **arguments[treatment])
    losses = []
    for _ in range(6):
        for x, y in batches(2):
            losses.append(float(step(x, y)))
    assert optimizer.factor_updates == 12
    assert optimizer.distorted_statistics == optimizer.skipped_statistics == optimizer.skipped_steps == 0
    if treatment == "penalty":
        assert losses[-1] - losses[0] < 0
    for layer in model.layers[1:]:
        if hasattr(layer.statistics, "draw"):
            number, drawn = array(layer.statistics.draw)
            assert drawn == 12
            assert number in (0, 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [each_by_norm, by_value, None], ids=["each by its norm", "by value", "noise"])
def test_what_cannot_be_told_is_counted_and_left_out(change, method):
    def noise(gradients, variables):
        rng = np.random.default_rng(3)
        return [g + ops.convert_to_tensor(rng.normal(size=g.shape) * 0.05, g.dtype) for g in gradients]

    optimizer = OPTIMIZERS[method](learning_rate=0.0)
    model, step = prepared(optimizer, change=change or noise)
    before = [averages(layer) for layer in model.layers[1:]]
    for x, y in batches(2):
        step(x, y)
    for layer, old in zip(model.layers[1:], before, strict=True):
        for found, value in zip(averages(layer), old, strict=True):
            np.testing.assert_array_equal(found, value)
    assert optimizer.distorted_statistics == 2
    assert optimizer.factor_updates == optimizer.skipped_statistics == 0
    with pytest.warns(UserWarning, match="could not be told"):
        optimizer.give_notices()


def test_averages_stay_also_where_they_are_changed_between_updates():
    optimizer = kfac(learning_rate=0.0, factor_interval=3, interval_growth=None)
    model, step = prepared(optimizer)
    x, y = batches(1)[0]
    step(x * 100, y)
    kept = [averages(layer) for layer in model.layers[1:]]
    clipped = custom_step(model, optimizer, change=by_value)
    clipped(x, y)
    for layer, old in zip(model.layers[1:], kept, strict=True):
        for found, value in zip(averages(layer), old, strict=True):
            np.testing.assert_array_equal(found, value)


def test_a_norm_that_is_not_finite_is_a_batch_that_is_not():
    optimizer = kfac()
    model, step = prepared(optimizer, change=by_norm)
    (x, y), (other, z) = batches(2)
    step(x, y)
    before = [averages(layer) for layer in model.layers[1:]]
    step(np.full_like(other, np.nan), z)
    assert optimizer.skipped_statistics == optimizer.skipped_steps == 1
    assert optimizer.distorted_statistics == 0
    for layer, old in zip(model.layers[1:], before, strict=True):
        for found, value in zip(averages(layer), old, strict=True):
            np.testing.assert_array_equal(found, value)
    assert all(np.all(np.isfinite(value)) for value in weights(model).values())


def test_trainable_weights_are_those_of_the_plain_model_in_order():
    model = mlp()
    plain = [v.path for v in model.trainable_variables]
    keras_ngd.capture(model, kfac())
    assert [v.path for v in keras_ngd.trainable_weights(model)] == plain
    assert len(model.trainable_variables) > len(plain)


@pytest.mark.skipif(JIT, reason="the step in README is TensorFlow's")
def test_the_step_in_readme_leaves_statistics_alone():
    readme = (pathlib.Path(keras_ngd.__file__).parents[1] / "README.md").read_text()
    code = readme.split("### Custom training steps")[1].split("```python\n")[1].split("```")[0]
    import tensorflow as tf

    names = {"keras": keras, "tf": tf, "keras_ngd": keras_ngd}
    exec(code, names)
    plain = mlp()
    model = names["Clipped"](plain.inputs, plain.outputs)
    optimizer = kfac(learning_rate=0.05, factor_decay=0.0)
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    x, y = regression(BATCH)
    expected = factors(model, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        before = model.fit(x, y, batch_size=BATCH, verbose=0).history["total_loss"][0]
    for layer, sides in zip(model.layers[1:], expected, strict=True):
        for found, side in zip(averages(layer), sides, strict=True):
            close(found, side, 1e-5)
    assert model.fit(x, y, batch_size=BATCH, epochs=5, verbose=0).history["total_loss"][-1] < before
    assert not array(optimizer.counters.changes).any()


def test_fit_gives_notices_when_it_ends():
    model = captured(mlp())
    x, y = regression(BATCH)
    fit(model, x, y)
    model.optimizer.counters.changes.assign([1, 0, 0, 0])
    with pytest.warns(UserWarning, match="could not be told"):
        fit(model, x, y)


def test_target_networks_as_readme_makes_them():
    model = mlp()
    target = keras.models.clone_model(model)
    assert len(model.get_weights()) == 4
    keras_ngd.capture(model, kfac())
    assert len(model.get_weights()) > 4
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    for goal in (target, other):
        for variable, value in zip(keras_ngd.trainable_weights(goal), keras_ngd.trainable_weights(model), strict=True):
            # A copy: on JAX, variables that share a value cannot both be trained.
            variable.assign(keras.ops.copy(value))
    x, _ = regression(BATCH)
    for goal in (target, other):
        close(goal.predict(x, verbose=0), model.predict(x, verbose=0), 1e-6)
