"""Captured layers: Keras layers with a probe on their pre-activation."""

from keras_ngd.layers.attention import GroupQueryAttention, MultiHeadAttention
from keras_ngd.layers.captured import Captured, Part
from keras_ngd.layers.container import CONTAINER_KINDS, Container, register_container
from keras_ngd.layers.convolution import Conv1D, Conv2D, Conv3D
from keras_ngd.layers.dense import Dense, DenseGeometry
from keras_ngd.layers.einsum_dense import EinsumDense
from keras_ngd.layers.embedding import Embedding, ReversibleEmbedding
from keras_ngd.layers.geometry import Geometry, MatrixGeometry, Structure
from keras_ngd.layers.probe import probe

# What `capture` makes of which layers.
CAPTURED_KINDS: dict[type, type] = {}


def register_kind(kind: type) -> type:
    """Has `keras_ngd.capture` turn layers of the class `kind.plain` into captured ones of the class `kind`.

    For kinds of layers of your own; those of Keras that are in this package are registered. May be used as a decorator.

    Args:
        kind: a subclass of `Captured` and of `kind.plain`, which computes what that does.

    Raises:
        TypeError: if it is none.
    """
    plain = getattr(kind, "plain", None)
    if not (
        isinstance(kind, type) and isinstance(plain, type) and issubclass(kind, Captured) and issubclass(kind, plain)
    ):
        raise TypeError(
            "`kind` must be a class over `keras_ngd.layers.Captured` and over the layer that it captures, with that layer's "
            f"class as its `plain`. Received: {kind!r}, whose `plain` is {plain!r}"
        )
    CAPTURED_KINDS[plain] = kind
    return kind


for _kind in (Dense, EinsumDense, Conv1D, Conv2D, Conv3D, Embedding, ReversibleEmbedding):
    register_kind(_kind)

__all__ = [
    "CAPTURED_KINDS",
    "CONTAINER_KINDS",
    "Captured",
    "Container",
    "Conv1D",
    "Conv2D",
    "Conv3D",
    "Dense",
    "DenseGeometry",
    "EinsumDense",
    "Embedding",
    "Geometry",
    "GroupQueryAttention",
    "MatrixGeometry",
    "MultiHeadAttention",
    "Part",
    "ReversibleEmbedding",
    "Structure",
    "probe",
    "register_container",
    "register_kind",
]
