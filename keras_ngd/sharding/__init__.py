"""State on the devices of a `keras.distribution`: where it lies, and who does what of the work on it. Of the JAX backend alone.

On TensorFlow there is no such distribution; state lies as Keras has it, and all work is done by all.
"""

from keras_ngd.sharding.division import divided, dividing, is_dividing
from keras_ngd.sharding.layout import (
    Spread,
    add,
    check,
    check_batch,
    distribution,
    from_numpy,
    gathered,
    shape_of,
    spread,
    spread_of,
    stored,
    to_numpy,
)

__all__ = [
    "Spread",
    "add",
    "check",
    "check_batch",
    "distribution",
    "divided",
    "dividing",
    "from_numpy",
    "gathered",
    "is_dividing",
    "shape_of",
    "spread",
    "spread_of",
    "stored",
    "to_numpy",
]
