"""Captured normalisation layers: blocks, gradients and steps, against loops in float64."""

import functools

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

import keras_ngd
from tf_tests import paper, small
from tf_tests.reference import normalization as reference
from tf_tests.reference.running import close, run
from tf_tests.small import array

pytestmark = pytest.mark.neutral

BATCH = 6


def some_zero(shape, dtype=None):
    """Initializer of scales, of which the first is 0: what comes out says nothing of the normalized input there."""
    values = np.random.default_rng(list(shape)).uniform(0.5, 2, shape)
    values.flat[0] = 0
    return keras.ops.convert_to_tensor(values.astype(dtype or "float32"))


DRAWN = {"gamma_initializer": some_zero, "beta_initializer": keras.initializers.RandomNormal(seed=3)}


def old_layer_normalization(**arguments):
    with pytest.warns(UserWarning, match="rms_scaling"):
        return layers.LayerNormalization(rms_scaling=True, **arguments)


# A layer, the shape of an example, and the shape that its model is told.
CASES = {
    "batch": (lambda: layers.BatchNormalization(**DRAWN), (5,), (5,)),
    "batch_positions": (lambda: layers.BatchNormalization(epsilon=0.1, **DRAWN), (3, 4), (None, 4)),
    "batch_first_axis": (lambda: layers.BatchNormalization(axis=1, **DRAWN), (3, 2, 4), (3, 2, 4)),
    "batch_no_offset": (lambda: layers.BatchNormalization(center=False, **DRAWN), (3, 4), (3, 4)),
    "batch_no_scale": (lambda: layers.BatchNormalization(scale=False, **DRAWN), (2, 2, 3), (2, 2, 3)),
    "layer": (lambda: layers.LayerNormalization(**DRAWN), (5,), (5,)),
    "layer_positions": (lambda: layers.LayerNormalization(epsilon=0.1, **DRAWN), (3, 4), (None, 4)),
    "layer_first_axis": (lambda: layers.LayerNormalization(axis=1, **DRAWN), (3, 4), (3, 4)),
    "layer_axes": (lambda: layers.LayerNormalization(axis=[3, 1], **DRAWN), (3, 2, 4), (3, 2, 4)),
    "layer_mixed_axes": (lambda: layers.LayerNormalization(axis=[-1, 1], **DRAWN), (2, 3, 4), (2, None, 4)),
    "layer_no_offset": (lambda: layers.LayerNormalization(center=False, **DRAWN), (3, 4), (3, 4)),
    "layer_no_scale": (lambda: layers.LayerNormalization(scale=False, **DRAWN), (3, 4), (3, 4)),
    "layer_rms_scaling": (lambda: old_layer_normalization(scale=False, **DRAWN), (3, 4), (3, 4)),
    "group": (lambda: layers.GroupNormalization(2, **DRAWN), (6,), (6,)),
    "group_positions": (lambda: layers.GroupNormalization(3, epsilon=0.1, **DRAWN), (2, 3, 6), (None, None, 6)),
    "group_first_axis": (lambda: layers.GroupNormalization(2, axis=1, **DRAWN), (4, 3), (4, None)),
    "group_middle_axis": (lambda: layers.GroupNormalization(2, axis=-2, **DRAWN), (2, 4, 3), (2, 4, 3)),
    "group_instance": (lambda: layers.GroupNormalization(-1, scale=False, **DRAWN), (3, 4), (3, 4)),
    "rms": (lambda: layers.RMSNormalization(), (5,), (5,)),
    "rms_axes": (lambda: layers.RMSNormalization(axis=[2, 1], epsilon=0.1), (3, 4), (3, 4)),
}

# One of each kind; with both parameters, and with either alone.
FEW = ("batch_positions", "layer_no_scale", "group_first_axis", "rms")


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype("float32")


