"""Layers that make captured layers of their own, which their config does not list: how these are saved and loaded."""

from typing import TYPE_CHECKING, Any

from keras_ngd import keras_private
from keras_ngd.layers.captured import Captured, kind_of
from keras_ngd.typing import Config

# A mixin in front of some layer of Keras's, which a type checker is to see as one.
if TYPE_CHECKING:
    from keras.layers import Layer as Base
else:
    Base = object

# What `capture` makes of layers that contain captured ones, by class.
CONTAINER_KINDS: dict[type, type] = {}


class Container(Base):
    """Mixin in front of a Keras layer that makes layers of its own when it is made or built, such as an attention layer.

    Keras would make them plain again when a saved model is loaded. A container says in its config which of them are captured,
    and captures them anew. Subclasses set `plain`, and call `capture_contained` once these layers are built.

    Args:
        captured: dict from the names of captured layers in it to the configs of their statistics, by part. Default None.
    """

    plain: Any = None

    def __init__(self, *args: Any, captured: "dict[str, dict[str, Config]] | None" = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending_captures = captured

    def capture_contained(self) -> None:
        """Captures the layers that the config said are captured."""
        pending, self._pending_captures = getattr(self, "_pending_captures", None), None
        inner = {layer.name: layer for layer in keras_private.flatten_layers(self) if layer is not self}
        for name, configs in (pending or {}).items():
            layer: Any = inner[name]
            layer.__class__ = kind_of(layer)
            layer.attach_configs(configs)

    def captured_layers(self) -> list[Captured]:
        """The layers in it that record statistics."""
        inner = [layer for layer in keras_private.flatten_layers(self) if layer is not self]
        return [layer for layer in inner if isinstance(layer, Captured) and layer.all_statistics()]

    def get_config(self) -> Config:
        captured = {layer.name: layer.statistics_configs() for layer in self.captured_layers()}
        return {**super().get_config(), **({"captured": captured} if captured else {})}


def register_container(kind: type) -> type:
    """Has `keras_ngd.capture` turn layers of the class `kind.plain` that contain captured ones into those of the class `kind`."""
    CONTAINER_KINDS[kind.plain] = kind  # type: ignore[attr-defined]
    return kind
