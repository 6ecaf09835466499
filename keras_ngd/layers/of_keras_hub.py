"""The layers of keras_hub that are captured. `keras_ngd.capture` imports this where keras_hub is imported already."""

from typing import Any

import keras
import keras_hub
from keras import ops

from keras_ngd.layers.captured import Captured, Part, keeps_call, register_kind
from keras_ngd.layers.embedding import LookupGeometry
from keras_ngd.layers.learning import of_lookups
from keras_ngd.layers.probe import probe
from keras_ngd.typing import Tensor

# It adds nothing to Keras's layer of that name.
keeps_call(keras_hub.layers.ReversibleEmbedding)


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class PositionEmbedding(Captured, keras_hub.layers.PositionEmbedding):
    """A `keras_hub.layers.PositionEmbedding` that natural-gradient methods observe: each token looks its position up.

    See `keras_ngd.layers.Embedding`.
    """

    plain = keras_hub.layers.PositionEmbedding

    def parts(self) -> dict[str, Part]:
        table = self.position_embeddings
        return {"statistics": Part(LookupGeometry(*table.shape), [table])}

    def call(self, inputs: Tensor, start_index: int = 0, positions: Any = None) -> Tensor:
        results = super().call(inputs, start_index=start_index, positions=positions)
        if self.statistics is None:
            return results
        if positions is None:
            positions = ops.arange(ops.shape(inputs)[-2]) + start_index
        positions = ops.broadcast_to(ops.cast(positions, "float32"), ops.shape(inputs)[:-1])
        results = of_lookups(results, self.statistics)
        return probe(results, positions, self.statistics.geometry, self.statistics)
