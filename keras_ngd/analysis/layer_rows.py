"""The rows and gradients of a model's layers on one batch, without training it."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_ngd import backend, keras_private
from keras_ngd.analysis.copies import captured_copy
from keras_ngd.layers import Structure
from keras_ngd.optimizers import PAPER_SETTINGS, SNGD
from keras_ngd.optimizers.blocks import find_blocks


@dataclass(frozen=True)
class LayerRows:
    """What one captured layer (or one group of a grouped convolution) saw of a batch.

    Attributes:
        layer: the layer's path; where it has several groups, followed by `:` and the group's number.
        a: `[n, input_dim]`, see `keras_ngd.statistics.RowStatistics`.
        g: `[n, output_dim]`.
        v: `[input_dim, output_dim]`, the gradient of kernel and bias.
    """

    layer: str
    a: np.ndarray
    g: np.ndarray
    v: np.ndarray

    def kernel(self):
        """The kernel matrix `(a a^T) o (g g^T)`, `[n, n]`, in float64."""
        a, g = self.a.astype("float64"), self.g.astype("float64")
        return (a @ a.T) * (g @ g.T)

    def products(self):
        """`a_j^T v g_j` for each row, `[n]`, in float64."""
        a, g = self.a.astype("float64"), self.g.astype("float64")
        return np.sum((a @ self.v.astype("float64")) * g, axis=1)


class RowProbe:
    """Gives the rows and gradients of a model's layers, batch after batch, with the weights it has at the time.

    Forward and backward pass are those of training, on a copy: layers that behave differently in training do so, and
    the model itself stays as it is. Layers that the loss does not depend on are left out.

    Args:
        model: a built model, as for `keras_ngd.capture`; copied with `keras.models.clone_model`.
        loss: as for `compile`. Default None: the loss the model is compiled with, and its weights.
        losses_per_example: as for `keras_ngd.SNGD`. Default 1.

    Raises:
        ValueError: if there is no loss, or the model cannot be captured.
    """

    def __init__(self, model, loss=None, losses_per_example=1):
        if not isinstance(model, keras.Model):
            raise TypeError(f"`model` must be a keras.Model. Received: {model!r}")
        self._loss = {"loss": loss}
        if loss is None:
            # Keras keeps the weights of several outputs' losses nowhere else.
            compiled = keras_private.compile_arguments(model)
            self._loss = {key: compiled.get(key) for key in ("loss", "loss_weights")}
        if self._loss["loss"] is None:
            raise ValueError(
                f"Model {model.name!r} is not compiled with a loss, and rows are gradients of one: compile it first, or give "
                "the loss: `loss='sparse_categorical_crossentropy'`."
            )
        self._model, self._losses_per_example = model, losses_per_example
        self._optimizer: Any = None
        self._copy: Any = None

    def __call__(self, x, y):
        """Rows and gradients on one batch.

        Args:
            x, y: arrays, or structures of arrays, as for `model.train_on_batch`.

        Returns:
            A list of `LayerRows`, in the order of the model's layers.

        Raises:
            ValueError: if `x` or `y` is not one batch, or what is measured is not finite.
        """
        examples = _examples("x", x)
        if _examples("y", y) != examples:
            raise ValueError(f"`x` has {examples} examples and `y` has {_examples('y', y)}.")
        if self._copy is None or examples > self._optimizer.batch_size:
            self._make_copy(x, examples)
        for variable, own in zip(self._variables, _own_weights(self._model), strict=True):
            variable.assign(ops.convert_to_numpy(own))
        for momentum in self._momenta.values():
            momentum.assign(np.zeros(momentum.shape))
        self._copy.train_on_batch(x, y)
        found = [rows for block in self._blocks if block.statistics.reached for rows in self._rows(block, examples)]
        if not found:
            raise ValueError(f"No captured layer of model {self._model.name!r} takes part in the loss.")
        return found

    def _make_copy(self, x, examples):
        self._optimizer = SNGD(batch_size=examples, **PAPER_SETTINGS, losses_per_example=self._losses_per_example)
        copy = captured_copy(self._model, x, self._optimizer)
        # After one step from zero the momentum is the negative gradient exactly; the difference of weights would be rounded.
        plain = keras.optimizers.SGD(1.0, momentum=0.5)
        copy.compile(plain, **self._loss, jit_compile=backend.quicker_compiled(), auto_scale_loss=False)
        plain.build(copy.trainable_variables)
        pairs = zip(copy.trainable_variables, plain.momentums, strict=True)
        self._momenta = {id(variable): momentum for variable, momentum in pairs if momentum is not None}
        # Tables and scales have no rows.
        blocks = find_blocks(copy.trainable_variables, id)
        self._blocks = [block for block in blocks if block.geometry.structure is Structure.MATRIX]
        self._copy, self._variables = copy, _own_weights(copy)

    def _rows(self, block, examples):
        statistics = block.statistics
        calls = statistics.tallied("calls")
        if float(statistics.tallied("accepted")) < float(calls):
            raise ValueError(f"Layer {block.layer!r} sees inputs or gradients that are not finite.")
        # A plain optimizer leaves the sums over a layer's calls; the optimizer's own would have divided them.
        emitted = [v / ops.cast(calls, v.dtype) for v in statistics.averages]
        a, g = self._optimizer.curvature_input(statistics, emitted, calls)
        gradients = [-self._momenta[id(v)] for v in block.variables]
        arrays = [
            ops.convert_to_numpy(t) for t in (a[:, :examples], g[:, :examples], block.geometry.to_matrix(gradients))
        ]
        for group, (a, g, v) in enumerate(zip(*arrays, strict=True)):
            yield LayerRows(block.layer if block.geometry.groups == 1 else f"{block.layer}:{group}", a, g, v)


def layer_rows(model, x, y, loss=None, losses_per_example=1):
    """The rows and gradients of all layers that `keras_ngd.capture` captures: a list of `LayerRows`.

    Args, Raises:
        as for `RowProbe`.
    """
    return RowProbe(model, loss, losses_per_example)(x, y)


def _own_weights(model):
    return [v for v in model.weights if not hasattr(v, "keras_ngd_statistics")]


def _examples(name, batch):
    leaves = tree.flatten(batch)
    sizes = {leaf.shape[0] if getattr(leaf, "shape", ()) else None for leaf in leaves}
    if len(sizes) != 1 or not isinstance(size := sizes.pop(), int) or size < 1:
        kind = type(batch).__name__
        raise ValueError(
            f"`{name}` must be one batch: an array with an axis of examples, at least one, or a structure of such arrays. "
            f"Received: {name} of type {kind}" + (f" and shape {batch.shape}" if hasattr(batch, "shape") else "")
        )
    return size
