"""Networks that more than one script trains."""

import keras
from keras import layers, ops


def normalized(x):
    # Keras's own momentum, 0.99, takes hundreds of steps to forget the first ones.
    return layers.BatchNormalization(momentum=0.9)(x)


def residual_network(name, size, classes, widths, blocks):
    """A residual network of He et al. (2016) for small images: no pooling at the start, projections where shapes change.

    Args:
        name: of the model.
        size: height and width of the images.
        classes: outputs.
        widths: channels of each stage; all but the first halve the image.
        blocks: blocks of two convolutions in each stage.
    """
    convolution = {"padding": "same", "use_bias": False}

    def block(x, filters, stride):
        y = layers.ReLU()(normalized(layers.Conv2D(filters, 3, stride, **convolution)(x)))
        y = normalized(layers.Conv2D(filters, 3, **convolution)(y))
        if stride > 1 or x.shape[-1] != filters:
            x = normalized(layers.Conv2D(filters, 1, stride, **convolution)(x))
        return layers.ReLU()(layers.Add()([x, y]))

    inputs = keras.Input((size, size, 3))
    x = layers.ReLU()(normalized(layers.Conv2D(widths[0], 3, **convolution)(inputs)))
    for stage, width in enumerate(widths):
        for i in range(blocks):
            x = block(x, width, 2 if stage and i == 0 else 1)
    outputs = layers.Dense(classes)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs, name=name)


def resnet18(size=32, classes=10, width=64):
    """The ResNet-18 as it is used on CIFAR: four stages of two blocks.

    Args:
        size: height and width of the images.
        classes: outputs.
        width: channels of the first stage; doubled by each of the other three. Default 64, the paper's.
    """
    return residual_network("resnet18", size, classes, [width * 2**stage for stage in range(4)], 2)


def resnet32(size=32, classes=10, width=16):
    """The ResNet-32 for CIFAR: three stages of five blocks.

    Args:
        size: height and width of the images.
        classes: outputs.
        width: channels of the first stage; doubled by each of the other two. Default 16, the paper's.
    """
    return residual_network("resnet32", size, classes, [width * 2**stage for stage in range(3)], 5)


def resnet50(size, classes):
    """The ResNet-50 of Keras's applications, without weights, ending in logits."""
    return keras.applications.ResNet50(
        weights=None, input_shape=(size, size, 3), classes=classes, classifier_activation=None
    )


def digits_cnn():
    """Two convolutional and two fully connected layers, for images of 8x8, ending in logits."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ],
        name="CNN",
    )


def digits_mlp():
    """Three fully connected layers, for images of 8x8, ending in logits."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ],
        name="MLP",
    )


def lenet5(shape=(28, 28, 1), classes=10):
    """The LeNet-5 of LeCun et al. (1998) with ReLU and maxima for pooling, ending in logits.

    Args:
        shape: of the images.
        classes: outputs.
    """
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(6, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(120, activation="relu"),
            layers.Dense(84, activation="relu"),
            layers.Dense(classes, name="logits"),
        ],
        name="LeNet-5",
    )


def cnn_3c1f(shape=(28, 28, 1), classes=10, width=16):
    """Three convolutional layers, each with pooling, and one fully connected layer: the 3C1F of the HyLo paper.

    Args:
        shape: of the images.
        classes: outputs.
        width: channels of the first layer; doubled by each of the other two. Default 16.
    """
    x = inputs = keras.Input(shape)
    for stage in range(3):
        x = layers.Conv2D(width * 2**stage, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    outputs = layers.Dense(classes)(layers.Flatten()(x))
    return keras.Model(inputs, outputs, name="3c1f")


class Positions(layers.Layer):
    """Adds a vector of its own to each position of a sequence."""

    def __init__(self, length, width, **kwargs):
        super().__init__(**kwargs)
        self.length, self.vectors = length, layers.Embedding(length, width)

    def build(self, shape):
        self.vectors.build((self.length,))
        super().build(shape)

    def call(self, x):
        return x + self.vectors(ops.arange(self.length))


def attention_block(x, width, heads, **attention):
    """A Transformer's block, normalized before each part; `attention` goes to the call of its attention."""
    normal = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(heads, width // heads)(normal, normal, **attention)
    normal = layers.LayerNormalization()(x)
    return x + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(normal))


def vision_transformer(shape=(28, 28, 1), patch=4, width=64, heads=4, depth=2, classes=10):
    """A ViT (Dosovitskiy et al., 2021) with the mean of its tokens in place of one for the class, ending in logits.

    Args:
        shape: of the images.
        patch: height and width of the squares that are tokens.
        width: of the tokens, which `heads` divides.
        heads: of the attention in each block.
        depth: blocks.
        classes: outputs.
    """
    inputs = keras.Input(shape)
    x = layers.Reshape((-1, width))(layers.Conv2D(width, patch, patch)(inputs))
    x = Positions(x.shape[1], width)(x)
    for _ in range(depth):
        x = attention_block(x, width, heads)
    pooled = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(classes, name="logits")(pooled))


def unet(size=64, channels_in=3, width=16, depth=3):
    """The U-Net of Ronneberger et al. (2015), with normalization and padding, for one-channel logits.

    Args:
        size: height and width of the images, a multiple of `2**depth`.
        channels_in: channels of the images.
        width: channels at full size; doubled at each halving. Default 16; the paper's has 64.
        depth: how often the image is halved. Default 3; the paper's has 4.
    """
    if size % 2**depth:
        raise ValueError(f"`size` must be a multiple of 2**depth = {2**depth}. Received: size={size}")

    def twice(x, filters):
        for _ in range(2):
            x = layers.ReLU()(normalized(layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)))
        return x

    x = inputs = keras.Input((size, size, channels_in))
    skips = []
    for level in range(depth):
        skips.append(twice(x, width * 2**level))
        x = layers.MaxPooling2D()(skips[-1])
    x = twice(x, width * 2**depth)
    for level in reversed(range(depth)):
        x = layers.Conv2D(width * 2**level, 2, padding="same")(layers.UpSampling2D()(x))
        x = twice(layers.Concatenate()([skips[level], x]), width * 2**level)
    outputs = layers.Conv2D(1, 1)(x)
    return keras.Model(inputs, outputs, name="unet")