def branches(names):
    """One model of many layers side by side, each with its own input and its own squared error, and one batch."""
    made, shapes, told = zip(*(CASES[name] for name in names), strict=True)
    made = [make() for make in made]
    inputs = [keras.Input(shape) for shape in told]
    model = keras.Model(inputs, [layer(x) for layer, x in zip(made, inputs, strict=True)])
    for layer in made:
        if isinstance(layer, layers.RMSNormalization):
            layer.scale.assign(some_zero(layer.scale.shape))
    x = [1 + 2 * draw(BATCH, *shape, seed=i) for i, shape in enumerate(shapes)]
    y = [draw(BATCH, *shape, seed=100 + i) for i, shape in enumerate(shapes)]
    return model, made, x, y


def parameters_of(layer):
    return [array(v) for v in layer.trainable_variables if not hasattr(v, "keras_ngd_statistics")]


def squared_error(layer, x, y, xhat=None, count=None):
    """The reference of a layer, the mean squared error of what comes out, and the rows of its gradients."""
    found = reference.Reference(layer, x.shape)
    xhat = found.normalized(x) if xhat is None else xhat
    error = found.outputs(xhat, parameters_of(layer)) - y
    return found, np.mean(error**2), found.unit_rows(xhat, 2 * error / error.size)


def sgd_step(model, x, y, learning_rate=1.0):
    """One step of plain SGD on the captured model; at a rate of 1 the momenta are then minus the gradients."""
    keras_ngd.capture(model, paper.KFAC(), include="*")
    optimizer = keras.optimizers.SGD(learning_rate, momentum=0.5)
    model.compile(optimizer=optimizer, loss="mse", jit_compile=True)
    model.train_on_batch(x, y)
    momenta = zip(model.trainable_variables, optimizer.momentums, strict=True)
    return {v.path: -array(m) for v, m in momenta if m is not None}


def check(layer, gradients, u, divisor=BATCH):
    """A layer's blocks, and the gradient of its parameters, from the rows `u` of a step."""
    statistics = layer.statistics
    close(statistics.averages[0], reference.blocks(u, divisor)[None], 1e-5)
    v = statistics.geometry.to_matrix([gradients[p.path] for p in statistics.parameters()])
    close(v, u.sum(axis=1)[None], 1e-5)


def test_blocks_and_gradients_after_a_step():
    model, made, x, y = branches(CASES)
    expected = [squared_error(*case)[2] for case in zip(made, x, y, strict=True)]
    for layer, batch, output in zip(made, x, model(x, training=True), strict=True):
        found = reference.Reference(layer, batch.shape)
        close(output, found.outputs(found.normalized(batch), parameters_of(layer)), 1e-5)
    gradients = sgd_step(model, x, y)
    for layer, u in zip(made, expected, strict=True):
        check(layer, gradients, u)


def test_results_and_moving_averages_are_those_of_the_plain_layer():
    model, made, x, y = branches(("batch_positions", "batch_first_axis"))
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", jit_compile=True)
    start = [array(v) for v in model.weights]
    results = {}
    for captured in (False, True):
        if captured:
            model.set_weights(start)
            sgd_step(model, x, y, learning_rate=0.0)
        else:
            model.train_on_batch(x, y)
        results[captured] = small.weights(model), [array(t) for t in model(x, training=False)]
    assert np.any(results[False][0][made[0].moving_mean.path] != start[2])
    for plain, own in zip(results[False][1], results[True][1], strict=True):
        np.testing.assert_allclose(own, plain, rtol=1e-6, atol=1e-6)
    small.assert_close(results[True][0], results[False][0], 1e-6)


# Geometries, on batches of all shapes


@st.composite
def shapes(draw, ranks=(2, 4), sizes=(1, 3)):
    return [draw(st.integers(2, 4)), *(draw(st.integers(*sizes)) for _ in range(draw(st.integers(*ranks)) - 1))]


