"""Saving and loading of optimizer state without ever losing any of it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_ngd import sharding
from keras_ngd.typing import Store

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient

# What the numbers in a state mean, where that has changed, and the key that says so; without it a state is of format 0.
# 1: EigenAdam's first moments are in the bases.
FORMAT, KEY = 1, "format"

ADVICE = (
    "The checkpoint was written by another optimizer, with other settings, or for a model captured differently; "
    "its state cannot be used. Recreate the optimizer and the capture as they were (for a saved model that makes its own "
    "layers: load it with `compile=False`, capture, compile, then `model.load_weights`), or load the weights alone: "
    "`model.load_weights` before `model.compile`."
)


class StrictCheckpoint:
    """An optimizer's state as it is saved: loading one that does not match is an error, and one loaded too early waits.

    Keras matches optimizer variables by position and, where their number differs, warns and goes on with none of them:
    second-order state would be lost in silence.

    A model that is loaded may be wanted for its predictions alone. The optimizer that is loaded with it therefore keeps an error
    to itself, and a state that does not match, and raises it where it is to train.

    Args:
        optimizer: the optimizer. It is asked whether training can go on without a variable's value (`can_renew`), and told that
            a state was restored (`restored`).

    Attributes:
        from_config: whether the optimizer was made by `from_config`, as with a model that is loaded.
    """

    def __init__(self, optimizer: "NaturalGradient") -> None:
        self._optimizer, self.from_config = optimizer, False
        self._pending: dict[str, np.ndarray] | None = None
        self._error: ValueError | None = None

    def being_loaded(self) -> bool:
        """Whether the optimizer was made with a model that is loaded, and has not been used."""
        optimizer = self._optimizer
        unused = not optimizer.built or int(sharding.to_numpy(optimizer.iterations)) == 0
        return self.from_config and optimizer.captured_model() is None and unused

    def until_trained(self, function: Callable[[], Any]) -> Any:
        """The value of a function; where it raises an error and a model is being loaded, None, and the error is kept."""
        try:
            return function()
        except ValueError as error:
            if not self.being_loaded():
                raise
            self._error = error
            return None

    def check(self) -> None:
        """Raises what was kept while the model was loaded."""
        if self._error is not None:
            raise self._error
        self.restore_pending()

    def save(self, store: Store) -> None:
        """Writes the state to one of Keras's stores."""
        # What could not be restored is still what there is to be saved.
        for key, value in ({**self._state(), KEY: FORMAT} if self._pending is None else self._pending).items():
            store[key] = value

    def load(self, store: Store) -> None:
        """Restores the optimizer's variables from one of Keras's stores.

        A checkpoint without optimizer state (one of weights only), or with that of an optimizer that has not made a step, has
        nothing to restore.

        Raises:
            ValueError: if the number or a shape of the variables is not what this optimizer has; if it is being loaded with a
                model, at the first step.
        """
        state = {key: np.array(store[key]) for key in store.keys()}
        if not state or _is_untouched(state):
            return
        state.setdefault(KEY, np.array(0))
        if not self._optimizer.built or self._error is not None:
            self._pending = state
            return
        try:
            self._assign(state)
        except ValueError:
            if not self.being_loaded():
                raise
            self._pending = state

    def step(self) -> int:
        """The step that training goes on from, as a number; 0 at a fresh start."""
        if self._optimizer.built:
            return int(sharding.to_numpy(self._optimizer.iterations))
        return 0 if self._pending is None else int(self._pending["0"])

    def current(self) -> dict[str, np.ndarray] | None:
        """Copies of all variables' values, as a checkpoint has them, of an optimizer that goes on from somewhere."""
        return self._state() if self._optimizer.built else self._pending

    def restore(self, state: dict[str, np.ndarray] | None) -> None:
        """Takes over what `current` gave, now or once the optimizer is built."""
        self._pending = state
        if self._optimizer.built:
            self.restore_pending()

    def restore_pending(self) -> bool:
        """Restores what was loaded before the optimizer was built; whether there was anything."""
        if self._pending is None:
            return False
        self._assign(self._pending)
        return True

    def _state(self) -> dict[str, np.ndarray]:
        return {str(i): sharding.to_numpy(v) for i, v in enumerate(self._optimizer.variables)}

    def _assign(self, state: dict[str, np.ndarray]) -> None:
        optimizer, renewed = self._optimizer, []
        variables, state = optimizer.variables, dict(state)
        # Without the key it is what `current` gave.
        version = int(state.pop(KEY, FORMAT))
        if version > FORMAT:
            raise ValueError(
                f"The state of optimizer {optimizer.name!r} was written by a later version of keras_ngd, format {version}; this "
                f"one reads formats up to {FORMAT}. Install that version, or load the weights alone: `model.load_weights` before "
                "`model.compile`."
            )
        if len(state) != len(variables):
            raise ValueError(
                f"Optimizer {optimizer.name!r} has {len(variables)} variables but the checkpoint has {len(state)}. {ADVICE}"
            )
        for i, variable in enumerate(variables):
            if str(i) not in state or state[str(i)].shape != sharding.shape_of(variable):
                if str(i) in state and optimizer.can_renew(variable):
                    renewed.append(i)
                    continue
                found = state[str(i)].shape if str(i) in state else "nothing"
                raise ValueError(
                    f"Optimizer variable {variable.path!r} (number {i}) has shape {sharding.shape_of(variable)} but the "
                    f"checkpoint has {found}. {ADVICE}"
                )
        for i, variable in enumerate(variables):
            if i not in renewed:
                variable.assign(sharding.from_numpy(variable, state[str(i)]))
        self._pending = None
        if version < FORMAT:
            optimizer.convert_from(version)
        optimizer.restored(bool(renewed))


def _is_untouched(state: dict[str, np.ndarray]) -> bool:
    """Whether a state is that of an optimizer compiled but never built: step 0 and perhaps a learning rate."""
    values = [value for key, value in state.items() if key != KEY]
    return len(values) <= 2 and all(v.shape == () for v in values) and state.get("0") == 0
