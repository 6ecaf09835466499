"""`keras.layers.Dense` with a probe on its pre-activation."""

import keras
from keras import ops

from keras_ngd import keras_private
from keras_ngd.layers.captured import Captured, Part, register_kind
from keras_ngd.layers.geometry import MatrixGeometry, by_position
from keras_ngd.layers.learning import learned
from keras_ngd.layers.probe import probe
from keras_ngd.typing import Tensor


class DenseGeometry(MatrixGeometry):
    """Rows of a `Dense` layer: one per position of `[examples, ..., features]`.

    `weights`, of shape `[examples, ...]`, is the mask of its input, if it has one.
    """

    def __init__(self, inputs: int, outputs: int, use_bias: bool) -> None:
        super().__init__(1, inputs, outputs, use_bias, (inputs, outputs))

    def input_rows(self, x: Tensor) -> Tensor:
        return by_position(x, self.width)

    def gradient_rows(self, ds: Tensor) -> Tensor:
        return by_position(ds, self.output_dim)


def _affine(x: Tensor, kernel: Tensor, *bias: Tensor) -> Tensor:
    x = ops.matmul(x, kernel)
    return ops.add(x, bias[0]) if bias else x


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class Dense(Captured, keras.layers.Dense):
    """A `keras.layers.Dense` whose inputs and pre-activation gradients natural-gradient methods observe.

    Same arguments, weights and results as `keras.layers.Dense`. `keras_ngd.capture(model, optimizer)` turns plain layers
    into this class, and must also be called on models written with it. An input mask takes the hidden positions
    out of the statistics.
    """

    plain = keras.layers.Dense

    def parts(self) -> dict[str, Part]:
        kernel = keras_private.kernel_of(self)
        inputs, outputs = kernel.shape
        return {"statistics": Part.of(DenseGeometry(inputs, outputs, self.use_bias), kernel, self.bias)}

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if self.statistics is None:
            return super().call(inputs, training=training)
        x = learned(_affine, inputs, [self.kernel, self.bias], self.statistics, products=True)
        x = probe(x, inputs, self.statistics.geometry, self.statistics, keras_private.mask_of(inputs))
        return x if self.activation is None else self.activation(x)
