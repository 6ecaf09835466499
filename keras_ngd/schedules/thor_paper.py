"""The learning rates and dampings that the THOR paper trains with."""

from typing import Any

import keras

from keras_ngd.schedules.changing import WarmupPolynomialDecay
from keras_ngd.schedules.checking import check_count

# THOR, Table 3: learning rates (initial, target, epochs of warm-up, epochs of decay, power), and dampings (initial, factor
# in 10 epochs).
_IMAGENET: dict[str, tuple[Any, ...]] = {
    "imagenet-256": (None, 0.045, None, 70, 6, 0.03, 0.87),
    "imagenet-256-stop": (None, 0.050, None, 70, 6, 0.03, 0.87),
    "imagenet-256-nt": (None, 0.045, None, 72, 6, 0.03, 0.87),
    "imagenet-4096": (0.005, 0.45, 5, 55, 6, 0.3, 0.2),
    "imagenet-8192": (0.01, 0.8, 5, 48, 6, 0.6, 0.3),
}
THOR_PRESETS = ("cifar10", *_IMAGENET)


def thor_schedules(preset: str, steps_per_epoch: int) -> dict[str, keras.optimizers.schedules.LearningRateSchedule]:
    """The learning rate and damping schedules of the THOR paper, as Keras schedules.

    `"cifar10"` is eq. 13: both fall tenfold every 30 epochs, from 0.1 and 0.3. The others are ResNet-50's on ImageNet by
    batch size (eq. 14 to 16, Table 3), `-stop` and `-nt` those of the paper's variants.

    ```python
    keras_ngd.THOR(**keras_ngd.schedules.thor_schedules("cifar10", steps_per_epoch=391), split=72)
    ```

    Args:
        preset: one of `THOR_PRESETS`.
        steps_per_epoch: int of at least 1.

    Returns:
        A dict with `learning_rate` and `damping`.
    """
    if preset not in THOR_PRESETS:
        raise ValueError(f"`preset` must be one of {THOR_PRESETS}. Received: preset={preset!r}")
    steps = check_count("steps_per_epoch", steps_per_epoch)
    decay = keras.optimizers.schedules.ExponentialDecay
    if preset == "cifar10":
        return {
            "learning_rate": decay(0.1, 30 * steps, 0.1, staircase=True),
            "damping": decay(0.3, 30 * steps, 0.1, staircase=True),
        }
    initial, target, warmup, end, power, damping, rho = _IMAGENET[preset]
    if warmup is None:
        rate = keras.optimizers.schedules.PolynomialDecay(target, end * steps, end_learning_rate=0.0, power=power)
    else:
        rate = WarmupPolynomialDecay(initial, target, warmup * steps, end * steps, power)
    return {"learning_rate": rate, "damping": decay(damping, 10 * steps, rho)}