@st.composite
def cases(draw):
    """A built layer and the shape of a batch."""
    shape, kind = draw(shapes()), draw(st.sampled_from(["batch", "layer", "group", "rms"]))
    scale, center = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    arguments = {"scale": scale, "center": center, "epsilon": draw(st.sampled_from([1e-3, 0.5]))}
    rank = len(shape)
    axis = draw(st.integers(1, rank - 1))
    axis = draw(st.sampled_from([axis, axis - rank]))
    if kind == "batch":
        layer = layers.BatchNormalization(axis=axis, **arguments)
    elif kind == "group":
        groups = draw(st.integers(1, 3))
        shape[axis] *= groups
        layer = layers.GroupNormalization(groups, axis=axis, **arguments)
    elif kind == "rms":
        layer = layers.RMSNormalization(list(range(draw(st.integers(1, rank - 1)), rank)))
    else:
        axes = draw(st.sets(st.integers(1, rank - 1), min_size=1))
        layer = layers.LayerNormalization(sorted(axes), **arguments)
    layer.build((None, *shape[1:]))
    return layer, tuple(shape), draw(st.integers(0, 9))


def part_of(layer):
    """The part that a plain layer would have."""
    return keras_ngd.layers.CAPTURED_KINDS[type(layer)].parts(layer)["statistics"]


@given(cases())
def test_rows_of_any_shape(case):
    layer, shape, seed = case
    x, ds = 1 + draw(*shape, seed=seed), draw(*shape, seed=seed + 50)
    geometry, parameters = part_of(layer)
    found = reference.Reference(layer, shape)
    assert (geometry.groups, geometry.input_dim) == (1, found.scale + found.center) == (1, len(parameters))
    assert geometry.output_dim == found.features
    expected = found.unit_rows(found.normalized(x), ds)
    assert np.abs(run(geometry.unit_rows, x, ds) - expected).max() < 1e-5 * max(np.abs(expected).max(), 1)
    values = [draw(*p.shape, seed=i) for i, p in enumerate(parameters)]
    matrix = run(lambda *p: geometry.to_matrix(p), *values)
    np.testing.assert_array_equal(matrix, [[np.ravel(v) for v in values]])
    for back, value in zip(run(geometry.from_matrix, matrix), values, strict=True):
        np.testing.assert_array_equal(back, value)


@given(st.integers(2, 5), st.integers(1, 4), st.integers(2, 3), st.integers(0, 9))
def test_moments_of_what_a_mask_leaves(examples, positions, features, seed):
    shape = (examples, positions, features)
    layer = layers.BatchNormalization()
    layer.build((None, *shape[1:]))
    mask = np.random.default_rng(seed).random(shape[:2]) < 0.6
    mask[:2, 0] = True
    x, ds = 1 + draw(*shape, seed=seed), draw(*shape, seed=seed + 50)
    # Keras adds its epsilon to the number of positions.
    found = reference.Reference(layer, shape)
    expected = found.unit_rows(found.normalized(x, np.broadcast_to(mask[..., None], shape)), ds)
    close(run(part_of(layer).geometry.unit_rows, x, ds, mask), expected, 1e-5)


# Batch normalization


def test_a_mask_takes_positions_out_of_the_moments():
    shape = (BATCH, 4, 5)
    layer = layers.BatchNormalization(**DRAWN)
    model = keras.Sequential([keras.Input(shape[1:]), layers.Masking(0.0), layer])
    x, y = 1 + draw(*shape), draw(*shape, seed=1)
    mask = np.random.default_rng(0).random(shape[:2]) < 0.6
    x[~mask] = 0.0
    visible = np.broadcast_to(mask[..., None], shape)
    found = reference.Reference(layer, shape)
    xhat = found.normalized(x, visible)
    error = found.outputs(xhat, parameters_of(layer)) - y
    # Keras averages the loss over the visible positions only.
    u = found.unit_rows(xhat, 2 * error * visible / visible.sum())
    check(layer, sgd_step(model, x, y), u)


def by_moving_averages(layer, x):
    mean, variance = (array(v).astype("float64") for v in (layer.moving_mean, layer.moving_variance))
    shape = [-1 if axis == layer.axis % x.ndim else 1 for axis in range(x.ndim)]
    return (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + layer.epsilon)


