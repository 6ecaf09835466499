"""Rows of each layer kind, by explicit loops."""

import itertools

import numpy as np


def dense_rows(x):
    """Rows of a dense layer's input (or gradient) `[n, ..., d]`."""
    x = np.asarray(x, "float64")
    return x.reshape(1, len(x), -1, x.shape[-1])


def visible_inputs(size, kernel, stride, dilation, padding):
    """For each output of one axis, the input that each kernel element sees; negative or too large in the padding."""
    reach = (kernel - 1) * dilation + 1
    if padding == "valid":
        outputs, before = (size - reach) // stride + 1, 0
    else:
        outputs = -(-size // stride)
        missing = max((outputs - 1) * stride + reach - size, 0)
        before = reach - 1 if padding == "causal" else missing // 2
    return [[y * stride + p * dilation - before for p in range(kernel)] for y in range(outputs)]


def convolution_rows(x, kernel, strides, dilation, padding, groups=1):
    """Rows of a convolution's input `[n, *sizes, channels]`: patches, kernel position slowest, channel fastest."""
    x = np.asarray(x, "float64")
    sizes, channels = x.shape[1:-1], x.shape[-1] // groups
    axes = [visible_inputs(*axis, padding) for axis in zip(sizes, kernel, strides, dilation, strict=True)]
    rows = []
    for seen in itertools.product(*axes):
        patch = []
        for position in itertools.product(*seen):
            inside = all(0 <= p < size for p, size in zip(position, sizes, strict=True))
            patch.append(x[(slice(None), *position)] if inside else np.zeros((len(x), x.shape[-1])))
        rows.append(np.stack(patch, axis=1))
    rows = np.stack(rows, axis=1)  # [n, outputs, kernel positions, all channels]
    rows = rows.reshape(*rows.shape[:-1], groups, channels)
    return np.moveaxis(rows, 3, 0).reshape(groups, len(x), rows.shape[1], -1)


def split_filters(s, groups=1):
    """Rows of what a convolution puts out (or its gradient), `[n, *outputs, filters]`."""
    s = np.asarray(s, "float64")
    return np.moveaxis(s.reshape(len(s), -1, groups, s.shape[-1] // groups), 2, 0)


def join_filters(rows, outputs):
    """The inverse of `split_filters`."""
    groups, examples, _, filters = rows.shape
    return np.moveaxis(rows, 0, 2).reshape(examples, *outputs, groups * filters)


def append_ones(rows):
    return np.concatenate([rows, np.ones_like(rows[..., :1])], axis=-1)


def weight_matrix(kernel, bias, groups=1):
    """Kernel and bias as `[groups, input_dim, output_dim]`, the bias last."""
    kernel = np.asarray(kernel, "float64")
    filters = kernel.shape[-1] // groups
    blocks = []
    for k in range(groups):
        block = kernel[..., k * filters : (k + 1) * filters].reshape(-1, filters)
        if bias is not None:
            block = np.concatenate([block, np.asarray(bias, "float64")[None, k * filters : (k + 1) * filters]])
        blocks.append(block)
    return np.stack(blocks)


def layer_rows(layer, x):
    """Rows of a Keras layer's input, ones included."""
    x = np.asarray(x, "float64")
    if not hasattr(layer, "kernel_size"):
        rows = dense_rows(x)
    else:
        if layer.data_format == "channels_first":
            x = np.moveaxis(x, 1, -1)
        rows = convolution_rows(x, layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding, layer.groups)
    return append_ones(rows) if layer.use_bias else rows


def layer_gradient_rows(layer, ds):
    """Rows of the gradient of a Keras layer's pre-activation (or of the pre-activation itself)."""
    if not hasattr(layer, "kernel_size"):
        return dense_rows(ds)
    if layer.data_format == "channels_first":
        ds = np.moveaxis(ds, 1, -1)
    return split_filters(ds, layer.groups)


def layer_matrix(layer):
    """A Keras layer's kernel and bias as one matrix per group."""
    bias = np.asarray(layer.bias) if layer.use_bias else None
    return weight_matrix(np.asarray(layer.kernel), bias, getattr(layer, "groups", 1))
