"""`keras.layers.SimpleRNNCell`, `LSTMCell` and `GRUCell` with probes on their pre-activations."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd.layers.captured import Captured, Part, register_kind
from keras_ngd.layers.time_steps import Slots, StepGeometry
from keras_ngd.typing import Config, Tensor, Variable


class RecurrentCell(Captured):
    """What the captured cells share. Subclasses say which matrices they have, and compute one step.

    In a captured `RNN`, or a layer that is one, a cell records nothing by itself: the layer does, of all steps at once. Called by
    another layer, it is a layer that is called as often as there are steps.
    """

    statistics: Any = None

    # Where the steps of a captured layer that calls the cell send their rows, by part; None outside of such a call.
    sends_to: Mapping[str, Slots] | None = None

    def parts(self) -> dict[str, Part]:
        parameters = [self.kernel, self.recurrent_kernel]
        return {"statistics": _part(parameters, self.bias, _groups(self))}

    def call(self, inputs: Tensor, states: Any, training: bool = False) -> Any:
        slots = self.sends_to
        if slots is None:
            slots = {
                name: Slots.of(statistics, (ops.shape(inputs)[0],), self.compute_dtype)
                for name, statistics in self.all_statistics().items()
            }
        if not slots:
            return super().call(inputs, states, training=training)
        return self.step(inputs, states, training, slots)

    @abc.abstractmethod
    def step(self, inputs: Tensor, states: Any, training: bool, slots: Mapping[str, Slots]) -> Any:
        """What the plain cell's call computes, with the rows of each part sent to its slots."""

    def get_config(self) -> Config:
        return {**super().get_config(), **arguments_not_saved(self)}

    def _seen(self, inputs: Tensor, state: Tensor, training: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and state as each of the gates sees them, after dropout; one of each, where all see the same."""

        def of_gates(tensor: Tensor, rate: float, make_masks: Callable[[Tensor], Any]) -> list[Tensor]:
            count = _groups(self)
            if not training or not 0.0 < rate < 1.0:
                return [tensor] * count
            masks = make_masks(tensor)
            return [tensor * mask for mask in masks] if isinstance(masks, list) else [tensor * masks] * count

        return (
            of_gates(inputs, self.dropout, self.get_dropout_mask),
            of_gates(state, self.recurrent_dropout, self.get_recurrent_dropout_mask),
        )


def _groups(cell: Any) -> int:
    """How many gates of a cell, plain or captured, see inputs of their own; 1 where all see the same."""
    gates: int = {keras.layers.LSTMCell: 4, keras.layers.GRUCell: 3}.get(_plain(cell), 1)
    masks = getattr(cell, "implementation", 2) == 1 and (cell.dropout > 0 or cell.recurrent_dropout > 0)
    return gates if masks or not getattr(cell, "reset_after", True) else 1


def _plain(cell: Any) -> Any:
    return getattr(type(cell), "plain", type(cell))


def _part(kernels: list[Variable], bias: Variable | None, groups: int) -> Part:
    geometry = StepGeometry([kernel.shape for kernel in kernels], bias is not None, groups)
    return Part.of(geometry, *kernels, bias)


def arguments_not_saved(cell: Any) -> Config:
    """Arguments that Keras leaves out of a cell's config, and what is recorded depends on."""
    return {"implementation": cell.implementation} if getattr(cell, "implementation", 2) != 2 else {}


def _combination(x: Sequence[Tensor], h: Sequence[Tensor]) -> list[Tensor]:
    """Inputs and state side by side, for each gate; one and the same tensor for gates that see the same."""
    if all(t is x[0] for t in x) and all(t is h[0] for t in h):
        return [ops.concatenate([x[0], h[0]], axis=-1)] * len(x)
    return [ops.concatenate(pair, axis=-1) for pair in zip(x, h, strict=True)]


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class SimpleRNNCell(RecurrentCell, keras.layers.SimpleRNNCell):
    """A `keras.layers.SimpleRNNCell` that natural-gradient methods observe; see `keras_ngd.layers.LSTM`."""

    plain = keras.layers.SimpleRNNCell

    def step(self, inputs: Tensor, states: Any, training: bool, slots: Mapping[str, Slots]) -> Any:
        nested = isinstance(states, (list, tuple))
        x, h = self._seen(inputs, states[0] if nested else states, training)
        s = slots["statistics"].product(_combination(x, h))
        output = s if self.activation is None else self.activation(s)
        return output, [output] if nested else output


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class LSTMCell(RecurrentCell, keras.layers.LSTMCell):
    """A `keras.layers.LSTMCell` that natural-gradient methods observe; see `keras_ngd.layers.LSTM`."""

    plain = keras.layers.LSTMCell

    def step(self, inputs: Tensor, states: Any, training: bool, slots: Mapping[str, Slots]) -> Any:
        state, carry = states[0], states[1]
        x, h = self._seen(inputs, state, training)
        i, f, c, o = ops.split(slots["statistics"].product(_combination(x, h)), 4, axis=1)
        carry = self.recurrent_activation(f) * carry + self.recurrent_activation(i) * self.activation(c)
        output = self.recurrent_activation(o) * self.activation(carry)
        return output, [output, carry]


@register_kind
@keras.saving.register_keras_serializable("keras_ngd")
class GRUCell(RecurrentCell, keras.layers.GRUCell):
    """A `keras.layers.GRUCell` that natural-gradient methods observe; see `keras_ngd.layers.GRU`."""

    plain = keras.layers.GRUCell

    def parts(self) -> dict[str, Part]:
        if not self.reset_after:
            return RecurrentCell.parts(self)
        kernels = {"statistics": self.kernel, "recurrent_statistics": self.recurrent_kernel}
        return {name: _part([kernel], None, _groups(self)) for name, kernel in kernels.items()}

    def step(self, inputs: Tensor, states: Any, training: bool, slots: Mapping[str, Slots]) -> Any:
        nested = isinstance(states, (list, tuple))
        state = states[0] if nested else states
        x, h = self._seen(inputs, state, training)
        z, candidate = self._reset_after(x, h, slots) if self.reset_after else self._reset_before(x, h, slots)
        output = z * state + (1 - z) * self.activation(candidate)
        return output, [output] if nested else output

    def _reset_after(self, x: list[Tensor], h: list[Tensor], slots: Mapping[str, Slots]) -> tuple[Tensor, Tensor]:
        """The update gate and the candidate's pre-activation, where the state's products are reset."""
        of_inputs, of_state = slots["statistics"].product(x), slots["recurrent_statistics"].product(h)
        if self.use_bias:
            of_inputs = slots["statistics"].learned(ops.add, of_inputs, self.bias[0])
            of_state = slots["recurrent_statistics"].learned(ops.add, of_state, self.bias[1])
        (x_z, x_r, x_h), (h_z, h_r, h_h) = ops.split(of_inputs, 3, axis=-1), ops.split(of_state, 3, axis=-1)
        return self.recurrent_activation(x_z + h_z), x_h + self.recurrent_activation(x_r + h_r) * h_h

    def _reset_before(self, x: list[Tensor], h: list[Tensor], slots: Mapping[str, Slots]) -> tuple[Tensor, Tensor]:
        """The same, where the candidate's state is reset before it is multiplied: an input that no other gate sees."""
        s = slots["statistics"].product(_combination(x[:2], h[:2]))
        z, r = ops.split(self.recurrent_activation(s), 2, axis=-1)
        return z, slots["statistics"].product(_combination(x[2:], [r * h[2]]), first=2)
