"""`keras.layers.SeparableConv1D` and `SeparableConv2D` with a probe on what each of their two convolutions makes."""

import keras
from keras import ops

from keras_ngd.layers.captured import Captured, Part, register_kind
from keras_ngd.layers.convolution import ConvolutionGeometry, add_bias
from keras_ngd.layers.depthwise_convolution import DepthwiseGeometry, depthwise
from keras_ngd.layers.learning import learned
from keras_ngd.layers.probe import probe
from keras_ngd.typing import Tensor


class CapturedSeparable(Captured):
    """What the captured separable convolutions share, whatever their number of spatial axes.

    A separable convolution is a depthwise one, which has the strides and no bias, and a pointwise one of what that makes: two
    parts, `statistics` and `pointwise_statistics`.
    """

    def parts(self) -> dict[str, Part]:
        depthwise = DepthwiseGeometry(
            self.depthwise_kernel.shape, False, self.strides, self.dilation_rate, self.padding, self.data_format
        )
        ones = (1,) * self.rank
        pointwise = ConvolutionGeometry(
            self.pointwise_kernel.shape, 1, self.use_bias, ones, ones, "valid", self.data_format
        )
        return {
            "statistics": Part(depthwise, [self.depthwise_kernel]),
            "pointwise_statistics": Part.of(pointwise, self.pointwise_kernel, self.bias),
        }

    def call(self, inputs: Tensor) -> Tensor:
        if self.statistics is None:
            return super().call(inputs)
        between = learned(self._depthwise, inputs, [self.depthwise_kernel], self.statistics)
        between = probe(between, inputs, self.statistics.geometry, self.statistics)
        x = learned(self._pointwise, between, [self.pointwise_kernel, self.bias], self.pointwise_statistics)
        x = probe(x, between, self.pointwise_statistics.geometry, self.pointwise_statistics)
        return x if self.activation is None else self.activation(x)

    def _depthwise(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        return depthwise(self, inputs, kernel)

    def _pointwise(self, between: Tensor, kernel: Tensor, *bias: Tensor) -> Tensor:
        x = ops.conv(between, kernel, strides=1, padding="valid", data_format=self.data_format)
        return add_bias(x, bias[0], self.data_format) if bias else x


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class SeparableConv1D(CapturedSeparable, keras.layers.SeparableConv1D):
    """A `keras.layers.SeparableConv1D` that natural-gradient methods observe; see `keras_ngd.layers.Dense`."""

    plain = keras.layers.SeparableConv1D


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class SeparableConv2D(CapturedSeparable, keras.layers.SeparableConv2D):
    """A `keras.layers.SeparableConv2D` that natural-gradient methods observe; see `keras_ngd.layers.Dense`."""

    plain = keras.layers.SeparableConv2D
