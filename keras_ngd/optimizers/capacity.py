"""How much room there is for the rows of a batch, where the user does not say."""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from keras_ngd import backend, keras_private, replica
from keras_ngd.statistics import RowStatistics
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import Tensor, Variable

# Where neither data, nor the model, nor the first trace says how large a batch is.
DEFAULT_CAPACITY = 128


# A mixin, which a type checker is to see as what it is mixed with.
if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient as Base
else:
    Base = object


class Capacity(Base):
    """Mixin for methods on rows: room for a batch is made as late as it can be.

    With `batch_size` it is that. Else it is as a checkpoint has it. Else it is the size of the batch that the captured layers are
    called with before the optimizer is built, where that is static, but no less than what `capture`'s `data` or the batch
    dimension of the model's inputs say; 128 examples where nothing does. All layers have the same room; the first that is
    called decides.

    Weights cannot be made just anywhere. TensorFlow's trainer differentiates with respect to the variables that there are after
    the forward pass, so they are made in it. Keras's trainer on JAX calls a model with the first batch's shapes, then builds
    the optimizer and collects the variables: they are made when it is built, and likewise in a strategy of `tf.distribute`.
    """

    # What data or the model say, or what was seen; whether less than that may be made; what the first layer was called with,
    # and its statistics; whether gradients have arrived, whose shapes are those of the room.
    _found_capacity: int | None = None
    _shrinks: bool = True
    _seen: int | None = None
    _first: Callable[[], RowStatistics | None] | None = None
    _stepping: bool = False

    @property
    def capacity(self) -> int:
        """How many examples of a worker there is room for; of a larger batch the leading ones are recorded."""
        if self.batch_size is not None:
            return self._room(self._share(self.batch_size))
        return self._found_capacity or self._room(DEFAULT_CAPACITY)

    @property
    def strict(self) -> bool:
        """Whether larger batches are an error."""
        return self.batch_size is not None

    def _room(self, examples: int) -> int:
        """How many of a batch's examples are recorded."""
        fraction = self.labels.fraction
        return examples if fraction is None else max(int(examples * fraction), 1)

    def _share(self, batch_size: int) -> int:
        return math.ceil(batch_size * self.exchange.communicator.batch_share - 1e-6)

    def start_capacity(self, batch_size: int | None) -> None:
        """Starts with what data or the model say about the size of all workers' batch, or with None."""
        self._found_capacity = None if batch_size is None else self._room(self._share(batch_size))
        self._shrinks, self._seen, self._first = batch_size is None, None, None

    def called(self, statistics: Statistics, x: Tensor) -> None:
        super().called(statistics, x)
        if not isinstance(statistics, RowStatistics) or self.strict or self.built or statistics.loaded:
            return
        if self._first is None or self._first() is None:
            # Past Keras, which looks into what optimizers have as attributes.
            object.__setattr__(self, "_first", weakref.ref(statistics))
        examples = x.shape[0]
        first = self._first
        if first is None or first() is not statistics or not isinstance(examples, int) or not examples:
            return
        makes, training = backend.makes_variables(), getattr(keras_private.call_context(), "training", None)
        if makes and (replica.context() is not None or training is False):
            return
        self._seen = self._room(examples)
        if makes:
            with backend.outside_trace():
                self._make_capacity()

    def _make_capacity(self) -> list[tuple[Variable, Variable]]:
        """Gives all layers room for what was seen. Returns pairs of variables that were and of those in their place."""
        model = self.captured_model()
        if (
            model is None
            or self._seen is None
            or not (self._seen > self.capacity or (self._shrinks and self._seen < self.capacity))
        ):
            return []
        self._found_capacity = self._seen
        pairs: list[tuple[Variable, Variable]] = []
        found = [
            s for s in keras_private.flatten_layers(model) if isinstance(s, RowStatistics) and s.is_watched_by(self)
        ]
        for number, statistics in enumerate(found):
            new, before = self.make_statistics(statistics.owner()), list(statistics.weights)
            statistics.resize([getattr(new, name) for name in new.sizes])
            pairs += zip(before, statistics.weights, strict=True)
            self.start_statistics(statistics, number)
        return pairs

    def build(self, variables: Sequence[Variable]) -> None:
        if self.built:
            return
        variables = list(variables)
        recorded = [v.keras_ngd_statistics for v in variables if hasattr(v, "keras_ngd_statistics")]
        recorded = [statistics for statistics in recorded if isinstance(statistics, RowStatistics)]
        if recorded and not self.strict:
            if not self._stepping and not any(statistics.loaded for statistics in recorded):
                made = {id(old): new for old, new in self._make_capacity()}
                variables = [made.get(id(v), v) for v in variables]
            self._found_capacity = recorded[0].batch_size
        super().build(variables)

    def apply(self, grads: Sequence[Tensor], trainable_variables: Sequence[Variable] | None = None) -> None:
        self._stepping = True
        super().apply(grads, trainable_variables)
