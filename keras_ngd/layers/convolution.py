"""`keras.layers.Conv1D`, `Conv2D` and `Conv3D` with a probe on their pre-activations."""

import keras
from keras import ops

from keras_ngd import keras_private
from keras_ngd.layers.captured import Captured
from keras_ngd.layers.probe import probe
from keras_ngd.layers.rows import ConvolutionRows, Rows
from keras_ngd.typing import Tensor


class CapturedConvolution(Captured):
    """What the captured convolutions share, whatever their number of spatial axes."""

    def _rows(self) -> Rows:
        return ConvolutionRows(
            keras_private.kernel_of(self).shape,
            self.groups,
            self.use_bias,
            self.strides,
            self.dilation_rate,
            self.padding,
            self.data_format,
        )

    def call(self, inputs: Tensor) -> Tensor:
        if self.statistics is None:
            return super().call(inputs)
        x = self._convolve(inputs)
        if self.use_bias:
            channels_last = self.data_format == "channels_last"
            ones = (1,) * self.rank
            x = ops.add(x, ops.reshape(self.bias, (1, *ones, -1) if channels_last else (1, -1, *ones)))
        x = probe(x, inputs, self.statistics.rows, self.statistics)
        return x if self.activation is None else self.activation(x)

    def _convolve(self, inputs: Tensor) -> Tensor:
        return self.convolution_op(inputs, self.kernel)


@keras.saving.register_keras_serializable("keras_ngd")
class Conv1D(CapturedConvolution, keras.layers.Conv1D):
    """A `keras.layers.Conv1D` that natural-gradient methods observe; see `keras_ngd.layers.Dense`."""

    plain = keras.layers.Conv1D

    def _convolve(self, inputs: Tensor) -> Tensor:
        if self.padding != "causal":
            return self.convolution_op(inputs, self.kernel)
        return ops.conv(
            ops.pad(inputs, keras_private.causal_padding(self)),
            self.kernel,
            strides=list(self.strides),
            padding="valid",
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


@keras.saving.register_keras_serializable("keras_ngd")
class Conv2D(CapturedConvolution, keras.layers.Conv2D):
    """A `keras.layers.Conv2D` that natural-gradient methods observe; see `keras_ngd.layers.Dense`."""

    plain = keras.layers.Conv2D


@keras.saving.register_keras_serializable("keras_ngd")
class Conv3D(CapturedConvolution, keras.layers.Conv3D):
    """A `keras.layers.Conv3D` that natural-gradient methods observe; see `keras_ngd.layers.Dense`."""

    plain = keras.layers.Conv3D
