"""`keras.layers.RNN`, `SimpleRNN`, `LSTM` and `GRU` with probes on the pre-activations of their cells."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd import keras_private
from keras_ngd.layers.captured import Captured, Part, register_kind
from keras_ngd.layers.recurrent_cells import GRUCell, LSTMCell, RecurrentCell, SimpleRNNCell, arguments_not_saved
from keras_ngd.layers.time_steps import Slots
from keras_ngd.typing import Config, Tensor

# The captured classes of cells, by the plain ones.
CELLS: dict[type, type[RecurrentCell]] = {kind.plain: kind for kind in (SimpleRNNCell, LSTMCell, GRUCell)}


class RecurrentLayer(Captured):
    """What the captured recurrent layers share: they record what their cells compute, of all steps at once.

    Their cells become captured cells, which compute each step by themselves and have no statistics of their own; those of a
    `StackedRNNCells` that are of no captured kind stay as they are, and follow the rule of the rest.
    """

    rows_of = "input"

    def stands_for(self) -> list[keras.layers.Layer]:
        return [cell for _, cell in _cells(self)]

    def parts(self) -> dict[str, Part]:
        return {
            _name(number, name): part for number, cell in _cells(self) for name, part in _kind(cell).parts(cell).items()
        }

    def build(self, sequences_shape: Any = None, initial_state_shape: Any = None) -> None:
        super().build(sequences_shape)

    def attach_statistics(self, statistics: Any) -> None:
        super().attach_statistics(statistics)
        for _, cell in _cells(self):
            cell.__class__ = _kind(cell)

    def detach_statistics(self) -> None:
        super().detach_statistics()
        for _, cell in _cells(self):
            cell.__class__ = _kind(cell).plain

    def inner_loop(self, sequences: Tensor, initial_state: Any, mask: Any, training: bool = False) -> Any:
        if self.statistics is None:
            return super().inner_loop(sequences, initial_state, mask, training=training)
        mask = keras.tree.flatten(mask)[0] if keras.tree.is_nested(mask) else mask
        shape, statistics = tuple(ops.shape(sequences)[:2]), self.all_statistics()
        slots = {name: Slots.of(statistics[name], shape, cell.compute_dtype, mask) for name, cell in self._sent()}

        def step(inputs: Sequence[Tensor], states: Any) -> Any:
            x, *tensors = inputs
            here = {name: slots[name].at(tensor) for name, tensor in zip(slots, tensors, strict=True)}
            with self._sending(here):
                output, new_states = self.cell(x, states, training=training)
            return output, new_states if keras.tree.is_nested(new_states) else [new_states]

        return keras_private.over_time(
            step,
            (sequences, *(of_part.tensor for of_part in slots.values())),
            initial_state if keras.tree.is_nested(initial_state) else [initial_state],
            go_backwards=self.go_backwards,
            mask=mask,
            unroll=self.unroll,
            input_length=sequences.shape[1],
            zero_output_for_mask=self.zero_output_for_mask,
            return_all_outputs=self.return_sequences,
        )

    def _sent(self) -> Iterator[tuple[str, Any]]:
        """Pairs of each part and the cell that it is of."""
        for number, cell in _cells(self):
            for name in cell.parts():
                yield _name(number, name), cell

    @contextlib.contextmanager
    def _sending(self, slots: Mapping[str, Slots]) -> Iterator[None]:
        """A context in which the cells send what they compute to these slots, by part."""
        for number, cell in _cells(self):
            cell.sends_to = {name: slots[_name(number, name)] for name in cell.parts()}
        try:
            yield
        finally:
            for _, cell in _cells(self):
                cell.sends_to = None

    def get_config(self) -> Config:
        config = super().get_config()
        return config if "cell" in config else {**config, **arguments_not_saved(self.cell)}


def _cells(layer: Any) -> list[tuple[int, Any]]:
    """The cells of a recurrent layer, plain or captured, that are of a captured kind, numbered."""
    cells = layer.cell.cells if type(layer.cell) is keras.layers.StackedRNNCells else [layer.cell]
    return list(enumerate(cell for cell in cells if type(cell) in CELLS or type(cell) in CELLS.values()))


def _kind(cell: Any) -> type[RecurrentCell]:
    return CELLS.get(type(cell), type(cell))


def _name(number: int, part: str) -> str:
    """A layer's name of a cell's part; the first cell's parts are called as if there were no other."""
    return part if number == 0 else f"cell_{number}_{part}"


class WithFusedLoop(RecurrentLayer):
    """Of layers that have a fused loop as well, cuDNN's or one of the backend's, in which nothing can be observed."""

    @property
    def use_cudnn(self) -> bool | str:
        # Keras asks it wherever it would take a fused loop; that of a `Bidirectional`, too.
        if getattr(self, "statistics", None) is not None:
            return False
        try:
            found: bool | str = self.__dict__["use_cudnn"]
        except KeyError:
            # TensorFlow's tracking asks for what is set for the first time.
            raise AttributeError("use_cudnn") from None
        return found

    @use_cudnn.setter
    def use_cudnn(self, value: bool | str) -> None:
        self.__dict__["use_cudnn"] = value


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class RNN(RecurrentLayer, keras.layers.RNN):
    """A `keras.layers.RNN` whose cells natural-gradient methods observe; see `keras_ngd.layers.LSTM`.

    Its cell is a `SimpleRNNCell`, `LSTMCell` or `GRUCell`, or a `StackedRNNCells` (or list) with some of these in it.
    """

    plain = keras.layers.RNN


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class SimpleRNN(RecurrentLayer, keras.layers.SimpleRNN):
    """A `keras.layers.SimpleRNN` that natural-gradient methods observe; see `keras_ngd.layers.LSTM`."""

    plain = keras.layers.SimpleRNN


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class LSTM(WithFusedLoop, keras.layers.LSTM):
    """A `keras.layers.LSTM` whose steps natural-gradient methods observe; see `keras_ngd.layers.Dense`.

    With `x_t` the inputs and `h_t` the state, as the kernels multiply them (after dropout), and `g_t` the gradient of the
    pre-activation of all gates,

        a_t = [x_t, h_{t-1}, 1],        s_t = a_t^T [K; U; b],        V = sum over t of a_t g_t^T

    `K` and `U` being kernel and recurrent kernel: one matrix, whose rows count like positions of a `Dense` layer. That takes
    steps for independent of each other (Martens, Ba & Johnson 2018). Steps hidden by a mask do not count.

    With `recurrent_dropout`, or `dropout` and `implementation=1`, Keras drops other inputs for each gate: each is a matrix of its
    own then. Where a layer records, its steps are computed by its cell: never by cuDNN or another fused loop.
    """

    plain = keras.layers.LSTM


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class GRU(WithFusedLoop, keras.layers.GRU):
    """A `keras.layers.GRU` whose steps natural-gradient methods observe; see `keras_ngd.layers.LSTM`.

    With `reset_after` (the default) there are two matrices, as the gradient of what is reset after it was multiplied is another:

        x_t^T K,        h_{t-1}^T U

    Their biases are the two rows of one variable, which follows the rule of the rest. Without it, what the candidate
    sees of the state is reset before, so that gates see inputs of their own: `[K; U; b]` is three matrices, one for each gate.
    """

    plain = keras.layers.GRU
