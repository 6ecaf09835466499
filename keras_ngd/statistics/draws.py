"""Random numbers in the backward pass."""

from keras import ops

from keras_ngd import backend


class Draws:
    """Mixin for `Statistics` that draw random numbers: a control `draw`, of the layer's number and that of the next draw.

    Numbers follow from it alone, so that training resumes with the same ones. The optimizer gives each layer its number.
    """

    def create_draw(self):
        self.draw = self._add("draw", (2,), "zeros", "float32")
        return self.draw

    @staticmethod
    def uniform(draw, shape, dtype):
        """Numbers in (0, 1)."""
        return backend.uniform(shape, ops.cast(draw, "int32"), dtype)

    @staticmethod
    def next_draw(draw):
        return draw + ops.convert_to_tensor([0.0, 1.0], dtype=draw.dtype)
