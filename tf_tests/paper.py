"""The methods as their papers have them, which is what the tests of their equations train with."""

import keras_ngd


def _of(method, **defaults):
    def make(*args, **kwargs):
        settings = {**keras_ngd.PAPER_SETTINGS, "losses_per_example": 1, **defaults, **kwargs}
        for name, _ in zip(("learning_rate", "damping"), args, strict=False):
            settings.pop(name)
        return method(*args, **settings)

    return make


KFAC = _of(keras_ngd.KFAC, learning_rate=0.05, damping=0.01)
THOR = _of(keras_ngd.THOR, learning_rate=0.05, damping=0.01)
SKFAC = _of(keras_ngd.SKFAC, learning_rate=0.05, damping=0.03)
SNGD = _of(keras_ngd.SNGD, learning_rate=0.05, damping=0.1, interval=1)
HyLo = _of(keras_ngd.HyLo, learning_rate=0.05, damping=0.1)
