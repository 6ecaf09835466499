"""The networks that step costs are measured on."""

import keras
from keras import layers

from examples.networks import resnet18


def resnet32(classes=10):
    """The CIFAR ResNet-32 of He et al. (2016), with projection shortcuts, for 32x32x3 images."""
    convolution = {"padding": "same", "use_bias": False}

    def block(x, filters, stride):
        y = layers.Conv2D(filters, 3, stride, **convolution)(x)
        y = layers.ReLU()(layers.BatchNormalization()(y))
        y = layers.BatchNormalization()(layers.Conv2D(filters, 3, **convolution)(y))
        if stride > 1:
            x = layers.BatchNormalization()(layers.Conv2D(filters, 1, stride, **convolution)(x))
        return layers.ReLU()(layers.Add()([x, y]))

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(16, 3, **convolution)(inputs)))
    for stage, filters in enumerate((16, 32, 64)):
        for i in range(5):
            x = block(x, filters, 2 if stage and i == 0 else 1)
    outputs = layers.Dense(classes)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs, name="resnet32")


def resnet50(size=64, classes=10):
    """ResNet-50 of `keras.applications`, for small images."""
    return keras.applications.ResNet50(
        weights=None, input_shape=(size, size, 3), classes=classes, classifier_activation=None
    )


NETWORKS = {
    "resnet18": {"make": lambda: resnet18(width=16), "size": 32, "batch": 128, "split": 16},
    "resnet32": {"make": resnet32, "size": 32, "batch": 128, "split": 16},
    "resnet50": {"make": resnet50, "size": 64, "batch": 16, "split": 128},
    "resnet50-224": {"make": lambda: resnet50(224, 1000), "size": 224, "batch": 64, "split": 128},
}
