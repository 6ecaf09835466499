"""What all captured layers share: owning statistics, and saving and loading them with the layer."""

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import keras

from keras_ngd import keras_private
from keras_ngd.layers.geometry import Geometry
from keras_ngd.typing import Config, Variable

if TYPE_CHECKING:
    from keras_ngd.statistics.statistics import Statistics


# A mixin in front of some layer of Keras's, which a type checker is to see as one.
if TYPE_CHECKING:
    from keras.layers import Layer as Base
else:
    Base = object


class Part(NamedTuple):
    """One weight matrix of a layer.

    Attributes:
        geometry: how it is presented.
        parameters: the layer's variables that it is made of, in the order in which `geometry.to_matrix` takes them.
    """

    geometry: Geometry
    parameters: Sequence[Variable]

    @classmethod
    def of(cls, geometry: Geometry, *parameters: Variable | None) -> Self:
        """The part that consists of those of the parameters that there are: a layer may have no bias."""
        return cls(geometry, [p for p in parameters if p is not None])


class Captured(Base, metaclass=abc.ABCMeta):
    """Mixin in front of a Keras layer whose pre-activations pass through probes, one for each of its weight matrices.

    Subclasses set `plain` (the Keras layer they extend) and define `parts`. A captured layer computes what the plain
    one does; without statistics it *is* the plain one.

    Args:
        statistics: the layer's `Statistics`, unattached. Default None: `keras_ngd.capture` attaches them. Set when a
            saved captured model is loaded; so are those of other parts, under the names of these.

    Attributes:
        statistics: those of the first part; None where nothing is recorded.
    """

    plain: Any = None
    statistics: "Statistics | None"

    # Whether `keras_ngd.capture` captures layers of this kind unless it is told to leave them out.
    by_default = True

    # What has a position for each of an example's rows: the layer's "output", or its "input".
    rows_of = "output"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = [name for name in kwargs if name == "statistics" or name.endswith("_statistics")]
        pending = {name: kwargs.pop(name) for name in names}
        super().__init__(*args, **kwargs)
        self.statistics = None
        self._pending_statistics = {name: value for name, value in pending.items() if value is not None}

    @abc.abstractmethod
    def parts(self) -> dict[str, Part]:
        """The weight matrices of the built layer, by the names of the attributes that are to be their statistics.

        The first is named `statistics`, others end in `_statistics`. Called of plain layers, too, with these as `self`.
        Parameters of no part follow the rule of the rest.

        Raises:
            ValueError: where it has none that could be captured; says why.
        """

    def stands_for(self) -> "list[keras.layers.Layer]":
        """The layers in it whose weights its parts are made of, which are not captured by themselves. Default: none.

        Called of plain layers, too. A layer of weights of its own stands for none.
        """
        return []

    def build(self, input_shape: Any = None) -> None:
        super().build(input_shape)
        pending, self._pending_statistics = self._pending_statistics, {}
        if pending:
            self.attach_configs(pending)

    def attach_configs(self, configs: dict[str, Config]) -> None:
        """`attach_statistics` of what `statistics_configs` gave."""
        self.attach_statistics({n: keras.saving.deserialize_keras_object(c) for n, c in configs.items()})

    def statistics_configs(self) -> dict[str, Config]:
        """The statistics of all parts as Keras serializes them, by part."""
        return {n: keras.saving.serialize_keras_object(s) for n, s in self.all_statistics().items()}

    def attach_statistics(self, statistics: "dict[str, Statistics]") -> None:
        """Makes the built layer record these from the next trace on; by part."""
        self.detach_statistics()
        dtype = "float64" if self.variable_dtype == "float64" else "float32"
        with keras_private.unlocked(self):
            for name, part in self.parts().items():
                statistics[name].attach(self, name, part.geometry, dtype)
                setattr(self, name, statistics[name])

    def detach_statistics(self) -> None:
        """Drops the layer's statistics, if it has any."""
        for name, statistics in self.all_statistics().items():
            with keras_private.unlocked(self):
                keras_private.forget_sub_layer(self, statistics)
                setattr(self, name, None)

    def all_statistics(self) -> "dict[str, Statistics]":
        """The statistics of all parts, by part; empty where nothing is recorded."""
        if getattr(self, "statistics", None) is None:
            return {}
        return {name: getattr(self, name) for name in self.parts()}

    def get_config(self) -> Config:
        # Those that wait for the layer to be built, if any do: wrappers make layers anew of their configs.
        return {**super().get_config(), **getattr(self, "_pending_statistics", {}), **self.statistics_configs()}


# What `capture` makes of which layers.
CAPTURED_KINDS: dict[type, type] = {}


def kind_of(layer: Any) -> Any:
    """The captured class of a layer, plain or captured, or None."""
    return type(layer) if type(layer) in CAPTURED_KINDS.values() else CAPTURED_KINDS.get(type(layer))


def register_kind(kind: type) -> type:
    """Has `keras_ngd.capture` turn layers of the class `kind.plain` into captured ones of the class `kind`.

    For kinds of layers of your own; those of Keras that are in this package are registered. May be used as a decorator.

    Args:
        kind: a subclass of `Captured` and of `kind.plain`, which computes what that does.

    Raises:
        TypeError: if it is none.
    """
    plain = getattr(kind, "plain", None)
    if not (
        isinstance(kind, type) and isinstance(plain, type) and issubclass(kind, Captured) and issubclass(kind, plain)
    ):
        raise TypeError(
            "`kind` must be a class over `keras_ngd.layers.Captured` and over the layer that it captures, with that layer's "
            f"class as its `plain`. Received: {kind!r}, whose `plain` is {plain!r}"
        )
    CAPTURED_KINDS[plain] = kind
    return kind


def keeps_call(cls: type) -> type:
    """Has `keras_ngd.capture` treat a subclass of a layer that it captures like that layer. May be used as a decorator.

    A subclass might compute something else, so it is left to the rule of the rest unless it says that it does not. The captured
    class, `Captured` and the subclass's name, is made here, and saved and loaded under the subclass's module.

    ```python
    @keras_ngd.layers.keeps_call
    class Projection(keras.layers.Dense):
        ...  # other initializers, a `get_config`, but no `call`
    ```

    Args:
        cls: a subclass of a captured layer of Keras's, with its `call`.

    Returns:
        The subclass.

    Raises:
        TypeError: if it extends no captured layer, or has a `call` of its own.
    """
    bases: Any = getattr(cls, "__mro__", ())
    plain = next((base for base in bases[1:] if base in CAPTURED_KINDS), None)
    if plain is None:
        raise TypeError(
            f"`keeps_call` is for subclasses of layers that `keras_ngd.capture` captures. Received: {cls!r}"
        )
    if cls.call is not plain.call:  # type: ignore[attr-defined]
        raise TypeError(
            f"{cls.__name__} has a `call` of its own, which need not compute what that of {plain.__name__} does: write a "
            "captured class for it, and register that with `keras_ngd.layers.register_kind`."
        )
    kind = type(f"Captured{cls.__name__}", (CAPTURED_KINDS[plain], cls), {"plain": cls, "__doc__": cls.__doc__})
    keras.saving.register_keras_serializable(cls.__module__)(kind)
    register_kind(kind)
    return cls
