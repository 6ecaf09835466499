"""Networks that more than one script trains."""

import keras
from keras import layers


def resnet18(size=32, classes=10, width=64):
    """The ResNet-18 of He et al. (2016) as it is used on CIFAR: no pooling at the start, four stages of two blocks.

    Args:
        size: height and width of the images.
        classes: outputs.
        width: channels of the first stage; doubled by each of the other three. Default 64, the paper's.
    """
    convolution = {"padding": "same", "use_bias": False}

    def normalized(x):
        # Keras's own momentum, 0.99, takes hundreds of steps to forget the first ones.
        return layers.BatchNormalization(momentum=0.9)(x)

    def block(x, filters, stride):
        y = layers.ReLU()(normalized(layers.Conv2D(filters, 3, stride, **convolution)(x)))
        y = normalized(layers.Conv2D(filters, 3, **convolution)(y))
        if stride > 1 or x.shape[-1] != filters:
            x = normalized(layers.Conv2D(filters, 1, stride, **convolution)(x))
        return layers.ReLU()(layers.Add()([x, y]))

    inputs = keras.Input((size, size, 3))
    x = layers.ReLU()(normalized(layers.Conv2D(width, 3, **convolution)(inputs)))
    for stage in range(4):
        for i in range(2):
            x = block(x, width * 2**stage, 2 if stage and i == 0 else 1)
    outputs = layers.Dense(classes)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs, name="resnet18")
