"""Probes on what is computed step by step: the rows of all steps arrive at one probe outside of the loop.

A layer that runs a loop makes *slots* before it: zeros, a row for each example and step, which pass through a probe. Every step
is handed its rows, multiplies by way of `Slots.product`, and so sends back what its matrix was multiplied with and the gradient
of what came out: as the gradient of its slot. The loop's own backward pass brings those of all steps together, as rows of one
sequence. Nothing of the statistics is inside of the loop, what a mask hides is left out, and the matrix's gradient is one product
of all rows rather than a sum that the loop takes along from step to step.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_ngd import backend
from keras_ngd.layers.geometry import MatrixGeometry, by_position, flat
from keras_ngd.layers.learning import learned, learned_of_rows
from keras_ngd.layers.probe import probe, second_derivative
from keras_ngd.typing import Shape, Tensor

if TYPE_CHECKING:
    from keras_ngd.statistics.statistics import Statistics


class StepGeometry(MatrixGeometry):
    """A matrix that is multiplied once in every step of a loop; of a sequence `[examples, steps, ...]`, steps are positions.

    Its kernels lie one on top of the other. Gates that see inputs of their own are groups, whose inputs follow each other on the
    last axis.

    Args:
        kernels: the kernels' shapes, `[inputs, groups * outputs]` each.
        use_bias: whether there is a bias `[groups * outputs]`.
        groups: number of gates that see inputs of their own, or 1 where all see the same.
    """

    def __init__(self, kernels: Sequence[Sequence[int]], use_bias: bool, groups: int = 1) -> None:
        self.heights = tuple(shape[0] for shape in kernels)
        width, columns = sum(self.heights), kernels[0][1]
        super().__init__(groups, width, columns // groups, use_bias, (width, columns))

    def _rows(self, tensor: Tensor, size: int) -> Tensor:
        if self.groups == 1:
            return by_position(tensor, size)
        rows = ops.reshape(tensor, (ops.shape(tensor)[0], -1, self.groups, size))
        return ops.transpose(rows, (2, 0, 1, 3))

    def input_rows(self, x: Tensor) -> Tensor:
        return self._rows(x, self.width)

    def gradient_rows(self, ds: Tensor) -> Tensor:
        return self._rows(ds, self.output_dim)

    def stacked(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The kernels as one, and the bias where there is one."""
        count = len(self.heights)
        kernel = parameters[0] if count == 1 else ops.concatenate(parameters[:count], axis=0)
        return [kernel, *parameters[count:]]

    def to_matrix(self, parameters: Sequence[Tensor]) -> Tensor:
        return super().to_matrix(self.stacked(parameters))

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        stacked, *bias = super().from_matrix(matrix)
        ends = [sum(self.heights[: i + 1]) for i in range(len(self.heights))]
        return [*(stacked[end - size : end] for end, size in zip(ends, self.heights, strict=True)), *bias]

    def gradient_of_matrix(self, x: Tensor, ds: Tensor) -> Tensor:
        """The sum over the rows of `a g^T`."""
        a, g = flat(self.input_rows(x)), flat(self.gradient_rows(ds))
        products = backend.matmul(a, g, transpose_a=True)
        return ops.concatenate([products, ops.sum(g, axis=1, keepdims=True)], axis=1) if self.use_bias else products


class Slots:
    """Where the steps of a loop, or a single one, send the rows of one matrix.

    Args:
        tensor: `[examples, ..., slot_width(geometry)]`, what came out of the probe, or one step's part of it.
        common: what all steps share: the geometry, the stacked kernel and its bias, and what says that a derivative is refused.
    """

    def __init__(self, tensor: Tensor, common: tuple[Any, ...]) -> None:
        self.tensor = tensor
        self._common = common

    @classmethod
    def of(cls, statistics: "Statistics", shape: Shape, dtype: str, mask: Tensor | None = None) -> "Slots":
        """Slots of the shape `[examples, ...]`, behind a probe; `mask`, of this shape, takes rows out of the statistics."""
        geometry = statistics.geometry
        outputs = geometry.groups * geometry.output_dim
        zeros = ops.zeros((*shape, outputs + geometry.groups * geometry.width), dtype=dtype)
        parameters = [ops.cast(ops.convert_to_tensor(v), dtype) for v in statistics.parameters()]

        def of_rows(rows: Tensor) -> list[Tensor]:
            return geometry.from_matrix(geometry.gradient_of_matrix(rows[..., outputs:], rows[..., :outputs]))

        slots = learned_of_rows(of_rows, lambda: probe(zeros, None, geometry, statistics, mask), parameters, statistics)
        # One number depends on the variables as well as all do.
        depends = slots[(slice(0, 1),) * (len(shape) + 1)]
        stacked = [ops.stop_gradient(t) for t in geometry.stacked(parameters)]
        return cls(slots, (geometry, stacked, depends, weakref.ref(statistics)))

    def at(self, tensor: Tensor) -> "Slots":
        """The same of one step, whose part of the slots this is."""
        return Slots(tensor, self._common)

    def learned(self, function: Callable[..., Tensor], x: Tensor, parameter: Tensor) -> Tensor:
        """`layers.learning.learned` of a parameter beside the matrix."""
        return learned(function, x, [parameter], self._common[-1]())

    def product(self, inputs: Sequence[Tensor], first: int = 0) -> Tensor:
        """The matrix, its bias included, times the inputs of a step: `[examples, n * output_dim]`.

        Args:
            inputs: `[examples, width]` for each of `n` groups.
            first: the number of the first of these groups.
        """
        geometry, (kernel, *bias), depends, reference = self._common
        outputs, size, count = geometry.groups * geometry.output_dim, geometry.output_dim, len(inputs)
        slot = self.tensor
        if count < geometry.groups:
            kernel, *bias = (t[..., first * size : (first + count) * size] for t in (kernel, *bias))
            start, end = outputs + first * geometry.width, outputs + (first + count) * geometry.width
            slot = ops.concatenate([slot[:, first * size : (first + count) * size], slot[:, start:end]], axis=-1)
        if all(t is inputs[0] for t in inputs):
            s = ops.matmul(inputs[0], kernel)
        else:
            columns = ops.split(kernel, count, axis=1)
            s = ops.concatenate([ops.matmul(t, k) for t, k in zip(inputs, columns, strict=True)], axis=-1)
        if bias:
            s = ops.add(s, bias[0])
        a = inputs[0] if count == 1 else ops.concatenate(list(inputs), axis=-1)

        def differentiated(*_: Tensor) -> Any:
            raise ValueError(second_derivative(reference()))

        def gradient(ds: Tensor, slot: Tensor, a: Tensor, depends: Tensor) -> tuple[Tensor | None, ...]:
            # As in `probe`, where what is sent leaves the path that a second derivative would take.
            followed = backend.identity_with_gradient(differentiated)(ds, depends)
            return followed, ops.concatenate([ops.stop_gradient(ds), ops.cast(a, ds.dtype)], axis=-1), None, None

        return backend.identity_with_gradient(gradient)(s, slot, ops.stop_gradient(a), depends)