class Inferring(keras.Model):
    """A model that calls its layer with `training=False`. (A functional one calls it as it is called itself.)"""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs):
        return self.layer(inputs, training=False)


@pytest.mark.parametrize("axis", [1, -1])
def test_training_false_normalizes_with_the_moving_averages(axis):
    layer, x, y = layers.BatchNormalization(axis, **DRAWN), 1 + draw(BATCH, 3, 4), draw(BATCH, 3, 4, seed=1)
    model = Inferring(layer)
    model(x)
    size = layer.moving_mean.shape
    layer.moving_mean.assign(draw(*size))
    layer.moving_variance.assign(0.5 + draw(*size, seed=2) ** 2)
    before = array(layer.moving_mean)
    _, _, u = squared_error(layer, x, y, by_moving_averages(layer, x))
    check(layer, sgd_step(model, x, y), u)
    np.testing.assert_array_equal(array(layer.moving_mean), before)


# Calls, precision and steps


def test_a_layer_called_twice():
    layer, inputs = layers.LayerNormalization(**DRAWN), [keras.Input((3, 4)), keras.Input((3, 4))]
    model = keras.Model(inputs, [layer(x) for x in inputs])
    x, y = [draw(BATCH, 3, 4, seed=i) for i in (1, 2)], [draw(BATCH, 3, 4, seed=i) for i in (3, 4)]
    expected = sum(reference.blocks(squared_error(layer, *call)[2], BATCH) for call in zip(x, y, strict=True))
    optimizer = paper.KFAC(0.0, factor_interval=1)
    keras_ngd.capture(model, optimizer, include="*")
    model.compile(optimizer=optimizer, loss=["mse", "mse"], jit_compile=True)
    for _ in range(2):  # the second time, the mean over the calls meets a running average
        model.train_on_batch(x, y)
        statistics = layer.statistics
        averages = [keras.ops.convert_to_tensor(v) for v in statistics.averages]
        [found] = optimizer.curvature_input(statistics, averages, statistics.tallied("calls"))
        assert float(statistics.tallied("calls")) == float(statistics.tallied("accepted")) == 2
        close(found, expected[None], 1e-5)


@pytest.mark.parametrize("name", FEW)
def test_mixed_bfloat16_observes_in_float32(name):
    with small.policy("mixed_bfloat16"):
        model, [layer], [x], [y] = branches([name])
        x = np.asarray(keras.ops.cast(keras.ops.cast(x, "bfloat16"), "float32"))
        u = squared_error(layer, x, y)[2]
        sgd_step(model, [x], [y])
    assert layer.statistics.averages[0].dtype == "float32"
    # What comes out is rounded to eight bits, hence the gradients, too.
    close(layer.statistics.averages[0], reference.blocks(u, BATCH)[None], 0.05)


@pytest.mark.parametrize("name", FEW)
def test_float64(float64, name):
    model, [layer], [x], [y] = branches([name])
    # Keras on JAX rounds the loss's divisor, and means, in float32; the blocks have no other error.
    x, y = x.astype("float64")[:4], y.astype("float64")[:4]
    u = squared_error(layer, x, y)[2]
    sgd_step(model, [x], [y])
    assert layer.statistics.averages[0].dtype == "float64"
    close(layer.statistics.averages[0], reference.blocks(u, 4)[None], 1e-6)


EACH = {"factor_interval": 1, "inverse_interval": 1}
ROWS = {"interval": 1, "batch_size": BATCH}
METHODS = {
    "kfac": functools.partial(keras_ngd.KFAC, damping_mode="relative", **EACH),
    "kfac_pi": functools.partial(keras_ngd.KFAC, damping=0.1, damping_mode="pi", **EACH),
    "kfac_exact": functools.partial(keras_ngd.KFAC, damping=0.1, damping_mode="exact", inverse="eigen", **EACH),
    "thor": functools.partial(keras_ngd.THOR, damping_mode="relative", **EACH),
    "skfac": functools.partial(keras_ngd.SKFAC, **ROWS),
    "sngd": functools.partial(keras_ngd.SNGD, **ROWS),
    "sngd_absolute": functools.partial(keras_ngd.SNGD, damping=0.1, **ROWS),
    "hylo": functools.partial(keras_ngd.HyLo, mode="kid", **ROWS),
}
ABSOLUTE = ("kfac_pi", "kfac_exact", "sngd_absolute")


