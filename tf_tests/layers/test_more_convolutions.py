"""Depthwise, separable and transposed convolutions, against loops in float64 and against the layers that they equal."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

import keras_ngd
from keras_ngd.layers.depthwise_convolution import DepthwiseGeometry
from keras_ngd.layers.transposed_convolution import TransposedGeometry
from keras_ngd.linalg import diagonal
from tf_tests import paper, small
from tf_tests.layers.test_rows import answers, check_answers
from tf_tests.linalg.test_diagonal import slices
from tf_tests.reference import convolutions, kronecker, low_rank
from tf_tests.reference import rows as reference
from tf_tests.reference.running import close, drawn, run
from tf_tests.reference.training import NaturalGradientTraining

BATCH = 4
ON_JAX = keras.backend.backend() == "jax"


def of_windows(kind):
    """A function that makes a layer of drawn weights."""
    names = ["bias"] + (["depthwise", "pointwise"] if "Separable" in kind.__name__ else [])
    names += ["depthwise"] if "Depthwise" in kind.__name__ else ["kernel"] if "Transpose" in kind.__name__ else []
    return lambda *args, **kwargs: kind(*args, **{f"{name}_initializer": drawn for name in names}, **kwargs)


depthwise1d, depthwise2d = of_windows(layers.DepthwiseConv1D), of_windows(layers.DepthwiseConv2D)
separable1d, separable2d = of_windows(layers.SeparableConv1D), of_windows(layers.SeparableConv2D)
transposed1d, transposed2d = of_windows(layers.Conv1DTranspose), of_windows(layers.Conv2DTranspose)
transposed3d = of_windows(layers.Conv3DTranspose)

LAYERS = {
    "depthwise1d": lambda: (depthwise1d(3, padding="same", activation="tanh", depth_multiplier=2), (6, 3)),
    "depthwise1d-dilated-strided": lambda: (depthwise1d(2, strides=2, dilation_rate=2, padding="same"), (7, 2)),
    "depthwise2d": lambda: (depthwise2d(3, padding="same", activation="tanh"), (4, 5, 3)),
    "depthwise2d-dilated": lambda: (depthwise2d(2, dilation_rate=2, padding="same"), (4, 5, 1)),
    "separable1d": lambda: (separable1d(3, 2, depth_multiplier=2, use_bias=False, strides=2, padding="same"), (7, 2)),
    "separable2d": lambda: (separable2d(4, 3, padding="same", activation="tanh"), (4, 5, 2)),
    "separable2d-dilated": lambda: (separable2d(2, 2, dilation_rate=2, depth_multiplier=2), (5, 4, 3)),
    "transposed1d": lambda: (transposed1d(3, 4, strides=2, padding="same", activation="tanh"), (4, 2)),
    "transposed1d-output-padding": lambda: (transposed1d(2, 3, strides=3, padding="same", output_padding=1), (4, 2)),
    "transposed1d-sparse": lambda: (transposed1d(2, 2, strides=3, use_bias=False), (4, 3)),
    "transposed2d": lambda: (transposed2d(2, 3, strides=2, padding="same", activation="tanh"), (3, 4, 3)),
    "transposed2d-valid": lambda: (transposed2d(2, (2, 3), strides=(2, 1), output_padding=(1, 0)), (3, 2, 2)),
    "transposed3d": lambda: (transposed3d(2, 2, strides=1, padding="same"), (2, 3, 2, 2)),
}

# TensorFlow has these on CPUs where XLA compiles them; otherwise on some CPUs alone.
COMPILED = {
    "depthwise2d-strided": lambda: (depthwise2d((2, 3), strides=(1, 2), depth_multiplier=2, use_bias=False), (5, 6, 2)),
    "transposed2d-dilated": lambda: (transposed2d(2, 2, dilation_rate=2, padding="same"), (4, 3, 2)),
}
CHANNELS_FIRST = {
    "depthwise1d": lambda: (depthwise1d(3, padding="same", data_format="channels_first"), (2, 6)),
    "depthwise2d": lambda: (depthwise2d(3, strides=2, data_format="channels_first", depth_multiplier=2), (2, 5, 6)),
    "separable2d": lambda: (separable2d(3, 2, padding="same", data_format="channels_first"), (2, 4, 5)),
    "transposed2d": lambda: (transposed2d(3, 3, strides=2, padding="same", data_format="channels_first"), (2, 3, 4)),
}


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype("float32")


# Some of each family, where what is computed does not depend on strides and paddings.
FEW = ("depthwise1d", "depthwise2d", "separable1d", "transposed1d", "transposed2d-valid")


def branches(cases):
    """One model of many layers side by side, each with its own input and its own squared error, and one batch."""
    made, shapes = zip(*(make() for make in cases.values()), strict=True)
    inputs = [keras.Input(shape) for shape in shapes]
    model = keras.Model(inputs, [layer(x) for layer, x in zip(made, inputs, strict=True)])
    x = [draw(BATCH, *shape, seed=i) for i, shape in enumerate(shapes)]
    y = [draw(BATCH, *output.shape[1:], seed=100 + i) for i, output in enumerate(model.outputs)]
    return model, list(zip(made, x, y, strict=True)), x, y


def sgd_step(model, optimizer, x, y, jit_compile=small.JIT):
    """Captures `model` and takes one step of plain SGD; returns the gradients by path."""
    keras_ngd.capture(model, optimizer)
    sgd = keras.optimizers.SGD(1e-30, momentum=0.5)
    model.compile(optimizer=sgd, loss=["mse"] * len(model.outputs), jit_compile=jit_compile)
    model.train_on_batch(x, y)
    momenta = zip(model.trainable_variables, sgd.momentums, strict=True)
    return {v.path: np.asarray(m, "float64") / -1e-30 for v, m in momenta if m is not None}


def check_step(cases, sharing="expand", jit_compile=small.JIT):
    """A step's results, factors and gradients: `V = a^T ghat`."""
    model, each, x, y = branches(cases)
    model.compile(jit_compile=jit_compile)
    before = keras.tree.flatten(model.predict_on_batch(x))
    gradients = sgd_step(model, paper.KFAC(weight_sharing=sharing), x, y, jit_compile)
    after = keras.tree.flatten(model.predict_on_batch(x))
    for (layer, *batch), plain, now in zip(each, before, after, strict=True):
        results, parts, others = convolutions.results_and_rows(layer, *batch)
        close(plain, results, 1e-5)
        close(now, results, 1e-5)
        assert list(parts) == list(layer.all_statistics())
        for name, (a, ghat) in parts.items():
            statistics = getattr(layer, name)
            close(statistics.averages[0], kronecker.input_factor(a, sharing), 1e-5)
            close(statistics.averages[1], kronecker.output_factor(ghat, BATCH, sharing), 1e-5)
            v = statistics.geometry.to_matrix([gradients[v.path] for v in statistics.parameters()])
            close(v, np.einsum("knti,knto->kio", a, ghat), 1e-5)
            weights = statistics.geometry.to_matrix([np.asarray(v) for v in statistics.parameters()])
            close(weights, convolutions.matrices(layer)[name], 1e-7)
        for name, gradient in others.items():
            close(gradients[getattr(layer, name).path], gradient, 1e-5)


