"""Depthwise, separable and transposed convolutions and their rows, by explicit loops."""

import keras
import numpy as np

from tf_tests.reference import rows


def activated(layer, s):
    """What a Keras layer's activation makes of `s`, and its derivative there."""
    if layer.activation is keras.activations.tanh:
        return np.tanh(s), 1 - np.tanh(s) ** 2
    assert layer.activation is keras.activations.linear
    return s, np.ones_like(s)


def squared_error(layer, s, y):
    """Gradient by the pre-activation `s` of the mean squared error of what a layer makes of it."""
    values, slope = activated(layer, s)
    return 2 * (values - np.asarray(y, "float64")) * slope / s.size


def depthwise_matrix(kernel, bias=None):
    """Kernel `[*kernel, channels, multiplier]` and bias as a matrix for each channel, the bias last."""
    kernel = np.asarray(kernel, "float64")
    channels, multiplier = kernel.shape[-2:]
    blocks = []
    for c in range(channels):
        block = kernel[..., c, :].reshape(-1, multiplier)
        if bias is not None:
            offset = np.asarray(bias, "float64")[c * multiplier : (c + 1) * multiplier]
            block = np.concatenate([block, offset[None]])
        blocks.append(block)
    return np.stack(blocks)


def transposed_matrix(kernel):
    """Kernel `[*kernel, filters, channels]` as `[1, channels, prod(kernel) * filters]`."""
    kernel = np.asarray(kernel, "float64")
    columns = [kernel[position] for position in np.ndindex(kernel.shape[:-2])]
    return np.concatenate(columns).T[None]


def transposed(x, kernel, strides, dilation, padding, outputs):
    """A transposed convolution: every pixel adds to the outputs that the convolution's window at it would see."""
    x, kernel = np.asarray(x, "float64"), np.asarray(kernel, "float64")
    axes = [rows.visible_inputs(*axis, padding) for axis in zip(outputs, kernel.shape, strides, dilation, strict=False)]
    result = np.zeros((len(x), *outputs, kernel.shape[-2]))
    assert [len(axis) for axis in axes] == list(x.shape[1:-1])
    for pixel in np.ndindex(x.shape[1:-1]):
        seen = [axis[i] for axis, i in zip(axes, pixel, strict=True)]
        for position in np.ndindex(kernel.shape[:-2]):
            at = tuple(window[p] for window, p in zip(seen, position, strict=True))
            if all(0 <= i < size for i, size in zip(at, outputs, strict=True)):
                result[(slice(None), *at)] += x[(slice(None), *pixel)] @ kernel[position].T
    return result


def window(layer):
    return layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding


def matrices(layer):
    """A Keras layer's weights by part, and what belongs to none."""
    bias = np.asarray(layer.bias, "float64") if layer.use_bias else None
    if hasattr(layer, "pointwise_kernel"):
        return {
            "statistics": depthwise_matrix(layer.depthwise_kernel),
            "pointwise_statistics": rows.weight_matrix(layer.pointwise_kernel, bias),
        }
    if hasattr(layer, "depth_multiplier"):
        return {"statistics": depthwise_matrix(layer.kernel, bias)}
    return {"statistics": transposed_matrix(layer.kernel)} | ({} if bias is None else {"bias": bias})


def results_and_rows(layer, x, y):
    """What a Keras layer makes of `x`; by part, `(a, ghat)` of the mean squared error to `y`; gradients of what is in no part.

    `x`, `y` and results are in the layer's data format.
    """
    x, y = np.asarray(x, "float64"), np.asarray(y, "float64")
    if layer.data_format == "channels_first":
        results, *others = _results_and_rows(layer, np.moveaxis(x, 1, -1), np.moveaxis(y, 1, -1))
        return np.moveaxis(results, -1, 1), *others
    return _results_and_rows(layer, x, y)


def _results_and_rows(layer, x, y):
    outputs, weights = y.shape[1:-1], matrices(layer)
    if not hasattr(layer, "depth_multiplier"):
        s = transposed(x, layer.kernel, *window(layer)[1:], outputs) + weights.get("bias", 0.0)
        ds = squared_error(layer, s, y)
        ghat = rows.convolution_rows(ds, *window(layer))
        bias = {"bias": ds.sum(axis=tuple(range(ds.ndim - 1)))} if layer.use_bias else {}
        return activated(layer, s)[0], {"statistics": (rows.dense_rows(x), ghat)}, bias
    channels = x.shape[-1]
    a = rows.convolution_rows(x, *window(layer), channels)
    if not hasattr(layer, "pointwise_kernel"):
        a = rows.append_ones(a) if layer.use_bias else a
        s = rows.join_filters(a @ weights["statistics"][:, None], outputs)
        ghat = rows.split_filters(squared_error(layer, s, y), channels)
        return activated(layer, s)[0], {"statistics": (a, ghat)}, {}
    between = rows.join_filters(a @ weights["statistics"][:, None], outputs)
    pixels = rows.dense_rows(between)
    pixels = rows.append_ones(pixels) if layer.use_bias else pixels
    pointwise = weights["pointwise_statistics"]
    s = (pixels @ pointwise[:, None])[0].reshape(y.shape)
    ds = squared_error(layer, s, y)
    upstream = ds @ pointwise[0, : between.shape[-1]].T
    parts = {
        "statistics": (a, rows.split_filters(upstream, channels)),
        "pointwise_statistics": (pixels, rows.dense_rows(ds)),
    }
    return activated(layer, s)[0], parts, {}
