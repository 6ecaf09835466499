"""`keras.layers.DepthwiseConv1D` and `DepthwiseConv2D` with a probe on their pre-activations."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd.layers.captured import Captured, Part, register_kind
from keras_ngd.layers.convolution import ConvolutionGeometry, add_bias
from keras_ngd.layers.learning import learned
from keras_ngd.layers.probe import probe
from keras_ngd.linalg import channel_patches, diagonal, patches
from keras_ngd.typing import Parts, Tensor


class DepthwiseGeometry(ConvolutionGeometry):
    """Rows of a depthwise convolution: those of the grouped one that has a group for each channel.

    Each channel is a block of its own, of the kernel positions by the depth multiplier, and all blocks are one batch. Of the
    input's side they are computed without the patches, wherever `channel_patches` applies.
    """

    def __init__(
        self,
        kernel_shape: Sequence[int],
        use_bias: bool,
        strides: Sequence[int],
        dilation: Sequence[int],
        padding: str,
        data_format: str,
    ) -> None:
        *kernel, channels, multiplier = kernel_shape
        super().__init__(
            (*kernel, 1, channels * multiplier), channels, use_bias, strides, dilation, padding, data_format
        )
        self.kernel_shape = tuple(kernel_shape)

    def input_second_moment(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        if not channel_patches.applies(x):
            return super().input_second_moment(x, weights)
        x = self._channels_last(x)
        sums = self._by_channel(ops.sum(x, axis=0, keepdims=True)) if self.use_bias else None
        count = self._row_count(x)
        return self._with_bias(channel_patches.channel_grams(x, *self._window), sums, count) / count

    def _inner_blocks(self, x: Tensor, parts: Parts, weights: Tensor | None) -> tuple[list[Tensor], Tensor]:
        if not channel_patches.applies(x):
            return super()._inner_blocks(x, parts, weights)
        x = self._channels_last(x)
        if parts == ((self.width, 1),):
            squares = self._by_channel(ops.sum(ops.square(x), axis=0, keepdims=True))
            return [ops.reshape(squares, (self.groups, self.width, 1, 1))], self._row_count(x)
        return diagonal.blocks_of(channel_patches.channel_grams(x, *self._window), parts), self._row_count(x)

    def _by_channel(self, total: Tensor) -> Tensor:
        """Sums of the patches of `[1, *sizes, channels]`, `[channels, width]`."""
        return ops.transpose(patches.patch_sums(total, *self._window)[0][0])

    def gradient_second_moment(self, ds: Tensor) -> Tensor:
        if self.output_dim > 1:
            return super().gradient_second_moment(ds)
        # One output for each channel: no product of matrices, and nothing to be transposed for one.
        ds = ops.square(self._channels_last(ds))
        return ops.reshape(ops.sum(ds, axis=tuple(range(len(ds.shape) - 1))), (self.groups, 1, 1))

    def gradient_blocks(self, ds: Tensor, parts: Parts) -> list[Tensor]:
        if self.output_dim > 1:
            return super().gradient_blocks(ds, parts)
        return [ops.expand_dims(self.gradient_second_moment(ds), 1)]


def depthwise(layer: Any, inputs: Tensor, kernel: Tensor) -> Tensor:
    """The depthwise convolution of a layer, with its strides, padding and so on, by this kernel of it."""
    return ops.depthwise_conv(
        inputs,
        kernel,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )


class CapturedDepthwise(Captured):
    """What the captured depthwise convolutions share, whatever their number of spatial axes."""

    def parts(self) -> dict[str, Part]:
        geometry = DepthwiseGeometry(
            self.kernel.shape, self.use_bias, self.strides, self.dilation_rate, self.padding, self.data_format
        )
        return {"statistics": Part.of(geometry, self.kernel, self.bias)}

    def call(self, inputs: Tensor) -> Tensor:
        if self.statistics is None:
            return super().call(inputs)
        x = learned(self._pre_activation, inputs, [self.kernel, self.bias], self.statistics)
        x = probe(x, inputs, self.statistics.geometry, self.statistics)
        return x if self.activation is None else self.activation(x)

    def _pre_activation(self, inputs: Tensor, kernel: Tensor, *bias: Tensor) -> Tensor:
        x = depthwise(self, inputs, kernel)
        return add_bias(x, bias[0], self.data_format) if bias else x


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class DepthwiseConv1D(CapturedDepthwise, keras.layers.DepthwiseConv1D):
    """A `keras.layers.DepthwiseConv1D` that natural-gradient methods observe; see `keras_ngd.layers.Dense`."""

    plain = keras.layers.DepthwiseConv1D


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class DepthwiseConv2D(CapturedDepthwise, keras.layers.DepthwiseConv2D):
    """A `keras.layers.DepthwiseConv2D` that natural-gradient methods observe; see `keras_ngd.layers.Dense`."""

    plain = keras.layers.DepthwiseConv2D
