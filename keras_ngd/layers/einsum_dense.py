"""`keras.layers.EinsumDense` with a probe on its pre-activation; attention layers consist of them."""

import functools
import math
from typing import Any

import keras
from keras import ops

from keras_ngd import keras_private
from keras_ngd.layers.captured import Captured, Part, register_kind
from keras_ngd.layers.geometry import MatrixGeometry
from keras_ngd.layers.learning import learned
from keras_ngd.layers.probe import probe
from keras_ngd.typing import Shape, Tensor


class EinsumGeometry(MatrixGeometry):
    """Rows of `einsum(equation, x, kernel)`, told from the letters of the equation.

    Letters of the kernel that the output lacks are inputs, those that the input lacks are outputs, and those in all three are
    groups: independent blocks. The other letters of the input, the first of them the examples, number the rows.

    `weights`, of shape `[examples, ...]`, is the mask of the layer's input, if it has one.

    Args:
        equation: as `keras.layers.EinsumDense` takes it; an ellipsis stands for further rows.
        kernel_shape: the kernel's shape.
        bias_axes: letters of the output that the bias has, or None where there is none. It is a row of the matrix where it
            has all outputs and groups, and no other letters; else it is no part of it.
        bias_shape: the bias's shape, or None.

    Raises:
        ValueError: where the letters cannot be told apart so; says which.
    """

    def __init__(
        self, equation: str, kernel_shape: Shape, bias_axes: str | None = None, bias_shape: Shape | None = None
    ) -> None:
        self.letters_in, self.letters_of_kernel, self.letters_out = _letters(equation)
        kernel = self.letters_of_kernel
        self.group_letters = "".join(c for c in kernel if c in self.letters_in and c in self.letters_out)
        self.input_letters = "".join(c for c in kernel if c not in self.letters_out)
        self.output_letters = "".join(c for c in kernel if c not in self.letters_in)
        self.row_letters = "".join(c for c in self.letters_in if c not in kernel)
        self._check(equation)
        sizes = dict(zip(kernel, kernel_shape, strict=True))
        groups, width, outputs = (
            math.prod(sizes[c] for c in letters)
            for letters in (self.group_letters, self.input_letters, self.output_letters)
        )
        self.sizes = {c: int(size) for c, size in sizes.items()}
        self.bias_letters = ""
        if bias_axes is not None and set(bias_axes) == {*self.group_letters, *self.output_letters}:
            # Keras keeps them in the order of the output, with axes of size one for other letters in between.
            self.bias_letters = "".join(c for c in self.letters_out if c in bias_axes)
        super().__init__(
            groups,
            width,
            outputs,
            bool(self.bias_letters),
            kernel_shape,
            bias_shape if self.bias_letters else None,
        )

    def _check(self, equation: str) -> None:
        def refuse(why: str) -> None:
            raise ValueError(f"its equation {equation!r} {why}")

        for letters in (self.letters_in, self.letters_of_kernel, self.letters_out):
            for letter in letters:
                if letters.count(letter) > 1:
                    refuse(
                        f"has the letter {letter!r} twice in one operand: a diagonal is no matrix that multiplies rows"
                    )
        for letter in self.letters_of_kernel:
            if letter not in self.letters_in and letter not in self.letters_out:
                refuse(f"sums the kernel over {letter!r} alone")
        for letter in self.row_letters:
            if letter not in self.letters_out:
                refuse(f"sums the input over {letter!r} alone")
        if (
            not self.row_letters
            or self.letters_in[0] not in self.row_letters
            or self.letters_out[0] != self.letters_in[0]
        ):
            refuse("does not have the examples as the first letter of its input and output, and none of the kernel")

    # Rows

    def input_rows(self, x: Tensor) -> Tensor:
        return self._rows(x, self.letters_in, self.input_letters)

    def gradient_rows(self, ds: Tensor) -> Tensor:
        return self._rows(ds, self.letters_out, self.output_letters)

    def _rows(self, tensor: Tensor, letters: str, last: str) -> Tensor:
        """`[groups, examples, positions, dim]` of a tensor with these letters, the last axis that of the letters `last`."""
        axes = _axes(letters, len(tensor.shape))
        order = [axis for letter in (*self.group_letters, *self.row_letters, *last) for axis in axes[letter]]
        tensor = ops.transpose(tensor, order)
        examples = ops.shape(tensor)[sum(len(axes[letter]) for letter in self.group_letters)]
        return ops.reshape(tensor, (self.groups, examples, -1, math.prod(self.sizes[letter] for letter in last)))

    def row_weights(self, mask: Tensor | None, rank: int) -> Tensor | None:
        """What a mask of the input, which has this rank, says of the rows, one number for each; None where it says nothing.

        A mask has the leading axes of the input. It says nothing of rows that sum over one of these.
        """
        if mask is None:
            return None
        axes = _axes(self.letters_in, rank)
        rows = [axis for letter in self.row_letters for axis in axes[letter]]
        hidden = list(range(len(mask.shape)))
        return mask if hidden == rows else None

    # The matrix

    def kernel_to_matrix(self, kernel: Tensor) -> Tensor:
        order = [self.letters_of_kernel.index(c) for c in self._matrix_letters]
        return ops.reshape(ops.transpose(kernel, order), (self.groups, self.width, self.output_dim))

    def kernel_from_matrix(self, matrix: Tensor) -> Tensor:
        kernel = ops.reshape(matrix, [self.sizes[c] for c in self._matrix_letters])
        return ops.transpose(kernel, [self._matrix_letters.index(c) for c in self.letters_of_kernel])

    @property
    def _matrix_letters(self) -> str:
        return self.group_letters + self.input_letters + self.output_letters

    def bias_to_row(self, bias: Tensor) -> Tensor:
        bias = ops.reshape(bias, [self.sizes[c] for c in self.bias_letters])
        letters = self.group_letters + self.output_letters
        bias = ops.transpose(bias, [self.bias_letters.index(c) for c in letters])
        return ops.reshape(bias, (self.groups, 1, self.output_dim))

    def bias_from_row(self, row: Tensor) -> Tensor:
        letters = self.group_letters + self.output_letters
        bias = ops.reshape(row, [self.sizes[c] for c in letters])
        return ops.reshape(ops.transpose(bias, [letters.index(c) for c in self.bias_letters]), self.bias_shape)


