"""The rows of every layer kind, against loops in float64 and against Keras's own layers."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_ngd.layers.convolution import ConvolutionGeometry
from keras_ngd.layers.dense import DenseGeometry
from tf_tests.reference import kronecker
from tf_tests.reference import rows as reference
from tf_tests.reference.running import close, run


@st.composite
def dense_cases(draw):
    shape = [draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 5))]
    return shape, draw(st.integers(1, 4)), draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 9))


@st.composite
def convolution_cases(draw):
    rank = draw(st.integers(1, 3))
    largest = {1: 5, 2: 4, 3: 2}[rank]
    kernel = [draw(st.integers(1, largest)) for _ in range(rank)]
    # Keras refuses strides together with dilation.
    strides, dilation = [1] * rank, [1] * rank
    if draw(st.booleans()):
        strides = [draw(st.integers(1, 3)) for _ in range(rank)]
    elif draw(st.booleans()):
        dilation = [draw(st.integers(1, 2)) for _ in range(rank)]
    padding = draw(st.sampled_from(["valid", "same", "causal"] if rank == 1 else ["valid", "same"]))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = [draw(st.integers(r if padding == "valid" else 1, r + 3)) for r in reach]
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels, filters = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    return {
        "x_shape": [draw(st.integers(1, 3)), *sizes, channels],
        "filters": filters,
        "kernel": kernel,
        "strides": strides,
        "dilation": dilation,
        "padding": padding,
        "groups": groups,
        "use_bias": draw(st.booleans()),
        "channels_first": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
    }


def answers(geometry, x, ds, mask=None):
    """Everything a geometry answers about one batch."""

    def ask(x, ds, *mask):
        return (
            geometry.input_second_moment(x, *mask),
            geometry.input_means(x, *mask),
            geometry.gradient_second_moment(ds),
            geometry.gradient_sums(ds),
        )

    return run(ask, x, ds, *([] if mask is None else [mask]))


def check_answers(found, a, ghat, mask=None):
    second_moment, means, gradient_moment, gradient_sums = found
    mask = np.ones(a.shape[1:3]) if mask is None else mask
    close(second_moment, kronecker.input_factor(a, "expand", mask), 1e-5)
    close(means, np.einsum("knti,nt->kni", a, mask) / mask.sum(axis=1)[None, :, None], 1e-5)
    close(gradient_moment, np.einsum("kntp,kntq->kpq", ghat, ghat), 1e-5)
    close(gradient_sums, ghat.sum(axis=2), 1e-5)


@given(dense_cases())
def test_dense_rows(case):
    shape, units, use_bias, masked, seed = case
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype("float32")
    ds = rng.standard_normal((*shape[:-1], units)).astype("float32")
    a, mask = reference.dense_rows(x), None
    if masked:
        mask = rng.random((shape[0], a.shape[2])) < 0.5
        mask[:, 0] = True
    found = answers(
        DenseGeometry(shape[-1], units, use_bias), x, ds, mask if mask is None else mask.reshape(shape[:-1])
    )
    check_answers(found, reference.append_ones(a) if use_bias else a, reference.dense_rows(ds), mask)


def convolution_batch(case):
    """A case's geometry, its batch `(x, ds)` in its data format, and its rows `(a, ghat)` by the reference."""
    rng = np.random.default_rng(case["seed"])
    kernel_shape = (*case["kernel"], case["x_shape"][-1] // case["groups"], case["filters"])
    window = case["kernel"], case["strides"], case["dilation"], case["padding"]
    x = rng.standard_normal(case["x_shape"]).astype("float32")
    a = reference.convolution_rows(x, *window, case["groups"])
    outputs = [
        len(reference.visible_inputs(*axis, case["padding"])) for axis in zip(x.shape[1:-1], *window[:3], strict=True)
    ]
    ds = rng.standard_normal((len(x), *outputs, case["filters"])).astype("float32")
    ghat = reference.split_filters(ds, case["groups"])
    if case["use_bias"]:
        a = reference.append_ones(a)
    data_format = "channels_last"
    if case["channels_first"]:
        x, ds, data_format = np.moveaxis(x, -1, 1), np.moveaxis(ds, -1, 1), "channels_first"
    geometry = ConvolutionGeometry(
        kernel_shape,
        case["groups"],
        case["use_bias"],
        case["strides"],
        case["dilation"],
        case["padding"],
        data_format,
    )
    return geometry, (x, ds), (a, ghat)


@given(convolution_cases())
def test_convolution_rows(case):
    geometry, batch, (a, ghat) = convolution_batch(case)
    assert (geometry.groups, geometry.input_dim, geometry.output_dim) == (case["groups"], a.shape[-1], ghat.shape[-1])
    check_answers(answers(geometry, *batch), a, ghat)


@given(convolution_cases())
def test_convolution_rows_at_some_positions(case):
    """Rows of `a` and `g` at the same positions, other ones of each example."""
    geometry, (x, ds), (a, ghat) = convolution_batch(case)
    examples, outputs = a.shape[1:3]
    assert geometry.outputs(ds) == outputs
    positions = np.random.default_rng(case["seed"]).integers(outputs, size=(examples, 3)).astype("int32")
    found = run(lambda *batch: geometry.rows_at(*batch), x, ds, positions)
    for side, expected in zip(found, (a, ghat), strict=True):
        expected = np.take_along_axis(expected, positions[None, :, :, None], axis=2)
        expected = expected.reshape(case["groups"], 3 * examples, -1).astype("float32")
        np.testing.assert_array_equal(side, expected)


@given(convolution_cases())
def test_kernel_and_bias_are_one_matrix(case):
    rng = np.random.default_rng(case["seed"])
    kernel = rng.standard_normal((*case["kernel"], case["x_shape"][-1] // case["groups"], case["filters"]))
    bias = rng.standard_normal(case["filters"]) if case["use_bias"] else None
    geometry = ConvolutionGeometry(
        kernel.shape, case["groups"], case["use_bias"], case["strides"], case["dilation"], "same", "channels_last"
    )
    kernel, bias = kernel.astype("float32"), None if bias is None else bias.astype("float32")
    given_tensors = [kernel] if bias is None else [kernel, bias]
    matrix = run(lambda *parameters: geometry.to_matrix(parameters), *given_tensors)
    np.testing.assert_array_equal(matrix, reference.weight_matrix(kernel, bias, case["groups"]).astype("float32"))
    back = run(geometry.from_matrix, matrix)
    assert len(back) == len(given_tensors)
    for tensor, original in zip(back, given_tensors, strict=True):
        np.testing.assert_array_equal(tensor, original)


LAYERS = {
    "dense": (keras.layers.Dense, {"units": 3}, (4, 5)),
    "conv1d_causal_strided": (keras.layers.Conv1D, {"kernel_size": 3, "strides": 2, "padding": "causal"}, (7, 2)),
    "conv1d_causal_dilated": (keras.layers.Conv1D, {"kernel_size": 3, "dilation_rate": 2, "padding": "causal"}, (7, 2)),
    "conv2d_same_even": (keras.layers.Conv2D, {"kernel_size": (2, 4), "padding": "same"}, (5, 6, 2)),
    "conv2d_same_strided": (keras.layers.Conv2D, {"kernel_size": 3, "strides": (2, 3), "padding": "same"}, (6, 7, 2)),
    "conv2d_grouped": (keras.layers.Conv2D, {"kernel_size": 3, "groups": 2, "padding": "same"}, (5, 4, 4)),
    "conv2d_dilated": (keras.layers.Conv2D, {"kernel_size": 3, "dilation_rate": 2, "padding": "same"}, (6, 5, 2)),
    "conv3d": (keras.layers.Conv3D, {"kernel_size": (1, 2, 3), "strides": 2, "padding": "same"}, (4, 3, 5, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_reference_rows_times_weights_are_the_layer(name):
    """Anchors the loops: with wrong rows, what comes out would not be what Keras computes."""
    kind, arguments, shape = LAYERS[name]
    layer = kind(**({"filters": 4} | arguments if "units" not in arguments else arguments), bias_initializer="normal")
    layer.build((None, *shape))
    x = np.random.default_rng(0).standard_normal((3, *shape)).astype("float32")
    expected = reference.layer_rows(layer, x) @ reference.layer_matrix(layer)[:, None]
    close(reference.layer_gradient_rows(layer, run(layer, x)), expected, 1e-5)
