"""Horovod's collectives, of `horovod.tensorflow` alone: its Keras wrappers hook what Keras 3 never calls.

Of the TensorFlow backend alone, and the only module that imports Horovod.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_ngd.distributed.by_dtype import summed
from keras_ngd.distributed.communicator import Communicator
from keras_ngd.typing import Tensor

WIRE_DTYPES = (None, "float16", "bfloat16")
# The stages of a step to which `wire_dtype` applies.
SHORTENED = ("statistics", "inverses")


def _load() -> Any:
    try:
        import horovod.tensorflow as horovod
    except ImportError as error:
        raise ValueError(
            "`communicator='horovod'` needs Horovod, which is not installed: run `horovod_scripts/install_horovod.sh`. "
            f"({error})"
        ) from error
    if not horovod.is_initialized():
        raise ValueError(
            "`communicator='horovod'` needs `horovod.tensorflow.init()` to be called first, before the model is captured."
        )
    return horovod


def _bytes(tensor: Tensor) -> Any:
    """Size of a tensor, as a number where its shape is static."""
    count = tensor.shape.num_elements()
    return (tf.size(tensor, out_type="int64") if count is None else count) * tensor.dtype.size


class Horovod(Communicator):
    """All processes of a Horovod job.

    Every process says which collective it is in by a name; names are ours and do not depend on where in a graph they are, since
    workers trace different graphs.

    Args:
        wire_dtype: `"bfloat16"` or `"float16"` to send inverses, scattered factors, and the rows of SKFAC, SNGD and HyLo with
            half the bytes. Gradients, and factors that are summed on the way (all-reduced), travel as they are. Default None:
            so does everything.

    Raises:
        ValueError: if Horovod is not installed or `horovod.tensorflow.init()` was not called.
    """

    rank: int

    def __init__(self, wire_dtype: str | None = None) -> None:
        if wire_dtype not in WIRE_DTYPES:
            raise ValueError(f"`wire_dtype` must be one of {WIRE_DTYPES}. Received: wire_dtype={wire_dtype!r}")
        self._horovod = hvd = _load()
        self.wire_dtype = wire_dtype
        self.size, self.rank, self.local_rank = (ask() for ask in (hvd.size, hvd.rank, hvd.local_rank))
        self._received: dict[str, tf.Variable] = {}
        self._turn: tf.Variable | None = None

    def all_reduce(self, tensors: Sequence[Tensor], stage: str, name: str) -> list[Tensor]:
        sizes: list[Any] = []
        totals: list[Tensor] = []

        def reduced(sent: list[Tensor], dtype: str) -> list[Tensor]:
            sizes.extend(map(_bytes, sent))
            found = self._horovod.grouped_allreduce(
                sent, op=self._horovod.Sum, name=f"{name}_{dtype}", ignore_name_scope=True
            )
            totals.extend(found)
            return found

        sums = summed(tensors, reduced)
        self._count(stage, 2 * (self.size - 1) * sum(sizes) // self.size, totals)
        return sums

    def all_gather(self, tensors: Sequence[Tensor], stage: str, name: str) -> list[Tensor]:
        gathered = []
        for i, tensor in enumerate(tensors):
            tensor = tf.convert_to_tensor(tensor)
            sent = self._encode(tensor, stage)
            received = self._horovod.allgather(sent, name=f"{name}_{i}", ignore_name_scope=True)
            self._count(stage, _bytes(received) - _bytes(sent), [received])
            gathered.append(self._decode(received, tensor.dtype))
        return gathered

    def reduce_scatter(
        self, tensors: Sequence[Tensor], owners: Sequence[int], stage: str, name: str
    ) -> list[Tensor | None]:
        # Horovod's own divides equally; layers are not equal, and padding them to the largest can send many times as much.
        # An exchange moves the same bytes as a ring would, and adds them in the same order whoever owns them.
        tensors = [tf.convert_to_tensor(t) for t in tensors]
        if not tensors:
            return []
        order = sorted(range(len(tensors)), key=lambda i: (owners[i], i))
        counts = [t.shape.num_elements() for t in tensors]
        splits = [sum(c for c, owner in zip(counts, owners, strict=True) if owner == rank) for rank in range(self.size)]
        flat = self._encode(tf.concat([tf.reshape(tensors[i], [-1]) for i in order], axis=0), stage)
        received = self._alltoall(flat, tf.constant(splits, tf.int32), name)
        mine = splits[self.rank]
        self._count(stage, (self.size - 1) * mine * flat.dtype.size, [received])
        contributions = tf.reshape(self._decode(received, tensors[0].dtype), [self.size, mine])
        total, start, sums = tf.reduce_sum(contributions, axis=0), 0, [None] * len(tensors)
        for i in order:
            if owners[i] == self.rank:
                sums[i] = tf.reshape(total[start : start + counts[i]], tensors[i].shape)
                start += counts[i]
        return sums

    def broadcast(self, tensors: Sequence[Tensor], root: int, stage: str, name: str) -> list[Tensor]:
        received = []
        for i, tensor in enumerate(tensors):
            tensor = tf.convert_to_tensor(tensor)
            sent = self._encode(tensor, stage)
            result = self._horovod.broadcast(sent, root, name=f"{name}_{i}", ignore_name_scope=True)
            self._count(stage, 0 if self.rank == root else _bytes(sent), [result])
            # The root, too, goes on with what was sent: what it has is more exact, and it would be out of step.
            received.append(tf.ensure_shape(self._decode(result, tensor.dtype), tensor.shape))
        return received

    def exchange(
        self, tensors: Sequence[Tensor], receivers: Sequence[int], lengths: Sequence[Any], stage: str, name: str
    ) -> list[Tensor]:
        flat = self._encode(tf.concat([tf.reshape(t, [-1]) for t in tensors], axis=0), stage)
        splits = tf.stack([tf.size(flat) if rank in receivers else 0 for rank in range(self.size)])
        copies = tf.tile(flat, [len(receivers)])
        received = self._alltoall(copies, splits, name)
        lengths = [tf.convert_to_tensor(length, tf.int32) for length in lengths]
        self._count(stage, tf.add_n(lengths) * flat.dtype.size, [received])
        return tf.split(self._decode(received, tensors[0].dtype), tf.stack(lengths), num=self.size)

    def _alltoall(self, flat: Tensor, splits: Tensor, name: str) -> Tensor:
        # Horovod hangs on Gloo where several of these are ready at once: each waits for the one before it. The variable tells
        # TensorFlow, which orders what reads and writes one, in and out of conditionals.
        if self._turn is None:
            with tf.init_scope():
                self._turn = tf.Variable(0, dtype=tf.int64, trainable=False, name="turn")
        with tf.control_dependencies([self._turn.read_value()]):
            received, _ = self._horovod.alltoall(tf.identity(flat), splits=splits, name=name, ignore_name_scope=True)
        with tf.control_dependencies([received]):
            self._turn.assign_add(1)
        return received

    def as_sent(self, tensors: Sequence[Tensor], stage: str) -> list[Tensor]:
        return [self._decode(self._encode(tf.convert_to_tensor(t), stage), t.dtype) for t in tensors]

    def _encode(self, tensor: Tensor, stage: str) -> Tensor:
        """A tensor as it travels. Horovod knows no bfloat16, but moves the bits."""
        if tensor.dtype == tf.float32 and self.wire_dtype is not None and stage in SHORTENED:
            tensor = tf.cast(tensor, self.wire_dtype)
        return tf.bitcast(tensor, tf.uint16) if tensor.dtype == tf.bfloat16 else tensor

    def _decode(self, tensor: Tensor, dtype: tf.DType) -> Tensor:
        if tensor.dtype == tf.uint16:
            tensor = tf.bitcast(tensor, tf.bfloat16)
        return tf.cast(tensor, dtype)

    def gather_objects(self, value: Any) -> list[Any]:
        from horovod.tensorflow.functions import allgather_object

        return allgather_object(value, name="keras_ngd_object")

    def broadcast_object(self, value: Any) -> Any:
        from horovod.tensorflow.functions import broadcast_object

        return broadcast_object(value, root_rank=0, name="keras_ngd_object")

    def _count(self, stage: str, size: Any, done: Sequence[Tensor]) -> None:
        """Counts bytes once the tensors `done` are there.

        So every exchange happens, too: a graph drops operations whose results nobody uses, and a worker that has no use for
        them would leave the others waiting.
        """
        if stage not in self._received:
            with tf.init_scope():
                self._received[stage] = tf.Variable(0, dtype=tf.int64, trainable=False, name=f"received_{stage}")
        with tf.control_dependencies(done):
            self._received[stage].assign_add(tf.cast(size, tf.int64))

    def received_bytes(self) -> dict[str, int]:
        return {stage: int(total) for stage, total in self._received.items()}
