"""What curvatures share whose factors are given by their diagonal blocks, in parts."""

from collections.abc import Sequence
from typing import Any

from keras_ngd.curvature.curvature import TracedCurvature
from keras_ngd.linalg import diagonal
from keras_ngd.typing import Parts, Tensor


class PartsCurvature(TracedCurvature):
    """Base of curvatures whose inputs are the blocks of `A` and then of `G`, `[k, count, size, size]` by part.

    Attributes:
        sides: the parts of the input and of the output dimension, as `linalg.diagonal.partition` gives them.
    """

    sides: tuple[Parts, Parts]

    @property
    def parts(self) -> Parts:
        """All parts, the input's first."""
        return self.sides[0] + self.sides[1]

    @property
    def size(self) -> int:
        return diagonal.dimension(self.sides[0]) * diagonal.dimension(self.sides[1])

    def divide(self, values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """A list by part as two: the input's and the output's."""
        first = len(self.sides[0])
        return values[:first], values[first : len(self.parts)]

    def traces(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The traces of `A` and of `G`, each `[k]`."""
        a, g = self.divide(inputs)
        return diagonal.traces(a), diagonal.traces(g)

    def trace(self, inputs: Sequence[Tensor]) -> Tensor:
        trace_a, trace_g = self.traces(inputs)
        return trace_a * trace_g
