"""`keras.layers.Conv1D`, `Conv2D` and `Conv3D` with a probe on their pre-activations."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd import keras_private
from keras_ngd.layers.captured import Captured, Part, register_kind
from keras_ngd.layers.contract import gives
from keras_ngd.layers.geometry import CHOSEN_ROWS, MatrixGeometry, gram
from keras_ngd.layers.learning import learned
from keras_ngd.layers.probe import probe
from keras_ngd.linalg import diagonal, patch_blocks, patch_gram, patches
from keras_ngd.typing import Parts, Shape, Tensor


class ConvolutionGeometry(MatrixGeometry):
    """Rows of a convolution: one per example and output position, each the patch that the kernel sees there.

    A grouped convolution is `groups` independent blocks: each sees its own input channels and makes its own outputs.
    """

    def __init__(
        self,
        kernel_shape: Sequence[int],
        groups: int,
        use_bias: bool,
        strides: Sequence[int],
        dilation: Sequence[int],
        padding: str,
        data_format: str,
    ) -> None:
        *kernel, channels, filters = kernel_shape
        super().__init__(groups, math.prod(kernel) * channels, filters // groups, use_bias, kernel_shape)
        self.kernel, self.channels = tuple(kernel), channels
        self.strides, self.dilation, self.padding = tuple(strides), tuple(dilation), padding
        self.channels_first = data_format == "channels_first"

    @property
    def _window(self) -> tuple[Shape, Shape, Shape, str]:
        return self.kernel, self.strides, self.dilation, self.padding

    def _channels_last(self, x: Tensor) -> Tensor:
        return patches.channels_last(x) if self.channels_first else x

    def input_second_moment(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        x, sums = self._channels_last(x), None
        if self.groups == 1 and patches.prefers_displacements(x, *self._window):
            products = ops.expand_dims(patch_gram.patch_gram(x, self.kernel, self.padding), 0)
            if self.use_bias:
                total = ops.sum(x, axis=0, keepdims=True)
                sums = ops.reshape(patches.patch_sums(total, *self._window)[0], (1, self.width))
            count = self._row_count(x)
        else:
            rows = self._unfolded(x)
            products, count = gram(rows), ops.cast(ops.shape(rows)[1], rows.dtype)
            sums = ops.sum(rows, axis=1)
        return self._with_bias(products, sums, count) / count

    def _row_count(self, x: Tensor) -> Tensor:
        outputs = math.prod(
            patches.pad_and_crop_sizes(*axis, self.padding)[2]
            for axis in zip(x.shape[1:-1], *self._window[:3], strict=True)
        )
        return ops.cast(ops.shape(x)[0] * outputs, x.dtype)

    def _inner_blocks(self, x: Tensor, parts: Parts, weights: Tensor | None) -> tuple[list[Tensor], Tensor]:
        x = self._channels_last(x)
        if self.groups == 1:
            if parts == ((self.width, 1),):
                total = ops.sum(ops.square(x), axis=0, keepdims=True)
                sums, outputs = patches.patch_sums(total, *self._window)
                return [ops.reshape(sums, (1, -1, 1, 1))], ops.cast(ops.shape(x)[0] * outputs, x.dtype)
            if patches.prefers_displacements(x, *self._window):
                return patch_blocks.patch_gram_blocks(x, self.kernel, self.padding, parts), self._row_count(x)
        rows = self._unfolded(x)
        return diagonal.gram_blocks(rows, parts), ops.cast(ops.shape(rows)[1], rows.dtype)

    def _unfolded(self, x: Tensor) -> Tensor:
        """Rows without the one, `[groups, examples * outputs, width]`."""
        if max(self.kernel) == 1 and self.groups == 1:
            window = (slice(None), *(slice(None, None, s) for s in self.strides))
            return ops.reshape(x[window], (1, -1, self.width))
        return self._by_group(patches.unfold(x, *self._window))

    def _by_group(self, unfolded: Tensor) -> Tensor:
        """Patches `[examples, ..., prod(kernel), channels of all groups]` as rows."""
        if self.groups == 1:
            return ops.reshape(unfolded, (1, -1, self.width))
        positions = math.prod(self.kernel)
        unfolded = ops.reshape(unfolded, (-1, positions, self.groups, self.channels))
        return ops.reshape(ops.transpose(unfolded, (2, 0, 1, 3)), (self.groups, -1, self.width))

    def outputs(self, ds: Tensor) -> Any:
        """Number of output positions, from the gradient of what comes out: an int, or a tensor where it is not static."""
        return math.prod(patches.spatial_sizes(self._channels_last(ds)))

    @gives(CHOSEN_ROWS)
    def rows_at(self, x: Tensor, ds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `a` and `g` of some output positions: `[groups, n * p, dim]` for the flat positions `[n, p]`."""
        x, ds = self._channels_last(x), self._channels_last(ds)
        a = self._append_ones(self._by_group(patches.patches_at(x, positions, *self._window)))
        total = math.prod(patches.spatial_sizes(ds))
        first = ops.cast(ops.arange(ops.shape(ds)[0]) * total, positions.dtype)
        g = ops.take(ops.reshape(ds, (-1, ds.shape[-1])), positions + ops.expand_dims(first, 1), axis=0)
        return a, self._split_filters(g)

    def input_means(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        sums, outputs = patches.patch_sums(self._channels_last(x), *self._window)
        mean = sums / ops.cast(outputs, sums.dtype)
        mean = ops.reshape(mean, (ops.shape(mean)[0], -1, self.groups, self.channels))
        mean = ops.reshape(ops.transpose(mean, (2, 0, 1, 3)), (self.groups, -1, self.width))
        return self._append_ones(mean)

    def _split_filters(self, rows: Tensor) -> Tensor:
        rows = ops.reshape(rows, (-1, self.groups, self.output_dim))
        return ops.transpose(rows, (1, 0, 2)) if self.groups > 1 else ops.reshape(rows, (1, -1, self.output_dim))

    def input_rows(self, x: Tensor) -> Tensor:
        rows = self._unfolded(self._channels_last(x))
        return ops.reshape(rows, (self.groups, ops.shape(x)[0], -1, self.width))

    def gradient_rows(self, ds: Tensor) -> Tensor:
        rows = self._split_filters(self._channels_last(ds))
        return ops.reshape(rows, (self.groups, ops.shape(ds)[0], -1, self.output_dim))

    def gradient_sums(self, ds: Tensor) -> Tensor:
        ds = self._channels_last(ds)
        return self._split_filters(ops.sum(ds, axis=tuple(range(1, len(ds.shape) - 1))))


def add_bias(x: Tensor, bias: Tensor, data_format: str) -> Tensor:
    """What a convolution made and its bias, as Keras adds them."""
    ones = (1,) * (len(x.shape) - 2)
    return ops.add(x, ops.reshape(bias, (1, *ones, -1) if data_format == "channels_last" else (1, -1, *ones)))


class CapturedConvolution(Captured):
    """What the captured convolutions share, whatever their number of spatial axes."""

    def parts(self) -> dict[str, Part]:
        kernel = keras_private.kernel_of(self)
        geometry = ConvolutionGeometry(
            kernel.shape,
            self.groups,
            self.use_bias,
            self.strides,
            self.dilation_rate,
            self.padding,
            self.data_format,
        )
        return {"statistics": Part.of(geometry, kernel, self.bias)}

    def call(self, inputs: Tensor) -> Tensor:
        if self.statistics is None:
            return super().call(inputs)
        x = learned(self._pre_activation, inputs, [self.kernel, self.bias], self.statistics)
        x = probe(x, inputs, self.statistics.geometry, self.statistics)
        return x if self.activation is None else self.activation(x)

    def _pre_activation(self, inputs: Tensor, kernel: Tensor, *bias: Tensor) -> Tensor:
        x = self._convolve(inputs, kernel)
        return add_bias(x, bias[0], self.data_format) if bias else x

    def _convolve(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        return self.convolution_op(inputs, kernel)


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class Conv1D(CapturedConvolution, keras.layers.Conv1D):
    """A `keras.layers.Conv1D` that natural-gradient methods observe; see `keras_ngd.layers.Dense`."""

    plain = keras.layers.Conv1D

    def _convolve(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        if self.padding != "causal":
            return self.convolution_op(inputs, kernel)
        return ops.conv(
            ops.pad(inputs, keras_private.causal_padding(self)),
            kernel,
            strides=list(self.strides),
            padding="valid",
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class Conv2D(CapturedConvolution, keras.layers.Conv2D):
    """A `keras.layers.Conv2D` that natural-gradient methods observe; see `keras_ngd.layers.Dense`."""

    plain = keras.layers.Conv2D


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class Conv3D(CapturedConvolution, keras.layers.Conv3D):
    """A `keras.layers.Conv3D` that natural-gradient methods observe; see `keras_ngd.layers.Dense`."""

    plain = keras.layers.Conv3D
