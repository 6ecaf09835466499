"""Several workers: how they talk to each other, and what they divide among them."""

from keras_ngd.distributed.communicator import Communicator, check, resolve
from keras_ngd.distributed.data import shard
from keras_ngd.distributed.initial_state import broadcast_variables
from keras_ngd.distributed.placement import place

__all__ = ["Communicator", "Horovod", "broadcast_variables", "check", "place", "resolve", "shard"]


def __getattr__(name):
    # Late: it imports TensorFlow.
    if name == "Horovod":
        from keras_ngd.distributed.horovod import Horovod

        return Horovod
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
