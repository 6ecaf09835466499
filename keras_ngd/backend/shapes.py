"""Static shapes: what a function gives, without computing it, and whether that is what it is to give."""

from keras_ngd import keras_private
from keras_ngd.backend.running import name


class WrongShape(ValueError):
    """What something gave is not of the shape it is to have. Says what, but not of which layer: who knows that adds it."""

    def __init__(self, message):
        super().__init__(message)
        keras_private.keep_message(self)


def static_shape(tensor):
    """A tensor's shape, None for sizes that are not known; None where not even its rank is, or where it is no tensor."""
    shape = getattr(tensor, "shape", None)
    if shape is None or getattr(shape, "rank", 0) is None:
        return None
    return tuple(shape)


def agrees(found, expected):
    """Whether tensors have the shapes that are expected of them, as far as these are known.

    Args:
        found: a tensor, or a list of such.
        expected: for a tensor the tuple of its sizes, of which only ints are looked at; for a list a list.
    """
    if isinstance(expected, list):
        return isinstance(found, (list, tuple)) and len(found) == len(expected) and all(map(agrees, found, expected))
    if not hasattr(found, "shape"):
        return False
    shape = static_shape(found)
    if shape is None:
        return True
    known = [(s, e) for s, e in zip(shape, expected, strict=False) if isinstance(s, int) and isinstance(e, int)]
    return len(shape) == len(expected) and all(size == e for size, e in known)


def shown(found):
    """What to say of the shapes of tensors, or of shapes, in lists or alone."""
    if hasattr(found, "shape"):
        shape = static_shape(found)
        return "of an unknown rank" if shape is None else shown(shape)
    if isinstance(found, tuple) and all(isinstance(size, (int, str, type(None))) for size in found):
        return f"({', '.join(map(str, found))}{',' if len(found) == 1 else ''})"
    return f"[{', '.join(map(shown, found))}]" if isinstance(found, (list, tuple)) else repr(found)


def check_shapes(found, expected, what):
    """Raises a `WrongShape` unless `agrees(found, expected)`; `what` gave it."""
    if not agrees(found, expected):
        raise WrongShape(f"{what} gives the shape {shown(found)}, where {shown(expected)} was expected")


def without_computing(function, shapes, dtypes):
    """Calls `function` of tensors of these shapes and dtypes, none of which has a value: for what it raises."""
    if name() == "tensorflow":
        import tensorflow as tf

        specs = [tf.TensorSpec(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        tf.function(function, autograph=False).get_concrete_function(*specs)
    else:
        import jax

        jax.eval_shape(function, *(jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)))
