"""What a layer is called inside of: loops, of which a trace sees one turn for all, and maps, which take the batch away."""

import sys
import types

from keras_ngd.backend.running import name

LOOPS, MAPS, VECTORIZED = "loop", "map", "vectorized map"

# The functions that make these, by the ends of the names of their files. Neither backend tells a function that is traced what
# for, and the tensors in a loop's body look as those of any other function do; but the function that traces it is running.
_MAKERS: dict[str, dict[tuple[str, ...], dict[str, str]]] = {
    "jax": {
        ("jax", "_src", "lax", "control_flow", "loops.py"): {
            "scan": LOOPS,
            "while_loop": LOOPS,
            "fori_loop": LOOPS,
            "map": MAPS,
        },
    },
    "tensorflow": {
        ("tensorflow", "python", "ops", "while_loop.py"): {"while_loop": LOOPS},
        ("tensorflow", "python", "ops", "while_v2.py"): {"while_loop": LOOPS},
        ("tensorflow", "python", "ops", "map_fn.py"): {"map_fn": MAPS},
        ("tensorflow", "python", "ops", "parallel_for", "control_flow_ops.py"): {
            "vectorized_map": VECTORIZED,
            "pfor": VECTORIZED,
        },
    },
}


def around():
    """The kinds of loops and maps that are being traced or run here, the outermost first."""
    makers, found = _MAKERS[name()], []
    frame: types.FrameType | None = sys._getframe(1)
    names = {function for functions in makers.values() for function in functions}
    while frame is not None:
        if frame.f_code.co_name in names:
            path = frame.f_code.co_filename.replace("\\", "/").split("/")
            for file, functions in makers.items():
                if tuple(path[-len(file) :]) == file:
                    found.append(functions.get(frame.f_code.co_name))
        frame = frame.f_back
    return [kind for kind in reversed(found) if kind is not None]


def between(call, backward):
    """What of `around()` at a call is not around its backward pass too, as a whole step of training, or a pass of it, may be."""
    return call[len(backward) :]


def unvectorized(tensor, message):
    """The tensor as it is; a `ValueError` with `message` where JAX maps over it by vectorizing."""
    if name() != "jax":
        return tensor
    import jax

    @jax.custom_batching.custom_vmap
    def identity(tensor):
        return tensor

    @identity.def_vmap
    def refuse(axis_size, in_batched, tensor):
        raise ValueError(message)

    return identity(tensor)
