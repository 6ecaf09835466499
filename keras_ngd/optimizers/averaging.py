"""Keras's averaging of weights (`use_ema`) beside variables that are overwritten."""

import contextlib

from keras import ops


class WeightAveraging:
    """Mixin: averages what Keras averages, and leaves overwritten variables out.

    Keras's averaging assumes an average for every variable, but makes none for overwritten ones.
    """

    @contextlib.contextmanager
    def _averaged_variables_only(self):
        names = ("_trainable_variables", "_model_variables_moving_average")
        complete = {name: self.__dict__[name] for name in names}
        pairs = [pair for pair in zip(*complete.values(), strict=True) if pair[1] is not None]
        # Straight into __dict__: attribute assignment would track the lists a second time.
        self.__dict__.update(zip(names, map(list, zip(*pairs, strict=True)), strict=True))
        try:
            yield
        finally:
            self.__dict__.update(complete)

    def _backend_apply_gradients(self, grads, trainable_variables):
        with self._averaged_variables_only() if self.use_ema else contextlib.nullcontext():
            super()._backend_apply_gradients(grads, trainable_variables)

    def finalize_variable_values(self, var_list):
        """Replaces the model's variables with their averages, where `use_ema` is set."""
        if self.use_ema:
            with self._averaged_variables_only():
                super().finalize_variable_values(self._trainable_variables)
            # On JAX a variable and its average are now one buffer, which the next `fit` could not donate twice.
            for average in self._model_variables_moving_average:
                if average is not None:
                    average.assign(ops.copy(average))
