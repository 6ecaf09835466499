"""What a replica of a `tf.distribute` strategy sees of itself; elsewhere there is one replica."""

import contextlib

from keras_ngd import backend, keras_private


def several():
    """Whether a `tf.distribute` strategy of several replicas is active."""
    return backend.replicas_in_sync() > 1


def scope_of(model, optimizer):
    """A context in which variables are made where a model's are.

    Raises:
        ValueError: if an optimizer was made in the scope of another `tf.distribute` strategy.
    """
    if not backend.has_strategies():
        return contextlib.nullcontext()
    strategy, other = keras_private.strategy_of_model(model), keras_private.strategy_of_optimizer(optimizer)
    if (other.num_replicas_in_sync > 1) if strategy is None else (other is not strategy):
        names = ["no strategy" if strategy is None else type(strategy).__name__, type(other).__name__]
        raise ValueError(
            "The model and its optimizer must be made in the scope of the same strategy: write both inside of one `with "
            f"strategy.scope():`. Received: a model of {names[0]}, an optimizer of {names[1]}"
        )
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def context():
    """TensorFlow's context of the replica that is being traced or run; None outside of one, and where there is only one."""
    return backend.replica_context() if several() else None


def count():
    """How many replicas there are, seen from inside of one; 1 elsewhere."""
    return 1 if (inside := context()) is None else inside.num_replicas_in_sync


def number():
    """Of the replica that is being traced or run; None outside of one, and where all are traced as one."""
    return None if (inside := context()) is None else backend.replica_number(inside)


def identity():
    """The same, a tensor where all are traced as one; 0 outside of one."""
    if (inside := context()) is None:
        return 0
    return inside.replica_id_in_sync_group if (found := number()) is None else found


def local(variable):
    """This replica's component of a variable that is mirrored on all, TensorFlow's; the variable where none has a number."""
    if (found := number()) is None:
        return variable
    components = context().strategy.experimental_local_results(getattr(variable, "value", variable))
    return components[found % len(components)]


def surroundings():
    """What a trace depends on besides its arguments: two are interchangeable where this is equal."""
    return backend.under_xla(), backend.compiled_for(), count(), number()


def trace_of(value):
    """An object and a number that are the same for all uses of one variable's `value` in a trace, and differ between traces."""
    # Replicas of a strategy are traced one after the other into the same graph.
    return backend.trace_of(value), number()
