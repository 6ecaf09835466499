"""What all captured layers share: owning statistics, and saving and loading them with the layer."""

from typing import TYPE_CHECKING, Any

import keras

from keras_ngd import keras_private
from keras_ngd.layers.rows import Rows
from keras_ngd.typing import Config

if TYPE_CHECKING:
    from keras_ngd.statistics.statistics import Statistics


# A mixin in front of some layer of Keras's, which a type checker is to see as one.
if TYPE_CHECKING:
    from keras.layers import Layer as Base
else:
    Base = object


class Captured(Base):
    """Mixin in front of a Keras layer whose pre-activation passes through a probe.

    Subclasses set `plain` (the Keras layer they extend) and define `_rows()`. A captured layer computes what the plain
    one does; without statistics it *is* the plain one.

    Args:
        statistics: the layer's `Statistics`, unattached. Default None: `keras_ngd.capture` attaches them. Set when a
            saved captured model is loaded.
    """

    plain: Any = None
    statistics: "Statistics | None"

    def __init__(self, *args: Any, statistics: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.statistics = None
        self._pending_statistics = statistics

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        pending, self._pending_statistics = self._pending_statistics, None
        if pending is not None:
            self.attach_statistics(keras.saving.deserialize_keras_object(pending))

    def attach_statistics(self, statistics: "Statistics") -> None:
        """Makes the built layer record `statistics` from the next trace on."""
        self.detach_statistics()
        dtype = "float64" if self.variable_dtype == "float64" else "float32"
        with keras_private.unlocked(self):
            statistics.attach(self, self._rows(), dtype)
            self.statistics = statistics

    def detach_statistics(self) -> None:
        """Drops the layer's statistics, if it has any."""
        statistics = getattr(self, "statistics", None)
        if statistics is not None:
            with keras_private.unlocked(self):
                keras_private.forget_sub_layer(self, statistics)
                self.statistics = None

    def _rows(self) -> Rows:
        """The layer's `Rows`."""
        raise NotImplementedError

    def get_config(self) -> Config:
        config = super().get_config()
        if self.statistics is not None:
            config["statistics"] = keras.saving.serialize_keras_object(self.statistics)
        return config
