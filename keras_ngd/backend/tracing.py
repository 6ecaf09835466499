"""What is traced: when it is over, what of it is seen from where, and what happens outside of it."""

import contextlib

from keras import ops

from keras_ngd import keras_private
from keras_ngd.backend.running import name, runs
from keras_ngd.backend.xla import under_xla

# What stands for a trace where nothing is traced.
_NO_TRACE = object()


def graph():
    """TensorFlow's graph that is being traced; None where nothing is, and on JAX."""
    if name() == "jax":
        return None
    import tensorflow as tf

    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def trace_of(value):
    """An object that is the same for all uses of one variable's `value` in a trace, and differs between traces."""
    if name() == "jax":
        return value
    # Where nothing is traced, each reading of a variable is a tensor of its own.
    return value.graph if hasattr(value, "graph") else _NO_TRACE


def within(outer):
    """Whether what is being traced now sees what was made in the graph `outer`, or outside of any (None)."""
    inner = graph()
    while inner is not None and inner is not outer:
        inner = getattr(inner, "outer_graph", None)
    return inner is outer


def usable(tensor):
    """Whether what is being traced or run now can compute with a tensor; one that a finished trace left behind cannot."""
    if isinstance(tensor, (int, float)):
        return True
    if name() == "tensorflow":
        return not hasattr(tensor, "graph") or within(tensor.graph)
    import jax

    try:
        jax.numpy.add(tensor, 0)
    except jax.errors.UnexpectedTracerError:
        return False
    return True


def value_read(variable, read):
    """A variable's value in this trace, `read` having been it in a part of the trace that this one need not see into."""
    # TensorFlow's functions called from this one have graphs of their own; JAX's inner traces see what the outer ones do.
    return ops.convert_to_tensor(variable) if name() == "tensorflow" else read


@contextlib.contextmanager
def outside_trace():
    """A context for assignments, and for making variables, that are to happen once and now, though a function may be traced.

    TensorFlow traces a function twice that makes variables while it is traced, unless they are made like this.
    """
    if name() == "jax":
        yield
        return
    import tensorflow as tf

    def now(next_creator, **arguments):
        return next_creator(**{**arguments, "experimental_enable_variable_lifting": False})

    with tf.init_scope(), tf.variable_creator_scope(now):
        yield


def makes_variables():
    """Whether a variable made now, in a layer's call, is seen by the trainer that differentiates what the layer computes."""
    return name() == "tensorflow" and not keras_private.is_stateless()


def unconverted(function):
    """`function`, which TensorFlow's AutoGraph is to leave as it is in a function of `tf.function` that calls it."""
    # Not `name`: importing the package fails on no backend.
    if not runs("tensorflow"):
        return function
    import tensorflow as tf

    return tf.autograph.experimental.do_not_convert(function)


def traced_once(function):
    """`function` of tensors, traced once for each combination of their shapes and dtypes however often it is called.

    A graph on TensorFlow, compiled by XLA on JAX, as a training step is.

    The layers of a deep network come in few shapes, and tracing the operations of one takes longer than running them.
    """
    if name() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False)
    import jax

    return jax.jit(function)


def called(function):
    """`function` without arguments, which TensorFlow's graphs call where else they would take its operations in.

    Of a function of `traced_once` TensorFlow optimizes the operations anew for each place that it is used in. What is called in
    it is made ready once for all of them, when it first runs. That takes longer than for one place, and so does every call: it
    is for what several places use, but not in every step.
    """
    if name() != "tensorflow" or under_xla():
        return function
    import tensorflow as tf

    return tf.function(function, autograph=False, experimental_attributes={"_noinline": True})


def check_at_most(count, limit, message, tensors=()):
    """Fails with `message` where `count`, a scalar tensor, is larger than `limit`.

    Returns `tensors`, which are had only where it does not: TensorFlow runs what does not wait for a check beside it, and
    might fail there first.
    """
    if name() == "tensorflow":
        import tensorflow as tf

        with tf.control_dependencies([tf.debugging.assert_less_equal(count, limit, message=message)]):
            return [tf.identity(t) for t in tensors]
    return list(tensors)


def check_none(wrong, messages):
    """Fails where one of the booleans `wrong`, `[n]`, holds, with the one of the `messages` that is its own.

    Not under XLA, which has no strings.
    """
    if name() != "tensorflow" or under_xla():
        return
    import tensorflow as tf

    first = tf.argmax(tf.cast(wrong, "int32"))
    tf.debugging.Assert(~tf.reduce_any(wrong), [tf.gather(tf.constant(messages), first)])