def test_results_factors_and_gradients_of_a_step():
    check_step(LAYERS)


def test_reduced_factors():
    check_step({name: LAYERS[name] for name in FEW}, "reduce")


@pytest.mark.parametrize("cases", [COMPILED, CHANNELS_FIRST], ids=["windows", "channels-first"])
def test_what_xla_alone_has_on_every_cpu(cases):
    check_step(cases, jit_compile=True)


def test_a_step_of_kfac_equals_the_simulation():
    model, each, x, y = branches({name: LAYERS[name] for name in FEW})
    simulation = NaturalGradientTraining(0.1, 0.03)
    weights, gradients, observed = {}, {}, {}
    for i, (layer, *batch) in enumerate(each):
        _, parts, others = convolutions.results_and_rows(layer, *batch)
        weights |= {(i, name): matrix for name, matrix in convolutions.matrices(layer).items()}
        observed |= {(i, name): pair for name, pair in parts.items()}
        gradients |= {(i, name): np.einsum("knti,knto->kio", a, ghat) for name, (a, ghat) in parts.items()}
        gradients |= {(i, name): gradient for name, gradient in others.items()}
    before = dict(weights)
    simulation.apply(weights, gradients, observed, BATCH)
    small.captured(
        model,
        paper.KFAC(0.1, 0.03, factor_interval=1, inverse_interval=1, kl_clip=None),
        loss=["mse"] * len(each),
    ).train_on_batch(x, y)
    for (i, name), expected in weights.items():
        found = convolutions.matrices(each[i][0])[name]
        close(found - before[i, name], expected - before[i, name], 1e-4)
        close(found, expected, 1e-5)


