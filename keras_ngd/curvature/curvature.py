"""The contract of this package: what every approximation of Fisher blocks is."""

import abc
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from keras import ops

from keras_ngd import backend
from keras_ngd.typing import AddVariable, Initializer, Shape, Tensor, Variable


class Slot(NamedTuple):
    """One tensor of a curvature's state.

    Attributes:
        name: of the variable that keeps it.
        shape: of all blocks together; the first axis is that of the blocks.
        initializer: as `keras.Variable` takes it. With the initial state P = V, unless steps renew a part of it.
        dtype: name of its dtype.
        refreshed: whether refreshes renew it. Default True.
        stepped: whether each step that is taken renews it. Default False.
    """

    name: str
    shape: Shape
    initializer: Initializer
    dtype: str
    refreshed: bool = True
    stepped: bool = False


class Curvature(abc.ABC):
    """The curvature of `k` Fisher blocks of one shape, stacked on the first axis of every tensor.

    It knows neither layers nor workers: all methods are functions of tensors with static shapes, which XLA compiles. What it
    is refreshed with, its `inputs`, is a list of tensors whose meaning is the subclass's: the factors `[k, d, d]`, or rows
    `[k, n, d]`.

    Attributes:
        count: `k`.
        dtype: of the state.
        variables: those that keep the state, in the order of `slots`; empty before `build`.
    """

    count: int
    dtype: str
    variables: Sequence[Variable] = ()

    @property
    @abc.abstractmethod
    def slots(self) -> tuple[Slot, ...]:
        """The tensors of the state."""

    @property
    @abc.abstractmethod
    def refresh_cost(self) -> float:
        """What a refresh takes, in multiplications of a factorization up to a constant."""

    @classmethod
    @abc.abstractmethod
    def refresh_all(
        cls,
        curvatures: Sequence[Self],
        inputs: Sequence[Sequence[Tensor]],
        damping: Tensor,
        states: Sequence[Sequence[Tensor]],
        chosen: Sequence[Tensor] | None = None,
    ) -> list[list[Tensor]]:
        """New states of several curvatures of this class and of equal settings: all matrices of one size in one batch.

        Args:
            curvatures: which.
            inputs: for each its inputs.
            damping: scalar.
            states: for each what refreshes renew of its state, as it is.
            chosen: for each `[k]` booleans, which blocks are renewed. Default None: all.

        Returns:
            For each what it is replaced with. Blocks that are not chosen or cannot be inverted keep the old one, or, where the
            class has no use for that, are identities.
        """

    @abc.abstractmethod
    def precondition(
        self, v: Tensor, damping: Tensor, state: Sequence[Tensor], inputs: Callable[[], Sequence[Tensor]]
    ) -> Tensor:
        """`P` of the gradients `v`, both `[k, input_dim, output_dim]`.

        Args:
            v: the gradients.
            damping: scalar, of this step.
            state: as of the last refresh, and, of what steps renew, of this step.
            inputs: function of no arguments that gives what the last refresh was made of, for those that need it still.
        """

    def stepped(self, v: Tensor, state: Sequence[Tensor], scale: Callable[[], Tensor]) -> list[Tensor]:
        """What replaces the part of the state that steps renew, in the order of its slots. Default: there is none.

        The step may turn out not to be taken, or a block not to have been called; then nothing is replaced.

        Args:
            v: the gradients `[k, input_dim, output_dim]`, without the loss scale.
            state: all of it, before the step.
            scale: function of no arguments that gives `[k]`: products of two entries of `v`, which are a batch's means, are
                estimates of the Fisher matrix's entries when they are multiplied with it.
        """
        return []

    @property
    def symmetric(self) -> bool:
        """Whether all matrices of the state are, so that workers send one triangle of each. Default: yes."""
        return True

    def build(self, add_variable: AddVariable) -> None:
        """Creates the variables of the state with `add_variable(shape, initializer, dtype, name)`."""
        self.variables = [add_variable(slot.shape, slot.initializer, slot.dtype, slot.name) for slot in self.slots]

    @property
    def refreshed_variables(self) -> list[Variable]:
        """The variables of what refreshes renew of the state."""
        return [v for v, slot in zip(self.variables, self.slots, strict=True) if slot.refreshed]

    @property
    def stepped_variables(self) -> list[Variable]:
        """The variables of what steps renew of it."""
        return [v for v, slot in zip(self.variables, self.slots, strict=True) if slot.stepped]

    def with_stepped(self, state: Sequence[Tensor], stepped: Sequence[Tensor]) -> list[Tensor]:
        """A state in which what steps renew is replaced by what `stepped` gave."""
        new = iter(stepped)
        return [next(new) if slot.stepped else old for slot, old in zip(self.slots, state, strict=True)]

    @property
    def has_steps(self) -> bool:
        """Whether steps renew a part of the state."""
        return any(slot.stepped for slot in self.slots)

    @property
    def bytes(self) -> int:
        """Size of the state."""
        return sum(math.prod(slot.shape) * backend.itemsize(slot.dtype) for slot in self.slots)

    def refresh(self, inputs: Sequence[Tensor], damping: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        """The new state of this curvature alone; see `refresh_all`."""
        return self.refresh_all([self], [inputs], damping, [state])[0]


class TracedCurvature(Curvature):
    """A curvature that knows the trace of its blocks, which dampings are measured by."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """How many parameters a block has."""

    @abc.abstractmethod
    def trace(self, inputs: Sequence[Tensor]) -> Tensor:
        """The traces of the Fisher blocks that inputs describe, `[k]`, without any damping."""


def refreshed(
    curvatures: Sequence[Curvature],
    inputs: Sequence[Sequence[Tensor]],
    damping: Tensor,
    states: Sequence[Sequence[Tensor]],
    chosen: Sequence[Tensor] | None = None,
) -> list[list[Tensor]]:
    """New states of curvatures of any classes, those of one class together; arguments as for `Curvature.refresh_all`."""
    found: list[list[Tensor]] = [[] for _ in curvatures]
    for kind in dict.fromkeys(type(curvature) for curvature in curvatures):
        members = [i for i, curvature in enumerate(curvatures) if type(curvature) is kind]
        new = kind.refresh_all(
            [curvatures[i] for i in members],
            [inputs[i] for i in members],
            damping,
            [states[i] for i in members],
            None if chosen is None else [chosen[i] for i in members],
        )
        for i, state in zip(members, new, strict=True):
            found[i] = state
    return found


def where_chosen(
    chosen: Sequence[Tensor] | None, new: Sequence[Sequence[Tensor]], old: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]]:
    """States that are new where `chosen`, for each state `[k]` booleans or None for everywhere, and old elsewhere."""
    if chosen is None:
        return [list(state) for state in new]
    return [
        [ops.where(ops.reshape(of_state, (-1,) + (1,) * (len(n.shape) - 1)), n, o) for n, o in zip(*pair, strict=True)]
        for of_state, pair in zip(chosen, zip(new, old, strict=True), strict=True)
    ]
