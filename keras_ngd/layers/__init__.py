"""Captured layers: Keras layers with probes on their pre-activations."""

from keras_ngd.layers.attention import GroupQueryAttention, MultiHeadAttention
from keras_ngd.layers.captured import CAPTURED_KINDS, Captured, Part, keeps_call, kind_of, register_kind
from keras_ngd.layers.container import CONTAINER_KINDS, Container, register_container
from keras_ngd.layers.contract import parts_of
from keras_ngd.layers.convolution import Conv1D, Conv2D, Conv3D
from keras_ngd.layers.dense import Dense, DenseGeometry
from keras_ngd.layers.depthwise_convolution import DepthwiseConv1D, DepthwiseConv2D
from keras_ngd.layers.einsum_dense import EinsumDense
from keras_ngd.layers.embedding import Embedding, ReversibleEmbedding
from keras_ngd.layers.geometry import Geometry, MatrixGeometry, Structure
from keras_ngd.layers.learning import learned, of_lookups
from keras_ngd.layers.normalization import (
    BatchNormalization,
    GroupNormalization,
    LayerNormalization,
    RMSNormalization,
    ScaleGeometry,
)
from keras_ngd.layers.probe import probe
from keras_ngd.layers.recurrent import GRU, LSTM, RNN, SimpleRNN
from keras_ngd.layers.recurrent_cells import GRUCell, LSTMCell, SimpleRNNCell
from keras_ngd.layers.separable_convolution import SeparableConv1D, SeparableConv2D
from keras_ngd.layers.time_steps import StepGeometry
from keras_ngd.layers.transposed_convolution import Conv1DTranspose, Conv2DTranspose, Conv3DTranspose

__all__ = [
    "CAPTURED_KINDS",
    "CONTAINER_KINDS",
    "BatchNormalization",
    "Captured",
    "Container",
    "Conv1D",
    "Conv1DTranspose",
    "Conv2D",
    "Conv2DTranspose",
    "Conv3D",
    "Conv3DTranspose",
    "Dense",
    "DenseGeometry",
    "EinsumDense",
    "Embedding",
    "DepthwiseConv1D",
    "DepthwiseConv2D",
    "Geometry",
    "GroupNormalization",
    "GroupQueryAttention",
    "LayerNormalization",
    "GRU",
    "GRUCell",
    "Geometry",
    "LSTM",
    "LSTMCell",
    "MatrixGeometry",
    "MultiHeadAttention",
    "Part",
    "RMSNormalization",
    "ReversibleEmbedding",
    "ScaleGeometry",
    "SeparableConv1D",
    "SeparableConv2D",
    "Structure",
    "keeps_call",
    "learned",
    "of_lookups",
    "RNN",
    "SimpleRNN",
    "SimpleRNNCell",
    "StepGeometry",
    "Structure",
    "kind_of",
    "parts_of",
    "probe",
    "register_container",
    "register_kind",
]
