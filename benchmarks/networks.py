"""The networks that step costs are measured on."""

import keras

from examples.networks import resnet18, resnet32


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