@pytest.mark.parametrize("split", [1, 2, 1000])
def test_split_blocks_are_those_of_the_factors(split):
    model, each, x, y = branches({name: LAYERS[name] for name in FEW})
    sgd_step(model, paper.THOR(split=split), x, y)
    for layer, *batch in each:
        for name, (a, ghat) in convolutions.results_and_rows(layer, *batch)[1].items():
            statistics = getattr(layer, name)
            found = [np.asarray(v) for v in statistics.averages]
            factors = kronecker.input_factor(a), kronecker.output_factor(ghat, BATCH)
            for factor, parts in zip(factors, statistics.partitions(statistics.geometry), strict=True):
                blocks, found = found[: len(parts)], found[len(parts) :]
                assert diagonal.dimension(parts) == factor.shape[1]
                for part, i, at in slices(parts):
                    assert np.abs(blocks[part][:, i] - factor[:, at, at]).max() <= 1e-5 * np.abs(factor).max()


def test_rows_of_examples():
    model, each, x, y = branches({name: LAYERS[name] for name in FEW})
    sgd_step(model, paper.SNGD(batch_size=BATCH), x, y)
    for layer, *batch in each:
        for name, rows in convolutions.results_and_rows(layer, *batch)[1].items():
            for found, expected in zip(getattr(layer, name).averages, low_rank.example_rows(*rows, BATCH), strict=True):
                close(found, expected, 1e-5)


def test_rows_of_all_positions_are_the_factors():
    """All rows of a batch, drawn by position: of depthwise and transposed convolutions as of others."""
    model, each, x, y = branches({name: LAYERS[name] for name in FEW})
    sgd_step(model, paper.SKFAC(batch_size=BATCH, interval=1, convolution="subsample", positions=64), x, y)
    for layer, *batch in each:
        for name, (a, ghat) in convolutions.results_and_rows(layer, *batch)[1].items():
            statistics = getattr(layer, name)
            assert statistics.batch_rows(statistics.geometry) == 64 * BATCH
            close(statistics.averages[0], kronecker.input_factor(a), 1e-5)
            close(statistics.averages[1], kronecker.output_factor(ghat, BATCH), 1e-5)


@st.composite
def window_cases(draw, largest=4, rank=2):
    rank = draw(st.integers(1, rank))
    kernel = [draw(st.integers(1, largest)) for _ in range(rank)]
    strides = [draw(st.integers(1, 3)) for _ in range(rank)]
    dilation = [draw(st.integers(1, 2)) for _ in range(rank)]
    padding = draw(st.sampled_from(["valid", "same"]))
    return (kernel, strides, dilation, padding), draw(st.booleans()), draw(st.integers(0, 9))


@given(window_cases(), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 4))
def test_depthwise_rows(case, channels, multiplier, use_bias, more):
    window, channels_first, seed = case
    kernel, _, dilation, padding = window
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    x = draw(2, *((r if padding == "valid" else 1) + more for r in reach), channels, seed=seed) + 1
    a = reference.convolution_rows(x, *window, channels)
    outputs = [len(reference.visible_inputs(*axis, padding)) for axis in zip(x.shape[1:-1], *window[:3], strict=True)]
    ds = draw(2, *outputs, channels * multiplier, seed=seed)
    a, ghat = reference.append_ones(a) if use_bias else a, reference.split_filters(ds, channels)
    data_format = "channels_first" if channels_first else "channels_last"
    geometry = DepthwiseGeometry((*kernel, channels, multiplier), use_bias, *window[1:], data_format)
    if channels_first:
        x, ds = np.moveaxis(x, -1, 1), np.moveaxis(ds, -1, 1)
    check_answers(answers(geometry, x, ds), a, ghat)
    assert geometry.outputs(ds) == a.shape[2]


