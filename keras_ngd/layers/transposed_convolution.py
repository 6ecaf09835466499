"""`keras.layers.Conv1DTranspose`, `Conv2DTranspose` and `Conv3DTranspose` with a probe on what their kernels make."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd.layers.captured import Captured, Part, register_kind
from keras_ngd.layers.contract import gives
from keras_ngd.layers.convolution import add_bias
from keras_ngd.layers.geometry import CHOSEN_ROWS, MatrixGeometry, by_position
from keras_ngd.layers.learning import learned
from keras_ngd.layers.probe import probe
from keras_ngd.linalg import patches
from keras_ngd.typing import Shape, Tensor


class TransposedGeometry(MatrixGeometry):
    """Rows of a transposed convolution: one per example and input pixel.

    An input pixel `i` adds `K_p^T a_i` to the output `i strides + p dilation - before` of each kernel position `p`, hence

        V = sum over i of a_i g_i^T,   a_i the pixel's channels,   g_i the gradients of all outputs that it adds to,

    and these are the patches of the convolution that is transposed: `V` is `[1, channels, prod(kernel) * filters]`. What lies
    beyond the outputs is dropped, and has no gradient. The bias is added where the pixels' contributions were summed, so it is no
    row of `V`, and follows the rule of the rest.

    Args:
        kernel_shape: `[*kernel, filters, channels]`.
        strides, dilation, padding: of the convolution that is transposed; `padding` is `"valid"` or `"same"`.
        output_padding: the layer's, by axis; None for as many outputs as the strides say.
        data_format: `"channels_last"` or `"channels_first"`.
    """

    def __init__(
        self,
        kernel_shape: Sequence[int],
        strides: Sequence[int],
        dilation: Sequence[int],
        padding: str,
        output_padding: Sequence[int] | None,
        data_format: str,
    ) -> None:
        *kernel, filters, channels = kernel_shape
        super().__init__(1, channels, math.prod(kernel) * filters, False, kernel_shape)
        self.kernel, self.strides, self.dilation = tuple(kernel), tuple(strides), tuple(dilation)
        extra = [None] * len(kernel) if output_padding is None else output_padding
        axes = zip(self.kernel, self.strides, self.dilation, extra, strict=True)
        self.margins = tuple(_margins(*axis, padding) for axis in axes)
        self.channels_first = data_format == "channels_first"

    def kernel_to_matrix(self, kernel: Tensor) -> Tensor:
        return ops.expand_dims(ops.transpose(ops.reshape(kernel, (self.output_dim, self.width))), 0)

    def kernel_from_matrix(self, matrix: Tensor) -> Tensor:
        return ops.reshape(ops.transpose(matrix[0]), self.kernel_shape)

    def _channels_last(self, x: Tensor) -> Tensor:
        return patches.channels_last(x) if self.channels_first else x

    def input_rows(self, x: Tensor) -> Tensor:
        return by_position(self._channels_last(x), self.width)

    def gradient_rows(self, ds: Tensor) -> Tensor:
        unfolded = patches.unfold(self._seen(ds), *self._window)
        return by_position(unfolded, self.output_dim)

    def gradient_sums(self, ds: Tensor) -> Tensor:
        sums, _ = patches.patch_sums(self._seen(ds), *self._window)
        return ops.reshape(sums, (1, -1, self.output_dim))

    def outputs(self, ds: Tensor) -> Any:
        """Number of rows of an example, that of its pixels, from the gradient of what comes out: an int, or a tensor."""
        return math.prod(self._pixels(self._channels_last(ds)))

    @gives(CHOSEN_ROWS)
    def rows_at(self, x: Tensor, ds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `a` and `g` of some pixels: `[1, n * p, dim]` for the flat positions `[n, p]`."""
        x = self._channels_last(x)
        a = ops.take_along_axis(
            ops.reshape(x, (ops.shape(x)[0], -1, self.width)), ops.expand_dims(positions, 2), axis=1
        )
        g = patches.patches_at(self._seen(ds), positions, *self._window)
        return ops.reshape(a, (1, -1, self.width)), ops.reshape(g, (1, -1, self.output_dim))

    @property
    def _window(self) -> tuple[Shape, Shape, Shape, str]:
        return self.kernel, self.strides, self.dilation, "valid"

    def _pixels(self, ds: Tensor) -> list[Any]:
        """The sizes of the input's spatial axes, from a gradient `[n, *sizes, filters]`."""
        axes = zip(patches.spatial_sizes(ds), self.strides, self.margins, strict=True)
        return [(size - last) // stride + 1 for size, stride, (_, last) in axes]

    def _seen(self, ds: Tensor) -> Tensor:
        """The gradient with zeros around it, so that it has one whole window for each pixel."""
        ds = self._channels_last(ds)
        widths = []
        for size, pixels, kernel, stride, dilation, (before, _) in zip(
            patches.spatial_sizes(ds),
            self._pixels(ds),
            self.kernel,
            self.strides,
            self.dilation,
            self.margins,
            strict=True,
        ):
            missing = (pixels - 1) * stride + (kernel - 1) * dilation + 1 - before - size
            widths.append((before, patches.at_least_zero(missing)))
        return ops.pad(ds, [(0, 0), *widths, (0, 0)])


def _margins(kernel: int, stride: int, dilation: int, extra: int | None, padding: str) -> tuple[int, int]:
    """Of one axis: how far the first pixel's window begins before the outputs, and at which output these end counted from
    where the last pixel's stride begins.

    `stride (pixels - 1) + end` is the number of outputs, as Keras has it.
    """
    reach = (kernel - 1) * dilation + 1
    if padding == "valid":
        return 0, max(reach, stride) if extra is None else reach + extra
    end = stride if extra is None else reach % 2 + extra
    return max(reach - end, 0) // 2, end


class CapturedTransposed(Captured):
    """What the captured transposed convolutions share, whatever their number of spatial axes. Biases are left to the rest."""

    rows_of = "input"

    def parts(self) -> dict[str, Part]:
        geometry = TransposedGeometry(
            self.kernel.shape,
            self.strides,
            self.dilation_rate,
            self.padding,
            self.output_padding,
            self.data_format,
        )
        return {"statistics": Part(geometry, [self.kernel])}

    def call(self, inputs: Tensor) -> Tensor:
        if self.statistics is None:
            return super().call(inputs)
        x = learned(self._transposed, inputs, [self.kernel], self.statistics)
        x = probe(x, inputs, self.statistics.geometry, self.statistics)
        if self.use_bias:
            x = learned(self._with_bias, x, [self.bias], self.statistics)
        return x if self.activation is None else self.activation(x)

    def _transposed(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        return ops.conv_transpose(
            inputs,
            kernel,
            strides=list(self.strides),
            padding=self.padding,
            output_padding=self.output_padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )

    def _with_bias(self, x: Tensor, bias: Tensor) -> Tensor:
        return add_bias(x, bias, self.data_format)


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class Conv1DTranspose(CapturedTransposed, keras.layers.Conv1DTranspose):
    """A `keras.layers.Conv1DTranspose` that natural-gradient methods observe; see `keras_ngd.layers.Dense`."""

    plain = keras.layers.Conv1DTranspose


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class Conv2DTranspose(CapturedTransposed, keras.layers.Conv2DTranspose):
    """A `keras.layers.Conv2DTranspose` that natural-gradient methods observe; see `keras_ngd.layers.Dense`."""

    plain = keras.layers.Conv2DTranspose


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class Conv3DTranspose(CapturedTransposed, keras.layers.Conv3DTranspose):
    """A `keras.layers.Conv3DTranspose` that natural-gradient methods observe; see `keras_ngd.layers.Dense`."""

    plain = keras.layers.Conv3DTranspose
