"""Starting all workers with the same values."""

from keras import ops


def broadcast_variables(communicator, variables, root=0):
    """Gives all workers the values that worker `root` has of Keras variables, at once.

    Args:
        communicator: a `Communicator`.
        variables: list of Keras variables, in the same order on all workers.
        root: rank of the worker whose values are taken.
    """
    if communicator.size == 1:
        return
    for i, variable in enumerate(variables):
        [value] = communicator.broadcast(
            [ops.convert_to_tensor(variable)], root, "initial state", f"keras_ngd_initial_{i}"
        )
        variable.assign(value)
