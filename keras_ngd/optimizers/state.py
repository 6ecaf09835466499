"""Saving and loading of optimizer state without ever losing any of it."""

import numpy as np

from keras_ngd import sharding


class StrictState:
    """Mixin: loading a state that does not match is an error, and one loaded too early waits for `build`.

    Keras matches optimizer variables by position and, where their number differs, warns and goes on with none of them:
    second-order state would be lost in silence.
    """

    _pending_state = None

    def save_own_variables(self, store):
        for key, value in self._state().items():
            store[key] = value

    def _state(self):
        return {str(i): sharding.to_numpy(v) for i, v in enumerate(self.variables)}

    def load_own_variables(self, store):
        """Restores the optimizer's variables from a checkpoint.

        A checkpoint without optimizer state (one of weights only), or with that of an optimizer that has not made a step, has
        nothing to restore.

        Raises:
            ValueError: if the number or a shape of the variables is not what this optimizer has.
        """
        state = {key: np.array(store[key]) for key in store.keys()}
        if not state or self._is_untouched(state):
            return
        if not self.built:
            self._pending_state = state
            return
        self._assign_state(state)

    @staticmethod
    def _is_untouched(state):
        """Whether a state is that of an optimizer compiled but never built: step 0 and perhaps a learning rate."""
        return len(state) <= 2 and all(v.shape == () for v in state.values()) and state.get("0") == 0

    def restored_step(self):
        """The step that training goes on from, as a number; 0 at a fresh start."""
        if self.built:
            return int(sharding.to_numpy(self.iterations))
        return 0 if self._pending_state is None else int(self._pending_state["0"])

    def current_state(self):
        """Copies of all variables' values, as a checkpoint has them, of an optimizer that goes on from somewhere."""
        if not self.built:
            return self._pending_state
        return self._state()

    def restore(self, state):
        """Takes over what `current_state` gave, now or once it is built."""
        self._pending_state = state
        if self.built:
            self._restore_pending()

    def _restore_pending(self):
        """Restores what was loaded before `build`; whether there was anything."""
        if self._pending_state is None:
            return False
        self._assign_state(self._pending_state)
        return True

    def _assign_state(self, state):
        variables = self.variables
        advice = (
            "The checkpoint was written by another optimizer, with other settings, or for a model captured differently; "
            "its state cannot be used. Recreate the optimizer and the capture as they were (for a saved model that makes its own "
            "layers: load it with `compile=False`, capture, compile, then `model.load_weights`), or load the weights alone: "
            "`model.load_weights` before `model.compile`."
        )
        if len(state) != len(variables):
            raise ValueError(
                f"Optimizer {self.name!r} has {len(variables)} variables but the checkpoint has {len(state)}. {advice}"
            )
        renewed = []
        for i, variable in enumerate(variables):
            if str(i) not in state or state[str(i)].shape != sharding.shape_of(variable):
                if str(i) in state and self.can_renew(variable):
                    renewed.append(i)
                    continue
                found = state[str(i)].shape if str(i) in state else "nothing"
                raise ValueError(
                    f"Optimizer variable {variable.path!r} (number {i}) has shape {sharding.shape_of(variable)} but the "
                    f"checkpoint has {found}. {advice}"
                )
        for i, variable in enumerate(variables):
            if i not in renewed:
                variable.assign(sharding.from_numpy(variable, state[str(i)]))
        self._pending_state = None
        self.restored(bool(renewed))

    def can_renew(self, variable):
        """Whether training can go on without a variable's value, if it is of another shape than here."""
        return False

    def restored(self, renew):
        """Told that a state was restored; `renew` if some values that `can_renew` were left out."""
