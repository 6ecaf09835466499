"""Starting all workers with the same values, of the same training."""

import json
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_ngd.distributed.communicator import Communicator
from keras_ngd.typing import Variable

NOT_GATHERED = (
    "With `reduce_scatter=True` each worker has the statistics of its own layers only, and those of others would be lost in what "
    "is saved or given to others. Add `keras_ngd.callbacks.GatherStatistics()` to the callbacks of all workers, before callbacks "
    "that save."
)


def check_same(communicator: Communicator, description: dict[str, Any]) -> None:
    """Raises a `ValueError` on every worker if one of them is about to train something else.

    Args:
        communicator: a `Communicator`.
        description: dict of what has to be the same everywhere, of what JSON can hold.
    """
    found = [json.loads(text) for text in communicator.gather_objects(json.dumps(description, default=str))]
    for rank, other in enumerate(found[1:], 1):
        for what, value in found[0].items():
            if other[what] != value:
                raise ValueError(f"Workers are not training the same: {_difference(what, value, other[what], rank)}")


def _difference(what: str, first: Any, second: Any, rank: int) -> str:
    if isinstance(first, dict) and isinstance(second, dict):
        for key in {**first, **second}:
            if first.get(key) != second.get(key):
                return _difference(f"{what} {key}", first.get(key), second.get(key), rank)
    return f"{what} is {first!r} on worker 0 but {second!r} on worker {rank}."


def description(variables: Sequence[Variable]) -> dict[str, Any]:
    """Of Keras variables, what `check_same` is to compare."""
    return {
        "number of variables": len(variables),
        "shape of variable": {str(i): [list(v.shape), str(v.dtype)] for i, v in enumerate(variables)},
    }


def broadcast_variables(communicator: Communicator, variables: Sequence[Variable], root: int = 0) -> None:
    """Gives all workers the values that worker `root` has of Keras variables, at once.

    Args:
        communicator: a `Communicator`.
        variables: list of Keras variables, in the same order on all workers.
        root: rank of the worker whose values are taken.

    Raises:
        ValueError: on all workers, if one has other variables.
    """
    if communicator.size == 1:
        return
    check_same(communicator, description(variables))
    for i, variable in enumerate(variables):
        [value] = communicator.broadcast(
            [ops.convert_to_tensor(variable)], root, "initial state", f"keras_ngd_initial_{i}"
        )
        variable.assign(value)
