"""A model's Kronecker factors on real data, without training it."""

from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_ngd import keras_private
from keras_ngd.analysis.copies import captured_copy
from keras_ngd.layers import Captured, Structure
from keras_ngd.optimizers import KFAC

_BATCHES = 4


def _batches(data):
    if data is None:
        raise ValueError(
            "`data` is missing: factors are measured on a batch of the model's inputs. Received: data=None"
        )
    if isinstance(data, keras.utils.PyDataset):
        batches = [data[i] for i in range(min(len(data), _BATCHES))]
    elif hasattr(data, "element_spec"):
        batches = list(data.take(_BATCHES))
    else:
        batches = [data]
    batches = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
    if not batches or any(len(leaf) == 0 for batch in batches for leaf in tree.flatten(batch)):
        raise ValueError("`data` is empty: factors are measured on a batch of the model's inputs.")
    return batches


def input_factors(model, data):
    """The factors `A` of all matrices that `keras_ngd.capture` captures, one `[d, d]` array per matrix and group.

    Args:
        model, data: as for `split_dimension`.
    """
    batches = _batches(data)
    copy = captured_copy(model, batches[0], KFAC())
    targets = [tree.map_structure(lambda t: np.zeros(t.shape, "float32"), copy(batch)) for batch in batches]
    losses = tree.map_structure(lambda _: lambda target, output: ops.mean(output, axis=-1), targets[0])
    copy.compile(optimizer=keras.optimizers.SGD(0.0), loss=losses)
    captured: list[Any] = [la for la in keras_private.flatten_layers(copy) if isinstance(la, Captured)]
    found = [statistics for layer in captured for statistics in layer.all_statistics().values()]
    # Those of tables are diagonal, and scales have none.
    found = [statistics for statistics in found if statistics.geometry.structure is Structure.MATRIX]
    sums: list[np.ndarray] = []
    for batch, target in zip(batches, targets, strict=True):
        # A plain optimizer overwrites the averages with the batch's own values.
        copy.train_on_batch(batch, target)
        new = [ops.convert_to_numpy(statistics.input_factor).astype("float64") for statistics in found]
        sums = new if not sums else [s + n for s, n in zip(sums, new, strict=True)]
    return [factor / len(batches) for of_layer in sums for factor in of_layer]
