"""The replicas of a `tf.distribute` strategy: one program on many devices. Of the TensorFlow backend alone."""

import warnings
import zlib
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_ngd import keras_private, replica
from keras_ngd.distributed.by_dtype import summed
from keras_ngd.distributed.communicator import Communicator
from keras_ngd.distributed.multi_worker import MultiWorkerMirroredStrategy
from keras_ngd.typing import Tensor

# Those whose replicas step together.
SERVED = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy, tf.distribute.TPUStrategy)


def strategy_of(optimizer: keras.optimizers.Optimizer) -> tf.distribute.Strategy | None:
    """The strategy of several replicas in whose scope an optimizer was made, or None.

    Raises:
        ValueError: for a strategy whose replicas do not step together.
    """
    strategy = keras_private.strategy_of_optimizer(optimizer)
    if isinstance(
        strategy, (tf.distribute.experimental.ParameterServerStrategy, tf.distribute.ParameterServerStrategy)
    ):
        raise ValueError(
            "Workers of a ParameterServerStrategy step one by one, with no gradient of all to precondition. Use "
            "MirroredStrategy, MultiWorkerMirroredStrategy or TPUStrategy."
        )
    if strategy.num_replicas_in_sync == 1:
        return None
    if not isinstance(strategy, SERVED):
        raise ValueError(
            "keras_ngd trains under MirroredStrategy, MultiWorkerMirroredStrategy and TPUStrategy. Received: "
            f"{type(strategy).__name__}"
        )
    return strategy


def make(strategy: tf.distribute.Strategy) -> Communicator:
    """The communicator of a strategy's replicas."""
    several_machines = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    if several_machines and not isinstance(strategy, MultiWorkerMirroredStrategy):
        warnings.warn(
            "`fit` of Keras 3 does not run under TensorFlow's own MultiWorkerMirroredStrategy. Use "
            "`keras_ngd.distributed.MultiWorkerMirroredStrategy()`, which is the same but for that.",
            stacklevel=2,
        )
    return TPUReplicas(strategy) if isinstance(strategy, tf.distribute.TPUStrategy) else Replicas(strategy)


class Replicas(Communicator):
    """The replicas of `MirroredStrategy` or `MultiWorkerMirroredStrategy`, seen from inside one's part of a training step.

    TensorFlow's collective operations are used directly: they may be inside of conditionals, which a strategy's own
    `all_reduce` may not, and a step without an update then exchanges gradients alone.

    Attributes:
        single_program: True: their variables are the same from the start, made by one program.
    """

    single_program = True

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self.strategy, self.size = strategy, strategy.num_replicas_in_sync
        # All processes name the group alike, and know their own devices only.
        devices = strategy.extended.worker_devices
        self._group = _key(f"keras_ngd {self.size} {devices if len(devices) == self.size else ''}")
        self._instances: dict[int, str] = {}

    # An attribute of other communicators, but of replicas it depends on who asks.
    @property
    def rank(self) -> int | None:  # type: ignore[override]
        """Of the replica being traced or run, 0 outside of one; None where all replicas are traced as one."""
        return 0 if replica.context() is None else replica.number()

    def _collective(self, name: str, tensor: Tensor) -> dict[str, int]:
        """Arguments of a collective operation: all replicas find the others by its name and its tensor."""
        name = f"{name} {tensor.dtype.name} {tensor.shape}"
        key = _key(name)
        if self._instances.setdefault(key, name) != name:
            raise ValueError(f"Two exchanges have the same key {key}: {name!r} and {self._instances[key]!r}.")
        return {"group_size": self.size, "group_key": self._group, "instance_key": key}

    def all_reduce(self, tensors: Sequence[Tensor], stage: str, name: str) -> list[Tensor]:
        def reduced(sent: list[Tensor], dtype: str) -> list[Tensor]:
            # As one vector: there are many small ones.
            flat = self._sum(tf.concat([tf.reshape(t, [-1]) for t in sent], axis=0), f"{name} {dtype}")
            parts = tf.split(flat, [t.shape.num_elements() for t in sent])
            return [tf.reshape(part, t.shape) for part, t in zip(parts, sent, strict=True)]

        return summed(tensors, reduced)

    def _sum(self, vector: Tensor, name: str) -> Tensor:
        return tf.raw_ops.CollectiveReduce(
            input=vector, **self._collective(name, vector), merge_op="Add", final_op="Id", subdiv_offsets=[0]
        )

    def all_gather(self, tensors: Sequence[Tensor], stage: str, name: str) -> list[Tensor]:
        gathered = []
        for i, tensor in enumerate(tensors):
            tensor = tf.convert_to_tensor(tensor)
            shape = [self.size * tensor.shape[0], *tensor.shape[1:]]
            arguments = self._collective(f"{name} {i}", tensor)
            gathered.append(tf.raw_ops.CollectiveGather(input=tensor, shape=shape, **arguments))
        return gathered

    def broadcast(self, tensors: Sequence[Tensor], root: int, stage: str, name: str) -> list[Tensor]:
        received = []
        for i, tensor in enumerate(tensors):
            tensor = tf.convert_to_tensor(tensor)
            # TensorFlow remembers of a name who sends: another model's layers may be others' of the same shape.
            arguments = {"shape": tensor.shape, **self._collective(f"{name} {i} of {root}", tensor)}
            if self.rank == root:
                received.append(tf.raw_ops.CollectiveBcastSend(input=tensor, **arguments))
            else:
                received.append(tf.raw_ops.CollectiveBcastRecv(T=tensor.dtype, **arguments))
        return received


class TPUReplicas(Replicas):
    """The replicas of `TPUStrategy`: one trace for all, compiled by XLA, in which a replica is known as a tensor only."""

    # An attribute of other communicators, but of replicas it depends on who asks.
    @property
    def rank(self) -> int | None:  # type: ignore[override]
        return 0 if replica.context() is None else None

    def all_reduce(self, tensors: Sequence[Tensor], stage: str, name: str) -> list[Tensor]:
        return [self._sum(tf.convert_to_tensor(t), f"{name} {i}") for i, t in enumerate(tensors)]

    def _sum(self, vector: Tensor, name: str) -> Tensor:
        return tf.raw_ops.CrossReplicaSum(input=vector, group_assignment=[list(range(self.size))])

    def all_gather(self, tensors: Sequence[Tensor], stage: str, name: str) -> list[Tensor]:
        """Sums of what each replica puts into its own place: TPUs have no other gathering in TensorFlow."""
        mine, gathered = replica.identity(), []
        for i, tensor in enumerate(tensors):
            tensor = tf.convert_to_tensor(tensor)
            one_hot = tf.cast(tf.range(self.size) == mine, tensor.dtype)
            places = tf.reshape(tf.tensordot(one_hot, tensor, axes=0), [self.size * tensor.shape[0], *tensor.shape[1:]])
            gathered.append(self._sum(places, f"{name} {i}"))
        return gathered


def _key(text: str) -> int:
    """The same positive int32 in all processes."""
    return zlib.crc32(text.encode()) & 0x7FFFFFFF
