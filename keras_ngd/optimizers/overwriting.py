"""Keras's SGD beside variables that are overwritten, such as statistics."""

import contextlib

import keras
from keras import ops

from keras_ngd import replica


class OverwritingSGD(keras.optimizers.SGD):
    """Keras's SGD for models some of whose variables are overwritten with what arrives as their gradients.

    Keras pairs two lists of the optimizer, `_trainable_variables` and `_model_variables_moving_average`, in its steps and in
    its callback `SwapEMAWeights`. They assume an average for every variable, but overwritten ones have None. Here both lists
    hold the averaged variables alone, and `built_on` holds all; only while `stateless_apply` pairs all variables with
    their values is it the first list.

    A strategy of `tf.distribute` would compare or reduce what replicas assign, but they agree already, or have what is each
    one's own.
    """

    @property
    def built_on(self):
        """All variables the optimizer was built on, in their order."""
        return self.__dict__.get("_built_on", self._trainable_variables)

    @property
    def gradients_are_reduced(self):
        """Whether the gradients that Keras is given are the same on all replicas of a strategy. Default: no."""
        return False

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

    def assign(self, variable, value):
        super().assign(replica.local(variable), value)

    def assign_add(self, variable, value):
        super().assign_add(replica.local(variable), value)

    def _overwrite_variables_directly_with_gradients(self, grads, variables):
        if replica.context() is None:
            return super()._overwrite_variables_directly_with_gradients(grads, variables)
        others = []
        for gradient, variable in zip(grads, variables, strict=True):
            if self._overwrite_variable_with_gradient(variable):
                self.assign(variable, gradient)
            else:
                others.append((gradient, variable))
        return [gradient for gradient, _ in others], [variable for _, variable in others]

    def _all_reduce_sum_gradients(self, grads_and_vars):
        # Where there is only one replica, there is nothing to sum up: TensorFlow would register a gradient of the sum, with the
        # whole step's graph, and never let go of it.
        if self.gradients_are_reduced or not replica.several():
            return list(grads_and_vars)
        return super()._all_reduce_sum_gradients(grads_and_vars)