def clipped(method, loss):
    """What is left of a step by the bound at defaults, of the loss in units of the step's squared length."""
    return min(1.0, np.sqrt(0.4 * loss) if method.startswith(("kfac", "thor")) else loss)


@pytest.mark.parametrize("method", METHODS)
def test_first_step(method):
    """Where the damping is relative to the blocks, and at a damping of 0.1."""
    model, made, x, y = branches(FEW if method in ("kfac", "kfac_pi", "sngd") else FEW[:1])
    optimizer = METHODS[method](learning_rate=0.5, momentum=0.0, losses_per_example=1)
    assert keras_ngd.capture(model, optimizer, include="*").not_captured == {}
    expected = [squared_error(*case) for case in zip(made, x, y, strict=True)]
    loss, damping = sum(value for _, value, _ in expected), (0.1, "pi") if method in ABSOLUTE else (1.0, "relative")
    directions, length = [], 0.0
    for _, _, u in expected:
        v = u.sum(axis=1)
        # The default `fisher_scale` divides the Fisher matrix by the loss; each block's step is bounded by it, then all.
        direction = reference.preconditioned(reference.blocks(u, BATCH) / loss, v, *damping)
        share = clipped(method, loss / np.sum(direction * v))
        directions.append(direction * share)
        length += share * np.sum(direction * v)
    before = [parameters_of(layer) for layer in made]
    model.compile(optimizer=optimizer, loss="mse", jit_compile=True)
    model.train_on_batch(x, y)
    shortened = clipped(method, loss / length)
    for layer, old, direction in zip(made, before, directions, strict=True):
        for new, start, part in zip(parameters_of(layer), old, direction, strict=True):
            close(new.ravel() - start.ravel(), -0.5 * shortened * part, 1e-4)


# What is not captured


def reason(layer, shape=(3, 4)):
    """Why a layer is left out between two dense layers."""
    inputs = keras.Input(shape, batch_size=2)
    h = layer(layers.Dense(4, name="before")(inputs))
    report = keras_ngd.capture(keras.Model(inputs, layers.Dense(2, name="after")(h)), paper.KFAC(), include="*")
    return report.not_captured.get(layer.path, "")


def test_reasons():
    assert reason(layers.BatchNormalization()) == ""
    assert "renorm" in reason(layers.BatchNormalization(renorm=True))
    for kind in (layers.BatchNormalization, layers.LayerNormalization, functools.partial(layers.GroupNormalization, 2)):
        assert reason(kind(scale=False, center=False)) == "it has neither a scale nor an offset"
    assert "have that of the examples among them" in reason(layers.LayerNormalization([0, -1]))
    assert "have that of the examples among them" in reason(layers.BatchNormalization(-3))
    assert "are not the last ones" in reason(layers.RMSNormalization(1), (4, 4))
    assert reason(layers.RMSNormalization([1, 2]), (4, 4)) == ""


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras has it on TensorFlow alone")
def test_synchronized_moments_are_not_captured():
    assert "synchronized" in reason(layers.BatchNormalization(synchronized=True))


def test_they_are_captured_where_they_are_asked_for_alone():
    inputs = keras.Input((4,))
    h = layers.LayerNormalization(name="first_norm")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="after")(layers.BatchNormalization(name="second_norm")(h)))
    report = keras_ngd.capture(model, paper.KFAC())
    assert report.captured == ["after"]
    assert all("`include` captures it" in text for text in report.not_captured.values())
    assert keras_ngd.capture(model, paper.KFAC(), include="first*").captured == ["first_norm", "after"]
    keras_ngd.release(model)
    assert type(model.get_layer("first_norm")) is layers.LayerNormalization
