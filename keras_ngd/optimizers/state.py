"""Saving and loading of optimizer state without ever losing any of it."""

import keras
import numpy as np
from keras import ops

from keras_ngd import sharding


class StrictState:
    """Mixin: loading a state that does not match is an error, and one loaded too early waits for `build`.

    Keras matches optimizer variables by position and, where their number differs, warns and goes on with none of them:
    second-order state would be lost in silence.

    A model that is loaded may be wanted for its predictions alone. The optimizer that is loaded with it therefore keeps an error
    to itself, and a state that does not match, and raises it where it is to train.
    """

    _pending_state, _kept_error, _from_config = None, None, False

    @classmethod
    def from_config(cls, config, custom_objects=None):
        optimizer = super().from_config(config, custom_objects)
        optimizer._from_config = True
        return optimizer

    def being_loaded(self):
        """Whether this optimizer was made with a model that is loaded, and has not been used."""
        unused = not self.built or int(sharding.to_numpy(self.iterations)) == 0
        return self._from_config and self._model is None and unused

    def until_trained(self, function):
        """The value of a function; where it raises an error and a model is being loaded, None, and the error is kept."""
        try:
            return function()
        except ValueError as error:
            if not self.being_loaded():
                raise
            self._kept_error = error
            return None

    def check_loaded(self):
        """Raises what was kept while the model was loaded."""
        if self._kept_error is not None:
            raise self._kept_error
        self._restore_pending()

    def save_own_variables(self, store):
        # What could not be restored is still what there is to be saved.
        state = self._state() if self._pending_state is None else self._pending_state
        for key, value in state.items():
            store[key] = value

    def _state(self):
        return {str(i): sharding.to_numpy(v) for i, v in enumerate(self.variables)}

    def load_own_variables(self, store):
        """Restores the optimizer's variables from a checkpoint.

        A checkpoint without optimizer state (one of weights only), or with that of an optimizer that has not made a step, has
        nothing to restore.

        Raises:
            ValueError: if the number or a shape of the variables is not what this optimizer has; if it is being loaded with a
                model, at the first step.
        """
        state = {key: np.array(store[key]) for key in store.keys()}
        if not state or self._is_untouched(state):
            return
        if not self.built or self._kept_error is not None:
            self._pending_state = state
            return
        try:
            self._assign_state(state)
        except ValueError:
            if not self.being_loaded():
                raise
            self._pending_state = state

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

    def plain(self):
        """A new `keras.optimizers.SGD` at this optimizer's step, with those of its arguments that SGD has."""
        rate = self._learning_rate
        known_to_keras = isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)
        if not known_to_keras or type(rate).__module__.startswith("keras_ngd"):
            rate = float(ops.convert_to_numpy(self.learning_rate))
        known = keras.optimizers.SGD().get_config()
        config = {name: value for name, value in super().get_config().items() if name in known}
        sgd = keras.optimizers.SGD(**{**config, "learning_rate": rate, "name": known["name"]})
        sgd.iterations.assign(self.iterations)
        return sgd
