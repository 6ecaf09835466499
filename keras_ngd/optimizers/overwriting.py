"""Keras's SGD beside variables that are overwritten, such as statistics."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd import backend, replica
from keras_ngd.typing import Tensor, Variable


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
    def built_on(self) -> list[Variable]:
        """All variables the optimizer was built on, in their order."""
        return self._listed("_built_on")

    @property
    def gradients_are_reduced(self) -> bool:
        """Whether the gradients that Keras is given are the same on all replicas of a strategy. Default: no."""
        return False

    def build(self, variables: Sequence[Variable]) -> None:
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

    def _listed(self, name: str) -> Any:
        """One of the lists that `build` makes, or Keras's where it makes none."""
        return self.__dict__.get(name, self._trainable_variables)

    @contextlib.contextmanager
    def _listing(self, variables: Sequence[Variable]) -> Iterator[None]:
        before = self._trainable_variables
        self.__dict__["_trainable_variables"] = variables
        try:
            yield
        finally:
            self.__dict__["_trainable_variables"] = before

    def stateless_apply(
        self, optimizer_variables: Sequence[Tensor], grads: Sequence[Tensor], trainable_variables: Sequence[Variable]
    ) -> Any:
        with self._listing(self.built_on):
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    def _backend_apply_gradients(self, grads: Sequence[Tensor], trainable_variables: Sequence[Variable]) -> None:
        with self._listing(self._listed("_averaged")):
            super()._backend_apply_gradients(grads, trainable_variables)

    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        """Replaces the model's variables with their averages, where `use_ema` is set."""
        if self.use_ema:
            super().finalize_variable_values(self._trainable_variables)
            # On JAX a variable and its average are now one buffer, which the next `fit` could not donate twice.
            for average in self._model_variables_moving_average:
                average.assign(ops.copy(average))

    def assign(self, variable: Variable, value: Tensor) -> None:
        super().assign(replica.local(variable), value)

    def assign_add(self, variable: Variable, value: Tensor) -> None:
        super().assign_add(replica.local(variable), value)

    def update_step(self, gradient: Tensor, variable: Variable, learning_rate: Tensor) -> None:
        dtype = backend.dtype_name(variable)
        made = backend.momentum_step(
            variable,
            self.momentums[self._get_variable_index(variable)] if self.momentum else None,
            ops.cast(gradient, dtype),
            ops.cast(learning_rate, dtype),
            self.momentum,
            self.nesterov,
        )
        if not made:
            super().update_step(gradient, variable, learning_rate)

    def _overwrite_variables_directly_with_gradients(
        self, grads: Sequence[Tensor], variables: Sequence[Variable]
    ) -> tuple[list[Tensor], list[Variable]]:
        if replica.context() is None:
            return super()._overwrite_variables_directly_with_gradients(grads, variables)
        others = []
        for gradient, variable in zip(grads, variables, strict=True):
            if self._overwrite_variable_with_gradient(variable):
                self.assign(variable, gradient)
            else:
                others.append((gradient, variable))
        return [gradient for gradient, _ in others], [variable for _, variable in others]

    def _all_reduce_sum_gradients(
        self, grads_and_vars: Iterable[tuple[Tensor, Variable]]
    ) -> list[tuple[Tensor, Variable]]:
        # Where there is only one replica, there is nothing to sum up: TensorFlow would register a gradient of the sum, with the
        # whole step's graph, and never let go of it.
        if self.gradients_are_reduced or not replica.several():
            return list(grads_and_vars)
        return super()._all_reduce_sum_gradients(grads_and_vars)
