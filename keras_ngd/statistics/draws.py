"""Random numbers in the backward pass."""

from typing import TYPE_CHECKING

from keras import ops

from keras_ngd import backend, replica
from keras_ngd.typing import Shape, Tensor, Variable

# Seeds are below this number, too: their product is the largest that a float32 counts to exactly.
LAYERS = 2**12


def draw_number(seed: int, layer: int) -> int:
    """One number for a seed and a layer's number."""
    return seed * LAYERS + layer


# A mixin, which a type checker is to see as what it is mixed with.
if TYPE_CHECKING:
    from keras_ngd.statistics.statistics import Statistics as Base
else:
    Base = object


class Draws(Base):
    """Mixin for `Statistics` that draw random numbers: a control `draw`, of the layer's number and that of the next draw.

    Numbers follow from it alone (and from which replica of a strategy draws), so that training resumes with the same ones. The
    optimizer gives each layer its number.
    """

    def create_draw(self) -> Variable:
        self.draw: Variable = self._add("draw", (2,), "zeros", "float32")
        return self.draw

    def start_draws(self, seed: int, number: int, drawn: Tensor = 0) -> None:
        """Starts the draws of the layer `number` after the first `drawn`."""
        self.draw.assign(ops.stack([ops.cast(draw_number(seed, number), "float32"), ops.cast(drawn, "float32")]))

    @staticmethod
    def uniform(draw: Tensor, shape: Shape, dtype: str) -> Tensor:
        """Numbers in (0, 1)."""
        offset = ops.cast(replica.identity(), "int32") * LAYERS**2
        return backend.uniform(shape, ops.cast(draw, "int32") + ops.stack([offset, ops.zeros_like(offset)]), dtype)

    @staticmethod
    def next_draw(draw: Tensor) -> Tensor:
        return draw + ops.convert_to_tensor([0.0, 1.0], dtype=draw.dtype)
