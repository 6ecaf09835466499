"""Keras's averaging of weights (`use_ema`) beside variables that are overwritten."""

import contextlib

from keras import ops


class WeightAveraging:
    """Mixin: averages what Keras averages, and leaves overwritten variables out.

    Keras pairs two lists of the optimizer, `_trainable_variables` and `_model_variables_moving_average`, in its steps and in
    its callback `SwapEMAWeights`. They assume an average for every variable, but overwritten ones have None. Here both lists
    hold the averaged variables alone, and `built_on` holds all; only while `stateless_apply` pairs all variables with
    their values is it the first list.
    """

    @property
    def built_on(self):
        """All variables the optimizer was built on, in their order."""
        return self.__dict__.get("_built_on", self._trainable_variables)

    def build(self, variables):
        super().build(variables)
        if self.use_ema:
            pairs = zip(self._trainable_variables, self._model_variables_moving_average, strict=True)
            averaged, averages = zip(*[pair for pair in pairs if pair[1] is not None], strict=True)
            # Straight into __dict__, here and below: attribute assignment would track the lists a second time.
            self.__dict__.update(
                _built_on=self._trainable_variables,
                _averaged=list(averaged),
                _trainable_variables=list(averaged),
                _model_variables_moving_average=list(averages),
            )

    @contextlib.contextmanager
    def _listing(self, variables):
        before = self._trainable_variables
        self.__dict__["_trainable_variables"] = variables
        try:
            yield
        finally:
            self.__dict__["_trainable_variables"] = before

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        with self._listing(self.built_on):
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    def _backend_apply_gradients(self, grads, trainable_variables):
        with self._listing(self.__dict__.get("_averaged", self._trainable_variables)):
            super()._backend_apply_gradients(grads, trainable_variables)

    def finalize_variable_values(self, var_list):
        """Replaces the model's variables with their averages, where `use_ema` is set."""
        if self.use_ema:
            super().finalize_variable_values(self._trainable_variables)
            # On JAX a variable and its average are now one buffer, which the next `fit` could not donate twice.
            for average in self._model_variables_moving_average:
                average.assign(ops.copy(average))