@st.composite
def transposed_cases(draw):
    (kernel, strides, dilation, padding), channels_first, seed = draw(window_cases(3, rank=3))
    if max(strides) > 1:
        dilation = [1] * len(kernel)
    output_padding = None
    if draw(st.booleans()):
        # Of an even reach and `same`, none at all is another convolution's, of one pixel less.
        least = [int(padding == "same" and ((k - 1) * d + 1) % 2 == 0) for k, d in zip(kernel, dilation, strict=True)]
        if all(low < stride for low, stride in zip(least, strides, strict=True)):
            output_padding = [draw(st.integers(low, s - 1)) for low, s in zip(least, strides, strict=True)]
    sizes = [draw(st.integers(1, 3)) for _ in kernel]
    return (kernel, strides, dilation, padding), output_padding, sizes, channels_first, seed


@given(transposed_cases(), st.integers(1, 3), st.integers(1, 2))
def test_transposed_rows(case, channels, filters):
    window, output_padding, sizes, channels_first, seed = case
    kind = {1: layers.Conv1DTranspose, 2: layers.Conv2DTranspose, 3: layers.Conv3DTranspose}[len(sizes)]
    kernel, strides, dilation, padding = window
    plain = kind(filters, kernel, strides, padding, output_padding=output_padding, dilation_rate=dilation)
    x = draw(2, *sizes, channels, seed=seed)
    ds = draw(2, *plain.compute_output_shape(x.shape)[1:], seed=seed)
    a, ghat = reference.dense_rows(x), reference.convolution_rows(ds, *window)
    data_format = "channels_first" if channels_first else "channels_last"
    geometry = TransposedGeometry((*kernel, filters, channels), *window[1:], output_padding, data_format)
    positions = np.random.default_rng(seed).integers(a.shape[2], size=(2, 3)).astype("int32")
    if channels_first:
        x, ds = np.moveaxis(x, -1, 1), np.moveaxis(ds, -1, 1)
    check_answers(answers(geometry, x, ds), a, ghat)
    assert geometry.outputs(ds) == a.shape[2]
    for side, expected in zip(run(lambda *batch: geometry.rows_at(*batch), x, ds, positions), (a, ghat), strict=True):
        expected = np.take_along_axis(expected, positions[None, :, :, None], axis=2)
        np.testing.assert_array_equal(side, expected.reshape(1, 6, -1).astype("float32"))


@pytest.mark.parametrize(("kernel_size", "strides"), [(4, 2), (2, 1), (2, 3)])
@pytest.mark.skipif(not ON_JAX, reason="TensorFlow has no such transposed convolution")
def test_outputs_that_leave_a_pixel_out(kernel_size, strides):
    """An even kernel, `same` and no output padding: Keras on JAX has the last pixel begin where the outputs end."""
    layer = transposed1d(2, kernel_size, strides=strides, padding="same", output_padding=0)
    model = keras.Sequential([keras.Input((4, 3)), layer])
    x, y = draw(BATCH, 4, 3), draw(BATCH, *model.output_shape[1:])
    residual = np.asarray(model(x)) - y
    gradients = sgd_step(model, paper.KFAC(), x, y)
    geometry = layer.statistics.geometry
    a, g = (np.asarray(side) for side in (geometry.input_rows(x), geometry.gradient_rows(2 * residual / residual.size)))
    v = geometry.to_matrix([gradients[layer.kernel.path]])
    close(v, np.einsum("knti,knto->kio", a, g), 1e-5)


def trained(model, x, y, method="kfac", steps=3):
    small.captured(model, small.METHODS[method]())
    for _ in range(steps):
        model.train_on_batch(x, y)
    return model


