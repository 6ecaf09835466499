"""How a layer presents one weight matrix, and how data meet it: the contract, and what geometries of matrices share."""

import abc
import enum
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from keras import ops

from keras_ngd import backend
from keras_ngd.layers.contract import axes, blocks, check_overriding, each, gives
from keras_ngd.linalg import diagonal
from keras_ngd.typing import Parts, Shape, Tensor


class Structure(enum.Enum):
    """What a weight matrix is, which decides how its Fisher block can be approximated.

    Attributes:
        MATRIX: it multiplies inputs: `s = a^T V`, `a` the rows of the input.
        LOOKUP: its rows are looked up: `a` are one-hot, and their second moment is diagonal.
        SCALE: it scales normalized inputs, feature by feature, and shifts them: `[scale; offset]`.
    """

    MATRIX = "matrix"
    LOOKUP = "lookup"
    SCALE = "scale"


class Geometry(abc.ABC):
    """One weight matrix `V` of a layer, `[groups, input_dim, output_dim]`, made of the layer's parameters.

    Geometries are static: all methods are functions of tensors, and geometries with the same `key` share traces. Of methods that
    `gives` decorates the shapes are checked, whoever overrides them.

    Attributes:
        structure: a `Structure`.
        groups: number of independent blocks that the matrix consists of.
        input_dim: rows of each, a bias included.
        output_dim: columns of each.
    """

    structure: ClassVar[Structure]
    groups: int
    input_dim: int
    output_dim: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_overriding(cls)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal geometries."""
        # Not the class's name: one that was corrected, in a notebook, is another.
        return (type(self), *sorted((k, str(v)) for k, v in vars(self).items()))

    def divisible(self, x: Tensor, weights: Tensor | None) -> "tuple[Geometry, Tensor, Tensor | None]":
        """A geometry, an input and weights of the same batch that may be divided into parts. Default: these themselves."""
        return self, x, weights

    @gives(axes("groups", "input_dim", "output_dim"))
    @abc.abstractmethod
    def to_matrix(self, parameters: Sequence[Tensor]) -> Tensor:
        """`V` of the layer's parameters, or the same of their gradients."""

    @abc.abstractmethod
    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of `to_matrix`."""


class FactoredGeometry(Geometry):
    """A geometry whose Fisher block has Kronecker factors, of inputs and of gradients, whole or in diagonal blocks.

    Attributes:
        width: inputs per group, the bias not counted.
        use_bias: whether rows of `a` end in a one, so that the bias is the last row of `V`.
    """

    width: int
    use_bias: bool

    def partitions(self, split: int | None) -> tuple[Parts, Parts]:
        """The parts of the input and of the output dimension where both are cut into blocks of `split`; see `linalg.diagonal`."""
        return (
            diagonal.partition(self.width, self.use_bias, split),
            diagonal.partition(self.output_dim, False, split),
        )

    @gives(lambda geometry, x, ds, partitions, weights=None: [blocks(geometry, parts) for parts in partitions])
    def factor_blocks(
        self, x: Tensor, ds: Tensor, partitions: tuple[Parts, Parts], weights: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The diagonal blocks of both factors, by part, `[groups, count, size, size]`.

        Args:
            x: the layer's input.
            ds: the gradient of what comes out.
            partitions: as `partitions` gives them.
            weights: optional weights of the rows.

        Returns:
            Those of the mean of `a a^T` over the rows, and of the sum of `g g^T`.
        """
        return self.input_blocks(x, partitions[0], weights), self.gradient_blocks(ds, partitions[1])

    @gives(lambda geometry, x, parts, weights=None: blocks(geometry, parts))
    @abc.abstractmethod
    def input_blocks(self, x: Tensor, parts: Parts, weights: Tensor | None = None) -> list[Tensor]:
        """The diagonal blocks of the mean of `a a^T` over the rows, by part."""

    @gives(lambda geometry, ds, parts: blocks(geometry, parts))
    def gradient_blocks(self, ds: Tensor, parts: Parts) -> list[Tensor]:
        """The diagonal blocks of the sum of `g g^T` over the rows, by part."""
        return diagonal.gram_blocks(flat(self.gradient_rows(ds)), parts)

    @gives(axes("groups", "examples", "positions", "output_dim"))
    @abc.abstractmethod
    def gradient_rows(self, ds: Tensor) -> Tensor:
        """The rows `g`, `[groups, examples, positions, output_dim]`."""


