"""Summing lists of tensors of several dtypes, on TensorFlow: for the collectives, which only that backend has."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_ngd.typing import Tensor


def summed(tensors: Sequence[Tensor], collective: Callable[[list[Tensor], str], Sequence[Tensor]]) -> list[Tensor]:
    """Sums over all workers, of each dtype's tensors at once.

    Args:
        tensors: list. No collective adds bfloat16, so these travel as float32.
        collective: function of the tensors of one dtype and its name: their sums.

    Returns:
        The sums, of the shapes and dtypes of `tensors`.
    """
    tensors = [tf.convert_to_tensor(t) for t in tensors]
    sent = [tf.cast(t, tf.float32) if t.dtype == tf.bfloat16 else t for t in tensors]
    by_dtype: dict[Any, list[int]] = {}
    sums: dict[int, Tensor] = {}
    for i, tensor in enumerate(sent):
        by_dtype.setdefault(tensor.dtype, []).append(i)
    for dtype, indices in by_dtype.items():
        totals = collective([sent[i] for i in indices], dtype.name)
        for i, total in zip(indices, totals, strict=True):
            sums[i] = tf.cast(tf.ensure_shape(total, sent[i].shape), tensors[i].dtype)
    return [sums[i] for i in range(len(tensors))]
