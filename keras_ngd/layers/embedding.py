"""`keras.layers.Embedding` and `ReversibleEmbedding` with probes on what they look up and project."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd import keras_private
from keras_ngd.layers.captured import Captured, Part, register_kind
from keras_ngd.layers.geometry import FactoredGeometry, Structure, by_position, flat, visible
from keras_ngd.layers.learning import learned, of_lookups
from keras_ngd.layers.probe import probe
from keras_ngd.linalg import diagonal
from keras_ngd.typing import Parts, Tensor


class LookupGeometry(FactoredGeometry):
    """A table, `[input_dim, output_dim]`, whose rows are looked up: those of a dense layer with one-hot inputs and no bias.

    So the second moment of its inputs is diagonal: how often each row is looked up, of all lookups. `x` are the numbers of the
    rows, of any dtype that counts so far; `weights`, of its shape, are 0 where a lookup does not count.

    Args:
        input_dim: number of rows of the table.
        output_dim: their length.
        transposed: whether the variable is the table's transpose. Default False.
    """

    structure = Structure.LOOKUP
    transposed: bool

    def __init__(self, input_dim: int, output_dim: int, transposed: bool = False) -> None:
        self.groups, self.width, self.use_bias = 1, input_dim, False
        self.input_dim, self.output_dim, self.transposed = input_dim, output_dim, transposed

    def partitions(self, split: int | None) -> tuple[Parts, Parts]:
        return ((self.width, 1),), diagonal.partition(self.output_dim, False, split)

    def input_blocks(self, x: Tensor, parts: Parts, weights: Tensor | None = None) -> list[Tensor]:
        ids = ops.cast(ops.reshape(x, (-1,)), "int32")
        counted = (
            ops.ones_like(ids, dtype=x.dtype) if weights is None else ops.cast(ops.reshape(weights, (-1,)), x.dtype)
        )
        counts = ops.segment_sum(counted, ids, num_segments=self.width)
        return [ops.reshape(counts / ops.maximum(ops.sum(counted), 1.0), (1, self.width, 1, 1))]

    def gradient_rows(self, ds: Tensor) -> Tensor:
        return by_position(ds, self.output_dim)

    def to_matrix(self, parameters: Sequence[Tensor]) -> Tensor:
        [table] = parameters
        return ops.expand_dims(ops.transpose(table) if self.transposed else table, 0)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        return [ops.transpose(matrix[0]) if self.transposed else matrix[0]]


class ProjectionGeometry(LookupGeometry):
    """The same table where inputs `h` are projected on its rows: `s = h E^T`, one number for each row.

    With the rows of the table as inputs of the matrix, as for lookups, its Fisher block is `diag(E[s'^2]) (x) E[h h^T]`, with the
    gradients `s'`; the matrix of their second moments, of the size of the vocabulary squared, is taken for diagonal. The
    first factor is scaled to the trace 1, which that of lookups has, and the second by as much: so the mean of the
    first and the sum of the second over both uses of a table keep the sum of both traces.
    """

    def factor_blocks(
        self, x: Tensor, ds: Tensor, partitions: tuple[Parts, Parts], weights: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        inputs, count = visible(flat(self.gradient_rows(x)), weights)
        squares = ops.sum(ops.square(ops.reshape(ds, (-1, self.width))), axis=0)
        total = ops.sum(squares)
        shares = ops.where(total > 0, squares / ops.where(total > 0, total, 1.0), 1.0 / self.width)
        second = [block * (total / count) for block in diagonal.gram_blocks(inputs, partitions[1])]
        return [ops.reshape(shares, (1, self.width, 1, 1))], second


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class Embedding(Captured, keras.layers.Embedding):
    """A `keras.layers.Embedding` that natural-gradient methods observe; see `keras_ngd.layers.Dense` and `LookupGeometry`.

    With `mask_zero=True` lookups of 0 do not count. On TensorFlow its gradient is sparse, and travels so between workers;
    preconditioned, it is dense, as momenta are.
    """

    plain = keras.layers.Embedding

    def parts(self) -> dict[str, Part]:
        return {
            "statistics": Part(LookupGeometry(self.input_dim, self.output_dim), [keras_private.embeddings_of(self)])
        }

    def call(self, inputs: Tensor) -> Tensor:
        return self.observed_lookups(inputs, super().call(inputs))

    def observed_lookups(self, inputs: Tensor, results: Tensor) -> Tensor:
        """The results of the lookups `inputs`, past the probe."""
        if self.statistics is None:
            return results
        # Numbers that the loss could be differentiated by, which a probe asks of its inputs.
        numbers = ops.cast(inputs, "float32")
        weights = ops.not_equal(inputs, 0) if self.mask_zero else None
        results = of_lookups(results, self.statistics)
        return probe(results, numbers, self.statistics.geometry, self.statistics, weights)


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class ReversibleEmbedding(Embedding, keras.layers.ReversibleEmbedding):
    """A `keras.layers.ReversibleEmbedding` that natural-gradient methods observe; see `Embedding` and `ProjectionGeometry`.

    With tied weights the table is one block, whose two uses count like two calls of a layer. Otherwise the projection's table is
    a block of its own, of the same form.
    """

    plain = keras.layers.ReversibleEmbedding

    def parts(self) -> dict[str, Part]:
        # Not by `super()`: `self` may be a plain layer.
        parts = Embedding.parts(self)
        if not self.tie_weights:
            geometry = ProjectionGeometry(self.input_dim, self.output_dim, transposed=True)
            parts["reverse_statistics"] = Part(geometry, [self.reverse_embeddings])
        return parts

    def call(self, inputs: Tensor, reverse: bool = False) -> Tensor:
        plain: Any = keras.layers.ReversibleEmbedding
        if self.statistics is None:
            return plain.call(self, inputs, reverse=reverse)
        if not reverse:
            results = plain.call(self, inputs)
            observed = self.observed_lookups(inputs, results)
            keras_private.set_mask(observed, keras_private.mask_of(results))
            return observed
        kernel = ops.transpose(self.embeddings) if self.tie_weights else self.reverse_embeddings
        if self.reverse_dtype is not None:
            inputs, kernel = ops.cast(inputs, self.reverse_dtype), ops.cast(kernel, self.reverse_dtype)
        statistics = self.statistics if self.tie_weights else self.reverse_statistics
        logits = learned(ops.matmul, inputs, [kernel], statistics, products=True)
        geometry = ProjectionGeometry(self.input_dim, self.output_dim, transposed=not self.tie_weights)
        logits = probe(logits, inputs, geometry, statistics, keras_private.mask_of(inputs))
        if self.logit_soft_cap is not None:
            logits = ops.multiply(ops.tanh(ops.divide(logits, self.logit_soft_cap)), self.logit_soft_cap)
        return logits
