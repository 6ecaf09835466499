"""`keras.layers.Dense` with a probe on its pre-activation."""

import keras
from keras import ops

from keras_ngd import keras_private
from keras_ngd.layers.captured import Captured
from keras_ngd.layers.probe import probe
from keras_ngd.layers.rows import DenseRows, Rows
from keras_ngd.typing import Tensor


@keras.saving.register_keras_serializable("keras_ngd")
class Dense(Captured, keras.layers.Dense):
    """A `keras.layers.Dense` whose inputs and pre-activation gradients natural-gradient methods observe.

    Same arguments, weights and results as `keras.layers.Dense`. `keras_ngd.capture(model, optimizer)` turns plain layers
    into this class, and must also be called on models written with it. An input mask takes the hidden positions
    out of the statistics.
    """

    plain = keras.layers.Dense

    def _rows(self) -> Rows:
        inputs, outputs = keras_private.kernel_of(self).shape
        return DenseRows(inputs, outputs, self.use_bias)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if self.statistics is None:
            return super().call(inputs, training=training)
        x = ops.matmul(inputs, self.kernel)
        if self.bias is not None:
            x = ops.add(x, self.bias)
        x = probe(x, inputs, self.statistics.rows, self.statistics, keras_private.mask_of(inputs))
        return x if self.activation is None else self.activation(x)
