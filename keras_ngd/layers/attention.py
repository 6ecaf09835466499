"""Attention layers, whose projections are captured `EinsumDense` layers."""

from typing import Any

import keras

from keras_ngd.layers.container import Container, register_container


class AttentionContainer(Container):
    """What attention layers share: they make their projections when they are built."""

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        super().build(query_shape, value_shape, key_shape)
        self.capture_contained()


@register_container
@keras.saving.register_keras_serializable("keras_ngd")
class MultiHeadAttention(AttentionContainer, keras.layers.MultiHeadAttention):
    """A `keras.layers.MultiHeadAttention` that keeps its captured projections when it is saved and loaded.

    Each of `query`, `key`, `value` and `attention_output` is a block of its own: see `keras_ngd.layers.EinsumDense`. How the
    products in between are computed makes no difference to them.
    """

    plain = keras.layers.MultiHeadAttention


@register_container
@keras.saving.register_keras_serializable("keras_ngd")
class GroupQueryAttention(AttentionContainer, keras.layers.GroupQueryAttention):
    """A `keras.layers.GroupQueryAttention`, likewise; see `keras_ngd.layers.MultiHeadAttention`."""

    plain = keras.layers.GroupQueryAttention