# The shapes of factors, and of rows chosen of all.
INPUT_MOMENT, GRADIENT_MOMENT = axes("groups", "input_dim", "input_dim"), axes("groups", "output_dim", "output_dim")
CHOSEN_ROWS = each(axes("groups", "rows", "input_dim"), axes("groups", "rows", "output_dim"))


class MatrixGeometry(FactoredGeometry):
    """A matrix that multiplies rows. Subclasses say what these are; what statistics ask of them is answered here.

    Rows of `a` end in a one where the layer has a bias, so that kernel and bias are one matrix, the bias its last row.

    Args:
        groups: number of independent blocks the kernel consists of.
        width: inputs per group, the bias not counted.
        output_dim: outputs per group.
        use_bias: whether the layer's bias is a part of the matrix.
        kernel_shape: the kernel variable's shape.
        bias_shape: the bias variable's shape. Default: `[groups * output_dim]`.
    """

    structure = Structure.MATRIX
    kernel_shape: Shape
    bias_shape: Shape

    def __init__(
        self,
        groups: int,
        width: int,
        output_dim: int,
        use_bias: bool,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
    ) -> None:
        self.groups, self.width, self.output_dim, self.use_bias = groups, width, output_dim, use_bias
        self.input_dim = width + int(use_bias)
        self.kernel_shape = tuple(kernel_shape)
        self.bias_shape = (groups * output_dim,) if bias_shape is None else tuple(bias_shape)

    # Rows

    @gives(axes("groups", "examples", "positions", "width"))
    @abc.abstractmethod
    def input_rows(self, x: Tensor) -> Tensor:
        """The rows `a` without the one, `[groups, examples, positions, width]`."""

    def rows_with_ones(self, x: Tensor) -> Tensor:
        """The rows `a`, `[groups, examples, positions, input_dim]`."""
        return self._append_ones(self.input_rows(x))

    @gives(each(INPUT_MOMENT, GRADIENT_MOMENT))
    def second_moments(self, x: Tensor, ds: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean of `a a^T` over the rows and sum of `g g^T`; arguments as for `factor_blocks`."""
        return self.input_second_moment(x, weights), self.gradient_second_moment(ds)

    @gives(INPUT_MOMENT)
    def input_second_moment(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean of `a a^T` over the rows (weighted by `weights`, if there are any): `[groups, input_dim, input_dim]`."""
        rows, count = self._visible(x, weights)
        return self._with_bias(gram(rows), ops.sum(rows, axis=1), count) / count

    @gives(axes("groups", "examples", "input_dim"))
    def input_means(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean of `a` over each example's rows: `[groups, examples, input_dim]`."""
        rows = self.input_rows(x)
        if weights is None:
            # Not `ops.mean`: Keras takes it in float32 on JAX.
            mean = ops.sum(rows, axis=2) / ops.cast(ops.shape(rows)[2], rows.dtype)
        else:
            weights = ops.cast(ops.reshape(weights, (1, ops.shape(rows)[1], -1, 1)), rows.dtype)
            mean = ops.sum(rows * weights, axis=2) / ops.maximum(ops.sum(weights, axis=2), 1.0)
        return self._append_ones(mean)

    @gives(GRADIENT_MOMENT)
    def gradient_second_moment(self, ds: Tensor) -> Tensor:
        """Sum of `g g^T` over the rows: `[groups, output_dim, output_dim]`."""
        return gram(flat(self.gradient_rows(ds)))

    @gives(axes("groups", "examples", "output_dim"))
    def gradient_sums(self, ds: Tensor) -> Tensor:
        """Sum of `g` over each example's rows: `[groups, examples, output_dim]`."""
        return ops.sum(self.gradient_rows(ds), axis=2)

    def input_blocks(self, x: Tensor, parts: Parts, weights: Tensor | None = None) -> list[Tensor]:
        if parts == ((1, self.input_dim),):
            return [ops.expand_dims(self.input_second_moment(x, weights), 1)]
        blocks, count = self._inner_blocks(x, parts[: len(parts) - int(self.use_bias)], weights)
        blocks = [block / count for block in blocks]
        return [*blocks, ops.ones((self.groups, 1, 1, 1), blocks[0].dtype)] if self.use_bias else blocks

    def _inner_blocks(self, x: Tensor, parts: Parts, weights: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Diagonal blocks of the sum over the rows, the bias left out, and the number of rows."""
        rows, count = self._visible(x, weights)
        return diagonal.gram_blocks(rows, parts), count

    def _visible(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows, zero where hidden, `[groups, n, width]`, and how many are not."""
        return visible(flat(self.input_rows(x)), weights)

    # The matrix

    def to_matrix(self, parameters: Sequence[Tensor]) -> Tensor:
        kernel, *bias = parameters
        kernel = self.kernel_to_matrix(kernel)
        if not self.use_bias:
            return kernel
        return ops.concatenate([kernel, self.bias_to_row(bias[0])], axis=1)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        if not self.use_bias:
            return [self.kernel_from_matrix(matrix)]
        kernel, row = backend.parts(matrix, (self.width, 1), axis=1)
        return [self.kernel_from_matrix(kernel), self.bias_from_row(row)]

    def kernel_to_matrix(self, kernel: Tensor) -> Tensor:
        """`[groups, width, output_dim]` of the kernel, whose last axis is that of the outputs, one group's after the other's."""
        kernel = ops.reshape(kernel, (self.width, self.groups, self.output_dim))
        if self.groups == 1:
            return ops.reshape(kernel, (1, self.width, self.output_dim))
        return ops.transpose(kernel, (1, 0, 2))

    def kernel_from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `kernel_to_matrix`."""
        if self.groups > 1:
            matrix = ops.transpose(matrix, (1, 0, 2))
        return ops.reshape(matrix, self.kernel_shape)

    def bias_to_row(self, bias: Tensor) -> Tensor:
        """`[groups, 1, output_dim]` of the bias."""
        return ops.reshape(bias, (self.groups, 1, self.output_dim))

    def bias_from_row(self, row: Tensor) -> Tensor:
        """The bias of `[groups, output_dim]`."""
        return ops.reshape(row, self.bias_shape)

    def _with_bias(self, gram: Tensor, sums: Tensor | None, count: Tensor) -> Tensor:
        """Borders `[groups, width, width]` sums with the sums of the rows and their number."""
        if not self.use_bias:
            return gram
        if backend.under_xla():
            # XLA's CPU compiler makes one loop of it, the same for all layers of a shape, where it would write out every
            # concatenation of every layer.
            last = ops.cast((np.arange(self.input_dim) == self.width).astype("float32"), gram.dtype)
            border = ops.expand_dims(ops.pad(sums, [(0, 0), (0, 1)]) + last * (count / 2), -1)
            gram = ops.pad(gram, [(0, 0), (0, 1), (0, 1)])
            return gram + border * last + ops.swapaxes(border, 1, 2) * ops.expand_dims(last, -1)
        column = ops.expand_dims(sums, -1)
        corner = ops.ones((self.groups, 1, 1), gram.dtype) * count
        top = ops.concatenate([gram, column], axis=2)
        return ops.concatenate([top, ops.concatenate([ops.transpose(column, (0, 2, 1)), corner], axis=2)], axis=1)

    def _append_ones(self, rows: Tensor) -> Tensor:
        return ops.concatenate([rows, ops.ones_like(rows[..., :1])], axis=-1) if self.use_bias else rows


def gram(rows: Tensor) -> Tensor:
    """`rows^T rows` of `[groups, n, dim]`."""
    return backend.matmul(rows, rows, transpose_a=True)


def by_position(tensor: Tensor, dim: int) -> Tensor:
    """`[examples, ..., dim]` as rows of one group, `[1, examples, positions, dim]`."""
    return ops.reshape(tensor, (1, ops.shape(tensor)[0], -1, dim))


def visible(rows: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows `[groups, n, dim]`, zero where their `weights`, as many or None, hide them, and how many are not hidden."""
    if weights is None:
        return rows, ops.cast(ops.shape(rows)[1], rows.dtype)
    weights = ops.cast(ops.reshape(weights, (1, -1, 1)), rows.dtype)
    return rows * weights, ops.maximum(ops.sum(weights), 1.0)


def flat(rows: Tensor) -> Tensor:
    """`[groups, examples, positions, dim]` as `[groups, n, dim]`."""
    return ops.reshape(rows, (rows.shape[0], -1, rows.shape[-1]))
