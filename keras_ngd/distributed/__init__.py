"""Several workers: how they talk to each other, and what they divide among them."""

from typing import Any

from keras_ngd.distributed.communicator import Communicator, check, resolve
from keras_ngd.distributed.data import in_turn, shard
from keras_ngd.distributed.initial_state import NOT_GATHERED, broadcast_variables, check_same, description
from keras_ngd.distributed.placement import gradient_workers, holders_of, place, row_of

__all__ = [
    "NOT_GATHERED",
    "Communicator",
    "Horovod",
    "MultiWorkerMirroredStrategy",
    "broadcast_variables",
    "check",
    "check_same",
    "description",
    "gradient_workers",
    "holders_of",
    "in_turn",
    "place",
    "resolve",
    "row_of",
    "shard",
]


def __getattr__(name: str) -> Any:
    # Late: it imports TensorFlow.
    if name == "Horovod":
        from keras_ngd.distributed.horovod import Horovod

        return Horovod
    if name == "MultiWorkerMirroredStrategy":
        from keras_ngd.distributed.multi_worker import MultiWorkerMirroredStrategy

        return MultiWorkerMirroredStrategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
