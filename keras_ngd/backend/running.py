"""Which backend runs: asked here, and by the modules of this package."""

import keras

BACKENDS = ("tensorflow", "jax")


def name():
    """The running Keras backend; a `RuntimeError` if it is one this package does not serve."""
    backend = keras.backend.backend()
    if backend not in BACKENDS:
        raise RuntimeError(
            f"keras_ngd runs on the Keras backends {BACKENDS}, but KERAS_BACKEND={backend!r}. "
            "Set KERAS_BACKEND before the first import of keras."
        )
    return backend


def runs(backend):
    """Whether this backend is running; unlike `name` it knows those that are not served, too."""
    return keras.backend.backend() == backend


def check_served():
    """Raises a `RuntimeError` if the running backend is one this package does not serve."""
    name()


def setting():
    """How the running backend was asked for, as messages have it: `KERAS_BACKEND='jax'`."""
    return f"KERAS_BACKEND={name()!r}"