@pytest.mark.parametrize("method", ["kfac", "thor", "sngd"])
def test_a_depthwise_convolution_is_the_grouped_one(method):
    x, y = draw(8, 5, 4, 3), draw(8, 3, 2, 6)
    depthwise, grouped = depthwise2d(3, depth_multiplier=2), layers.Conv2D(6, 3, groups=3)
    models = [keras.Sequential([keras.Input((5, 4, 3)), layer]) for layer in (depthwise, grouped)]
    grouped.set_weights([np.asarray(depthwise.kernel).reshape(grouped.kernel.shape), np.asarray(depthwise.bias)])
    before = np.asarray(depthwise.kernel)
    for model in models:
        trained(model, x, y, method)
    assert np.abs(np.asarray(depthwise.kernel) - before).max() > 1e-3
    close(np.asarray(depthwise.kernel).reshape(grouped.kernel.shape), np.asarray(grouped.kernel), 1e-5)
    close(np.asarray(depthwise.bias), np.asarray(grouped.bias), 1e-5)


@pytest.mark.parametrize("method", ["kfac", "sngd", "hylo"])
def test_a_transposed_convolution_without_overlaps_is_a_dense_layer_of_pixels(method):
    x, y = draw(8, 3, 2, 5), draw(8, 6, 6, 4)
    transposed = transposed2d(4, (2, 3), strides=(2, 3), use_bias=False)
    dense = layers.Dense(2 * 3 * 4, use_bias=False)
    of_pixels = [dense, layers.Reshape((3, 2, 2, 3, 4)), layers.Permute((1, 3, 2, 4, 5)), layers.Reshape((6, 6, 4))]
    models = [keras.Sequential([keras.Input((3, 2, 5)), *made]) for made in ([transposed], of_pixels)]
    before = convolutions.transposed_matrix(transposed.kernel)
    dense.set_weights([before[0]])
    for model in models:
        trained(model, x, y, method)
    assert np.abs(convolutions.transposed_matrix(transposed.kernel) - before).max() > 1e-3
    close(convolutions.transposed_matrix(transposed.kernel)[0], np.asarray(dense.kernel), 1e-5)


def test_images_of_unknown_size():
    """No sums without patches, which need it."""
    cases = {
        "depthwise": lambda: (depthwise2d(3, padding="same"), (4, 6, 2)),
        "separable": lambda: (separable2d(2, 3, strides=2, padding="same"), (4, 6, 2)),
        "transposed": lambda: (transposed2d(2, 3, strides=2, padding="same"), (2, 3, 3)),
    }
    made = {name: make() for name, make in cases.items()}
    inputs = [keras.Input((None, None, shape[-1])) for _, shape in made.values()]
    found = [layer for layer, _ in made.values()]
    model = keras.Model(inputs, [layer(x) for layer, x in zip(found, inputs, strict=True)])
    x = [draw(BATCH, *shape, seed=i) for i, (_, shape) in enumerate(made.values())]
    y = [draw(*result.shape, seed=50 + i) for i, result in enumerate(model(x))]
    sgd_step(model, paper.KFAC(), x, y)
    for layer, *batch in zip(found, x, y, strict=True):
        for name, (a, ghat) in convolutions.results_and_rows(layer, *batch)[1].items():
            close(getattr(layer, name).averages[0], kronecker.input_factor(a), 1e-5)
            close(getattr(layer, name).averages[1], kronecker.output_factor(ghat, BATCH), 1e-5)


def test_what_the_report_says():
    inputs = keras.Input((4, 4, 2))
    h = separable2d(3, 2, name="separable")(layers.PReLU(name="slopes")(inputs))
    model = keras.Model(inputs, transposed2d(2, 2, name="transposed")(depthwise2d(2, name="depthwise")(h)))
    report = keras_ngd.capture(model, small.kfac())
    assert report.captured == ["separable", "depthwise", "transposed"]
    assert report.not_captured == {"slopes": "not a captured kind"}
    shapes = {entry.layer: entry.shapes for entry in report.layers if entry.captured}
    assert shapes == {
        "separable": ((2, 4, 4), (2, 1, 1), (3, 3), (3, 3)),
        "depthwise": ((3, 5, 5), (3, 1, 1)),
        "transposed": ((3, 3), (8, 8)),
    }
