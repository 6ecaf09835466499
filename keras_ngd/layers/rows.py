"""How layers present their rows: `a`, what the kernel multiplies, and `g`, the gradient of what comes out.

A `Rows` object holds a layer's static geometry and answers the questions statistics ask of one batch. Every answer has
a leading axis of groups (one, but for grouped convolutions). Rows of `a` end in a one where the layer has a bias, so that
kernel and bias are one matrix `[groups, input_dim, output_dim]`, the bias its last row.
"""

import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_ngd import backend
from keras_ngd.linalg import diagonal, patch_blocks, patches
from keras_ngd.typing import Parts, Shape, Tensor


def _gram(rows: Tensor) -> Tensor:
    return backend.matmul(rows, rows, transpose_a=True)


class Rows:
    """Base: the geometry shared by all kinds.

    Args:
        groups: number of independent blocks the kernel consists of.
        width: inputs per group, the bias not counted.
        output_dim: outputs per group.
        use_bias: whether rows of `a` end in a one.
        kernel_shape: the kernel variable's shape.

    Attributes:
        input_dim: `width`, and one for the bias.
    """

    groups: int
    width: int
    output_dim: int
    use_bias: bool
    input_dim: int
    kernel_shape: Shape

    def __init__(self, groups: int, width: int, output_dim: int, use_bias: bool, kernel_shape: Sequence[int]) -> None:
        self.groups, self.width, self.output_dim, self.use_bias = groups, width, output_dim, use_bias
        self.input_dim = width + int(use_bias)
        self.kernel_shape = tuple(kernel_shape)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for rows of the same geometry."""
        return (type(self).__name__, *sorted((k, str(v)) for k, v in vars(self).items()))

    def input_second_moment(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean of `a a^T` over the rows (weighted by `weights`, if given): `[groups, input_dim, input_dim]`."""
        raise NotImplementedError

    def input_means(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean of `a` over each example's rows: `[groups, examples, input_dim]`."""
        raise NotImplementedError

    def gradient_second_moment(self, ds: Tensor) -> Tensor:
        """Sum of `g g^T` over the rows: `[groups, output_dim, output_dim]`."""
        return _gram(self._gradient_rows(ds))

    def gradient_sums(self, ds: Tensor) -> Tensor:
        """Sum of `g` over each example's rows: `[groups, examples, output_dim]`."""
        raise NotImplementedError

    def input_blocks(self, x: Tensor, parts: Parts, weights: Tensor | None = None) -> list[Tensor]:
        """The diagonal blocks of `input_second_moment`, by part: see `linalg.diagonal`."""
        if parts == ((1, self.input_dim),):
            return [ops.expand_dims(self.input_second_moment(x, weights), 1)]
        blocks, count = self._inner_blocks(x, parts[: len(parts) - int(self.use_bias)], weights)
        blocks = [block / count for block in blocks]
        return [*blocks, ops.ones((self.groups, 1, 1, 1), blocks[0].dtype)] if self.use_bias else blocks

    def _inner_blocks(self, x: Tensor, parts: Parts, weights: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Diagonal blocks of the sum over the rows, the bias left out, and the number of rows."""
        raise NotImplementedError

    def gradient_blocks(self, ds: Tensor, parts: Parts) -> list[Tensor]:
        """The diagonal blocks of `gradient_second_moment`, by part."""
        return diagonal.gram_blocks(self._gradient_rows(ds), parts)

    def _gradient_rows(self, ds: Tensor) -> Tensor:
        """The rows `g`, `[groups, n, output_dim]`."""
        raise NotImplementedError

    def matrix(self, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """A kernel and bias (or their gradients) as one matrix `[groups, input_dim, output_dim]`."""
        kernel = ops.reshape(kernel, (self.width, self.groups, self.output_dim))
        if self.groups == 1:
            kernel = ops.reshape(kernel, (1, self.width, self.output_dim))
        else:
            kernel = ops.transpose(kernel, (1, 0, 2))
        if not self.use_bias:
            return kernel
        return ops.concatenate([kernel, ops.reshape(bias, (self.groups, 1, self.output_dim))], axis=1)

    def kernel_and_bias(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inverse of `matrix`; the bias is None where the layer has none."""
        bias = ops.reshape(matrix[:, -1], (-1,)) if self.use_bias else None
        kernel = matrix[:, : self.width]
        if self.groups > 1:
            kernel = ops.transpose(kernel, (1, 0, 2))
        return ops.reshape(kernel, self.kernel_shape), bias

    def _with_bias(self, gram: Tensor, sums: Tensor | None, count: Tensor) -> Tensor:
        """Borders `[groups, width, width]` sums with the sums of the rows and their number."""
        if not self.use_bias:
            return gram
        column = ops.expand_dims(sums, -1)
        corner = ops.ones((self.groups, 1, 1), gram.dtype) * count
        top = ops.concatenate([gram, column], axis=2)
        return ops.concatenate([top, ops.concatenate([ops.transpose(column, (0, 2, 1)), corner], axis=2)], axis=1)

    def _append_ones(self, rows: Tensor) -> Tensor:
        return ops.concatenate([rows, ops.ones_like(rows[..., :1])], axis=-1) if self.use_bias else rows


class DenseRows(Rows):
    """Rows of a `Dense` layer: one per position of `[examples, ..., features]`.

    `weights`, of shape `[examples, ...]`, is the mask of its input, if it has one.
    """

    def __init__(self, inputs: int, outputs: int, use_bias: bool) -> None:
        super().__init__(1, inputs, outputs, use_bias, (inputs, outputs))

    def input_second_moment(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        rows, count = self._visible(x, weights)
        return self._with_bias(_gram(rows), ops.sum(rows, axis=1), count) / count

    def _visible(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows, zero where hidden, `[1, n, width]`, and how many are not."""
        rows = ops.reshape(x, (1, -1, self.width))
        if weights is None:
            return rows, ops.cast(ops.shape(rows)[1], rows.dtype)
        weights = ops.cast(ops.reshape(weights, (1, -1, 1)), rows.dtype)
        return rows * weights, ops.maximum(ops.sum(weights), 1.0)

    def _inner_blocks(self, x: Tensor, parts: Parts, weights: Tensor | None) -> tuple[list[Tensor], Tensor]:
        rows, count = self._visible(x, weights)
        return diagonal.gram_blocks(rows, parts), count

    def input_means(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        x = ops.reshape(x, (ops.shape(x)[0], -1, self.width))
        if weights is None:
            # Not `ops.mean`: Keras takes it in float32 on JAX.
            mean = ops.sum(x, axis=1) / ops.cast(ops.shape(x)[1], x.dtype)
        else:
            weights = ops.cast(ops.reshape(weights, (ops.shape(x)[0], -1, 1)), x.dtype)
            mean = ops.sum(x * weights, axis=1) / ops.maximum(ops.sum(weights, axis=1), 1.0)
        return ops.expand_dims(self._append_ones(mean), 0)

    def _gradient_rows(self, ds: Tensor) -> Tensor:
        return ops.reshape(ds, (1, -1, self.output_dim))

    def gradient_sums(self, ds: Tensor) -> Tensor:
        ds = ops.reshape(ds, (ops.shape(ds)[0], -1, self.output_dim))
        return ops.expand_dims(ops.sum(ds, axis=1), 0)


class ConvolutionRows(Rows):
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
        if not self.channels_first:
            return x
        return ops.transpose(x, (0, *range(2, len(x.shape)), 1))

    def input_second_moment(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        x, sums = self._channels_last(x), None
        if self.groups == 1 and patches.prefers_displacements(x, self.kernel, self.strides, self.dilation):
            gram = ops.expand_dims(patches.patch_gram(x, self.kernel, self.padding), 0)
            if self.use_bias:
                total = ops.sum(x, axis=0, keepdims=True)
                sums = ops.reshape(patches.patch_sums(total, *self._window)[0], (1, self.width))
            count = self._row_count(x)
        else:
            rows = self._unfolded(x)
            gram, count = _gram(rows), ops.cast(ops.shape(rows)[1], rows.dtype)
            sums = ops.sum(rows, axis=1)
        return self._with_bias(gram, sums, count) / count

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
            if patches.prefers_displacements(x, self.kernel, self.strides, self.dilation):
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

    def _gradient_rows(self, ds: Tensor) -> Tensor:
        return self._split_filters(self._channels_last(ds))

    def gradient_sums(self, ds: Tensor) -> Tensor:
        ds = self._channels_last(ds)
        return self._split_filters(ops.sum(ds, axis=tuple(range(1, len(ds.shape) - 1))))
