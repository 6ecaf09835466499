"""`keras_ngd.capture`: layers that record, after what a method wants to be measured."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras

from keras_ngd import analysis
from keras_ngd.capturing import layers_to_capture, release, swap, trainable_weights

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient
    from keras_ngd.report import CaptureReport

__all__ = ["capture", "layers_to_capture", "release", "trainable_weights"]


def capture(
    model: keras.Model,
    optimizer: "NaturalGradient | str",
    skip: str | Sequence[str] | Callable[[keras.layers.Layer], bool] | None = None,
    data: Any = None,
    include: str | Sequence[str] | Callable[[keras.layers.Layer], bool] | None = None,
) -> "CaptureReport":
    """Makes a model's layers record what a natural-gradient optimizer needs, in place.

    `Dense` and `EinsumDense` layers (hence attention), `Embedding`, `ReversibleEmbedding` and convolutions (`Conv1D` to `Conv3D`,
    `Conv1DTranspose` to `Conv3DTranspose`, `DepthwiseConv1D`, `DepthwiseConv2D`, `SeparableConv1D`, `SeparableConv2D`), at any
    depth of nested models and layers, become their `keras_ngd.layers` counterparts and gain a small sub-layer of statistics
    weights for each of their weight matrices. The model stays the same object with the
    same weights of its own and the same results; `get_weights`, `count_params` and `summary` have the statistics too. All
    other layers train by the plain update rule; so do these, with the reason in the report:

    - layers inside wrappers other than `Bidirectional` and `TimeDistributed` (of a fixed number of steps), and inside of cells;
    - subclasses of the captured kinds, whose `call` may compute something else;
    - layers that share their kernel with another layer, since the gradient is a sum that no single block describes;
    - layers that are not trainable when captured: unfreeze them, then capture again with a new optimizer (what they record for
      another optimizer stays, such as for that of a discriminator, which is frozen in the model that trains the generator);
    - quantized layers and layers with LoRA enabled.

    `BatchNormalization`, `LayerNormalization`, `GroupNormalization` and `RMSNormalization` are captured where `include` selects
    them: the scale and the offset of each feature then have a Fisher block of their own.

    So become `SimpleRNN`, `LSTM`, `GRU`, and `RNN` of their cells (stacked or not), with what their cells see at each step; they
    never use cuDNN while they record. Steps that a mask hides do not count, but no mask reaches layers inside `TimeDistributed`.
    Convolutional LSTMs, and cells and recurrent layers of your own, follow the plain update rule.

    A layer called several times per step is captured; its calls count like positions. A mask on the input of
    `Dense` takes the hidden positions out of its statistics. `sample_weight` scales the gradients, hence `G`, and
    leaves `A` as it is; the optimizer makes up for its size. The bias of a transposed convolution, which is added where the
    contributions of several pixels meet, follows the plain update rule. Layers frozen after capture and before training are
    left to Keras: nothing of theirs is trained.

    A loss with a derivative of a captured layer in it (a gradient penalty, a Hessian) is refused when it is differentiated: leave
    such layers out with `skip`.

    Call it before `model.compile`. Calling it again replaces what was recorded before.

    A saved captured model is loaded captured, and resumes exactly, if its layers are in its config, as those of Functional and
    Sequential models are. Subclassed models and custom layers make plain sub-layers anew: loaded, they predict, and their
    optimizer refuses to train. To resume these:

    ```python
    model = keras.models.load_model(path, compile=False)
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, ...)
    model.load_weights(path)
    ```

    Args:
        model: a built Functional, Sequential or subclassed `keras.Model`.
        optimizer: a `keras_ngd` optimizer not yet used, to compile with afterwards; or the registered name of one with its
            defaults, `"keras_ngd>KFAC"`, which `model.compile(optimizer="keras_ngd>KFAC")` then takes as well. (Keras knows short
            names, such as `"adam"`, of its own optimizers alone.)
        skip: layers to leave out: a name, a path or a pattern (`"block1_*"`), a list of these, or a function of the layer
            that returns True for layers to leave out. Default None.
        data: a batch of the model's inputs, or a data set of batches, for what is measured: `THOR(split="auto")`, which takes
            256 examples at most, and for room for rows and steps in an epoch (SKFAC, SNGD, HyLo), where an array of more than
            1,024 examples is not taken for a batch. Default None.
        include: layers to capture of kinds that are left to the rule of the rest unless they are asked for: as for `skip`.
            Default None.

    Returns:
        A `CaptureReport`. Its `warnings`, of layers with large factors, are given as Python's warnings as well.

    Raises:
        TypeError: if `model` or `optimizer` is of the wrong kind.
        ValueError: if the model is not built, the optimizer is in use, no layer can be captured, a pattern matches no
            layer, layers compute in float16 without a static loss scale, or the model or the optimizer was made before the
            active `keras.distribution` was set.
    """
    return swap.capture(model, optimizer, skip, include, data, analysis)
