"""The sub-layer of a captured layer that owns its statistics weights."""

import abc
import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ngd import backend, keras_private, replica, sharding
from keras_ngd.statistics.emission import SENTINEL, TALLIED, emission, mixed
from keras_ngd.typing import Config, Initializer, Shape, Store, Tensor, Variable

# Functions of a geometry and a kind of statistics, shared by all layers that have both.
_EMISSIONS: dict[Any, Callable[..., Any]] = {}

# All that have a layer, and how many layers are to emit by one function for it to be called (`backend.called`).
_ATTACHED: "weakref.WeakSet[Statistics]" = weakref.WeakSet()
_SEVERAL = 3

# The statistics whose loss was read last.
_LAST_READ: list["weakref.ref[Statistics]"] = []


class Statistics(keras.layers.Layer, abc.ABC):
    """Running averages of what one layer sees, updated in the backward pass.

    Subclasses add the averaged weights (`create`) and observe one batch (`observe`). The average itself is taken here, in
    the probe: `average <- (1 - gate) average + gate observed`. That keeps it one chain of in-place updates: a closed
    gate costs nothing, and nothing of the averages' size but the averages themselves ever lives. Averages are linear,
    so a mean over calls or workers of what the probe emits is the average of the means. Statistics that are not running
    averages override `merge`.

    Further weights:
        gate: the weight with which the next batch enters the averages, in (0, 1]; 0 closes the probe. Written by
            the optimizer; a plain optimizer leaves it at 1.
        tally: `[3]`, of the last pass:
            calls, how often the layer was called;
            accepted, how many of these calls were observed, fewer if some were not finite;
            examples, the length of the batch, summed over the calls.
        sentinel: `SENTINEL` for each of the calls, by which the optimizer sees whether what it gets is what was emitted.
        label_draw: `[3]`, where labels are drawn (`sampled_fraction`): whether they are for the next batch, and the numbers of
            the draw. Written by the optimizer, the same for all layers; a plain optimizer sets it to 0. None elsewhere.
        loss: `[2]`, of one layer of a model alone, whose `carries_loss` is set: the optimizer has the loss and a 1 arrive as its
            gradient. None elsewhere.

    `controls` are further weights that `merge` reads and may change, such as a seed; the optimizer may write them.

    `reached` tells whether a backward pass was ever traced through the probe, `traced_calls` how often the last one was, and
    `looped` whether that was inside of a loop, whose backward pass is traced once for all turns.

    All weights are marked `overwrite_with_gradient`, so every Keras optimizer overwrites them with what the probe emits.

    Args:
        sampled_fraction: the share of a batch's examples, its first ones, whose labels are drawn from the model; they alone are
            observed. Default None: labels are the data's, and all examples are given to `observe`.
        shard_state: whether the devices of a `keras.distribution` have a part of the averages each. Default False.
        carries_loss: whether there is a weight as whose gradient the loss arrives. Default False.
        **kwargs: `keras.layers.Layer`'s.
    """

    geometry: Any
    loss: Variable | None
    label_draw: Variable | None
    gate: Variable
    tally: Variable
    sentinel: Variable
    part: str
    sampled_fraction: Any
    _averages: list[Variable]
    _controls: list[Variable]

    def __init__(
        self,
        shard_state: bool = False,
        carries_loss: bool = False,
        sampled_fraction: float | None = None,
        **kwargs: Any,
    ) -> None:
        unattached: Any = None
        self.shard_state, self.carries_loss, self.sampled_fraction = shard_state, carries_loss, sampled_fraction
        kwargs.setdefault("name", "statistics")
        super().__init__(**{"dtype": "float32", **kwargs})
        self.geometry, self.loss, self._loss_read = unattached, None, None
        self.label_draw, self._label_draw_read, self.learns_from_others = None, None, False
        self.reached = False
        self.traced_calls, self._trace = 0, None
        self.looped, self._called_anew = False, False
        # Why the layer's calls can emit nothing, if they cannot.
        self.vectorized: str | None = None
        self._watcher: weakref.ref[Any] | None = None

    def owner(self) -> Any:
        """The captured layer these statistics belong to. Not a property: Keras saves and loads what those return."""
        return self._owner()

    def parameters(self) -> list[Variable]:
        """The layer's variables that these statistics describe."""
        return list(self.owner().parts()[self.part].parameters)

    def path_of_part(self) -> str:
        """The layer's path, and which part of it these statistics describe, where it has several."""
        path = self.owner().path
        return path if self.part == "statistics" else f"{path}/{self.part.removesuffix('_statistics')}"

    def attach(self, owner: keras.layers.Layer, part: str, geometry: Any, dtype: str) -> None:
        """Creates the weights for a part of the layer `owner`, which is of this geometry."""
        self._owner = weakref.ref(owner)
        # Of several parts of a layer, each has paths of its own.
        self.part = self.name = part
        self.geometry = geometry
        self._averages = self.create(geometry, dtype)
        self._controls = self.create_controls()
        self.gate = self._add("gate", (), "ones", "float32")
        self.tally = self._add("tally", (len(TALLIED),), keras.initializers.Constant([1.0, 1.0, 0.0]), "float32")
        self.sentinel = self._add("sentinel", (), keras.initializers.Constant(SENTINEL), "float32")
        self.label_draw = self._add("label_draw", (3,), "zeros", "float32") if self.sampled_fraction else None
        self.loss = self._add("loss", (2,), "zeros", "float32") if self.carries_loss else None
        # Keras compiles no step with XLA that has a layer which does not support it; workers cannot meet inside one. (What is
        # for a TPU is compiled all the same.)
        self.supports_jit = not (backend.several_processes() or replica.several())
        self.built = True
        _ATTACHED.add(self)

    def recreate(self) -> None:
        """Makes all weights anew, after arguments that their shapes depend on were changed."""
        owner, dtype = self.owner(), backend.dtype_name(self._averages[0])
        for variable in list(self.weights):
            keras_private.forget_weight(self, variable)
        with contextlib.ExitStack() as scopes:
            for name in owner.path.split("/"):
                scopes.enter_context(keras.name_scope(name))
            scopes.enter_context(keras_private.unlocked(self))
            self.attach(owner, self.part, self.geometry, dtype)

    def _add(self, name: str, shape: Shape, initializer: Initializer, dtype: str) -> Variable:
        def add_weight(shape: Shape, initializer: Initializer) -> Variable:
            return self.add_weight(
                name=name,
                shape=shape,
                initializer=initializer,
                dtype=dtype,
                trainable=True,
                autocast=False,
                # On TPUs what is to be averaged over replicas on assignment is; elsewhere the optimizer assigns each one's own.
                aggregation="none" if backend.on_tpu() else "mean",
                overwrite_with_gradient=True,
            )

        spread = sharding.spread(shape, self.shard_state)
        weight = add_weight(shape, initializer) if spread is None else sharding.add(add_weight, initializer, spread)
        weight.keras_ngd_statistics = self
        return weight

    def watched_by(self, watcher: Any) -> None:
        """Has `watcher.called(statistics, x)` called wherever the layer is, with its input; `watcher` is held weakly."""
        self._watcher = weakref.ref(watcher)

    def is_watched_by(self, watcher: Any) -> bool:
        """Whether `watcher` was given to `watched_by` last."""
        return self._watcher is not None and self._watcher() is watcher

    def called(self, x: Tensor) -> None:
        """Told by the probe that the layer is called with `x`, before the weights are looked at."""
        # A call after a backward pass begins another pass.
        self._called_anew = True
        watcher = None if self._watcher is None else self._watcher()
        if watcher is not None:
            watcher.called(self, x)

    @property
    def averages(self) -> list[Variable]:
        """The averaged weights, in the order of `create`."""
        return list(self._averages)

    @property
    def controls(self) -> list[Variable]:
        """The controlling weights, in the order of `create_controls`."""
        return list(self._controls)

    def tallied(self, name: str) -> Tensor:
        """One of the numbers of `tally`: "calls", "accepted" or "examples"."""
        return ops.convert_to_tensor(self.tally)[TALLIED.index(name)]

    # Whether what several calls of a layer in one step emit can be averaged.
    several_calls = True

    # Whether what several passes emit, each with a batch of its own, can be averaged.
    adds_up = True

    # Whether to merge is to walk through all that was observed, which several devices are better off doing each for itself.
    merges_together = False

    @abc.abstractmethod
    def create(self, geometry: Any, dtype: str) -> list[Variable]:
        """Adds the averaged weights with `self._add` and returns them."""

    def create_controls(self) -> list[Variable]:
        """Adds weights that control what is emitted with `self._add` and returns them. Default: none."""
        return []

    def check(self, geometry: Any, x: Tensor) -> None:
        """Raises a `ValueError` if the layer's input cannot be observed, as far as its static shape tells."""

    @abc.abstractmethod
    def observe(
        self, geometry: Any, x: Tensor, ds: Tensor, weights: Tensor | None, controls: Sequence[Tensor], dtype: str
    ) -> tuple[Sequence[Tensor], Tensor]:
        """This batch's values of the averaged weights, and a scalar that is not finite if any of them is not.

        A function of its arguments and of the statistics' own arguments; the weights are not looked at.

        Args:
            geometry: how the layer presents itself: a `Geometry` of a structure that these statistics are for.
            x: the layer's input.
            ds: the gradient of what comes out.
            weights: optional weights of the rows, such as a mask.
            controls: values of the controlling weights.
            dtype: of the averages.
        """

    def merge(
        self,
        averages: Sequence[Tensor],
        observed: Sequence[Tensor],
        controls: Sequence[Tensor],
        finite: Tensor,
        gate: Tensor,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """New averages from the old ones and what was observed, and new controls.

        The averages are used only where what was observed is `finite`.
        """
        return [mixed(average, value, gate) for average, value in zip(averages, observed, strict=True)], controls

    def next_controls(self, controls: Sequence[Tensor]) -> Sequence[Tensor]:
        """Controls as they are after a batch was observed. Default: as before."""
        return controls

    def emit(
        self,
        geometry: Any,
        x: Tensor,
        ds: Tensor,
        weights: Tensor | None,
        values: Sequence[Tensor],
        looped: bool = False,
        as_read: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """New values of all weights from their old `values`: what the probe returns as their gradients.

        `as_read` is the last of them as it came into the trace, which is one object for all calls.
        """
        self.reached = True
        before, self._trace = self._trace, replica.trace_of(values[-1] if as_read is None else as_read)
        same = before is not None and before[0] is self._trace[0] and before[1] == self._trace[1]
        begins = self._called_anew or not same
        self.traced_calls, self._called_anew = (1 if begins else self.traced_calls + 1), False
        self.looped = looped or (self.looped and not begins)
        self.check(geometry, x)
        spreads = tuple(sharding.spread_of(v) for v in self._averages)
        fraction = self.sampled_fraction
        key = (type(self), repr(self.spec), geometry.key, weights is None, replica.surroundings(), spreads, fraction)
        if key not in _EMISSIONS:
            # Not `self`: a cache that outlives the layer must not keep its weights alive.
            observer = type(self).from_config(self.get_config())
            alike = [s for s in _ATTACHED if type(s) is type(self) and s.geometry.key == self.geometry.key]
            _EMISSIONS[key] = backend.traced_once(
                functools.partial(
                    emission,
                    observer,
                    geometry,
                    controls=len(self._controls),
                    spreads=spreads,
                    replicas=replica.count(),
                    fraction=fraction,
                    shared=len(alike) >= _SEVERAL,
                )
            )
        return _EMISSIONS[key](x, ds, *([] if weights is None else [weights]), values=list(values))

    def read_loss(self) -> list[Tensor]:
        """The value of `loss` in a forward pass, as a list; empty where there is none."""
        if self.loss is None:
            return []
        self._loss_read = ops.convert_to_tensor(self.loss)
        _LAST_READ[:] = [weakref.ref(self)]
        return [self._loss_read]

    def take_loss(self) -> Tensor | None:
        """The value of `loss` that the derivative of this trace is taken with respect to; None where no pass has read it."""
        # JAX's trainer has the weights' values in the forward pass alone.
        read, self._loss_read = self._loss_read, None
        return None if read is None else backend.value_read(self.loss, read)

    def loss_is_readable(self) -> bool:
        """Whether a forward pass has read the loss that `take_loss` would give here."""
        return self._loss_read is not None and backend.usable(self._loss_read)

    def read_label_draw(self) -> Tensor:
        """The value of `label_draw` in a forward pass."""
        self._label_draw_read = ops.convert_to_tensor(self.label_draw)
        return self._label_draw_read

    def label_draw_read(self) -> Any:
        """An object that is the same for all calls of the layer in a trace, and differs between traces."""
        return None if self._label_draw_read is None else replica.trace_of(self._label_draw_read)[0]

    def last_label_draw(self) -> Tensor | None:
        """The value of `label_draw` where the loss of a forward pass is computed, or None where none can be had."""
        read = self._label_draw_read
        if read is None or self.label_draw is None:
            return None
        value = backend.value_read(self.label_draw, read)
        return value if backend.usable(value) else None

    def labels_are_drawn(self) -> bool:
        """Whether, in the trace whose derivative is taken here, a loss was given what has labels drawn where it is time to."""
        watcher = None if self._watcher is None else self._watcher()
        return self.sampled_fraction is not None and watcher is not None and watcher.labels_are_drawn()

    def forget_trace(self) -> None:
        """Lets go of what the last trace left behind."""
        self._trace = None

    @property
    def spec(self) -> tuple[str, Config]:
        """What distinguishes these statistics from others: its class and arguments, without its name."""
        config = self.get_config()
        left_out = ("name", "dtype", "trainable", "shard_state", "carries_loss", "sampled_fraction")
        return (type(self).__name__, {k: v for k, v in config.items() if k not in left_out})

    def get_config(self) -> Config:
        config = super().get_config()
        names = ("shard_state", "carries_loss", "sampled_fraction")
        return config | {name: getattr(self, name) for name in names if getattr(self, name)}

    # Called before the weights are saved; raises an error if they must not be.
    before_saving: Callable[[], None] | None = None

    def save_own_variables(self, store: Store) -> None:
        if self.before_saving is not None:
            self.before_saving()
        for i, weight in enumerate(self._saved_weights()):
            store[str(i)] = sharding.to_numpy(weight)

    def _saved_weights(self) -> list[Variable]:
        # The loss is no state, and which layer of a model carries it may differ.
        return [weight for weight in self.weights if weight is not self.loss]

    def load_own_variables(self, store: Store) -> None:
        # A plain model's checkpoint has no statistics: they start afresh, as after capture.
        if store.keys():
            weights = {str(i): weight for i, weight in enumerate(self._saved_weights())}
            stored = self._as_tally({key: np.asarray(store[key]) for key in store.keys()}, len(weights))
            values = {
                key: sharding.from_numpy(weights[key], value) if key in weights else value
                for key, value in stored.items()
            }
            if self.loss is not None:
                # It is the last; Keras counts all weights.
                values[str(len(weights))] = np.zeros((2,), "float32")
            super().load_own_variables(values)

    def _as_tally(self, store: dict[str, Any], expected: int) -> dict[str, Any]:
        """What a file has of these statistics, where the numbers of the tally were weights of their own in it: as one."""
        first = len(self._averages) + len(self._controls) + 1
        if len(store) != expected + len(TALLIED) - 1:
            return store
        values = [store[str(i)] for i in range(len(store))]
        tally = np.stack(values[first : first + len(TALLIED)])
        return {str(i): value for i, value in enumerate([*values[:first], tally, *values[first + len(TALLIED) :]])}


def reader_of_the_loss() -> Statistics | None:
    """The statistics whose loss was read last in the forward pass that is differentiated here, or None.

    For an optimizer that was told of no captured model: that of a clone, which TensorFlow's trainer builds after it has scaled
    the loss.
    """
    found = _LAST_READ[0]() if _LAST_READ else None
    return found if found is not None and found.loss_is_readable() else None