def _letters(equation: str) -> tuple[str, str, str]:
    """The letters of the input, the kernel and the output, with a dot for an ellipsis."""
    try:
        operands, output = equation.replace(" ", "").replace("...", ".").split("->")
        inputs, kernel = operands.split(",")
    except ValueError:
        raise ValueError(f"its equation {equation!r} is not of the form 'ab,bc->ac'") from None
    return inputs, kernel, output


def _axes(letters: str, rank: int) -> dict[str, list[int]]:
    """The axes of each letter in a tensor of this rank; a dot has what the others leave."""
    axes, start = {}, 0
    for letter in letters:
        count = rank - len(letters) + 1 if letter == "." else 1
        axes[letter] = list(range(start, start + count))
        start += count
    return axes


def _affine(equation: str, x: Tensor, kernel: Tensor, *bias: Tensor) -> Tensor:
    x = ops.einsum(equation, x, kernel)
    return ops.add(x, bias[0]) if bias else x


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class EinsumDense(Captured, keras.layers.EinsumDense):
    """A `keras.layers.EinsumDense` that natural-gradient methods observe; see `keras_ngd.layers.Dense` and `EinsumGeometry`.

    `MultiHeadAttention` and `GroupQueryAttention` consist of such layers, and are captured by way of them.
    """

    plain = keras.layers.EinsumDense

    def parts(self) -> dict[str, Part]:
        kernel, bias = keras_private.kernel_of(self), self.bias
        geometry = EinsumGeometry(
            self.equation, tuple(kernel.shape), self.bias_axes, None if bias is None else tuple(bias.shape)
        )
        return {"statistics": Part.of(geometry, kernel, bias if geometry.use_bias else None)}

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if self.statistics is None:
            return super().call(inputs, training=training)
        affine = functools.partial(_affine, self.equation)
        x = learned(affine, inputs, [self.kernel, self.bias], self.statistics, products=True)
        geometry: Any = self.statistics.geometry
        weights = geometry.row_weights(keras_private.mask_of(inputs), len(inputs.shape))
        x = probe(x, inputs, geometry, self.statistics, weights)
        return x if self.activation is None else self.activation(x)
