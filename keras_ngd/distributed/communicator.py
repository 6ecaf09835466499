"""How workers talk to each other, and who that is when there is only one."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_ngd import backend
from keras_ngd.typing import Tensor


class Communicator:
    """One worker, on its own; the base of those for several.

    The collectives take and return lists of tensors, and belong to a `stage` of the training step (`"gradients"`,
    `"statistics"`, ...), by which the bytes received are counted. All workers must call the same collectives with the same
    `name`s; the order does not matter. One worker's collectives return what they are given.

    Attributes:
        size: number of workers.
        rank: which of them this is, from 0; None where one trace is for all.
        local_rank: the same, among the workers of its machine.
        single_program: whether workers are one program, whose variables are the same from the start.
    """

    size: int = 1
    rank: int | None = 0
    local_rank: int = 0
    single_program: bool = False

    @property
    def batch_share(self) -> float:
        """What one worker is given of the batches that the user speaks of; Keras multiplies its loss with the same number."""
        return 1 / self.size if self.single_program else 1.0

    def all_reduce(self, tensors: Sequence[Tensor], stage: str, name: str) -> list[Tensor]:
        """Sums over all workers, on all workers; received are `2 (P - 1) / P` times the tensors' size (in a ring)."""
        return list(tensors)

    def all_gather(self, tensors: Sequence[Tensor], stage: str, name: str) -> list[Tensor]:
        """All workers' tensors, one after the other along the first axis, along which they may differ in length.

        Received is what the others give.
        """
        return list(tensors)

    def reduce_scatter(
        self, tensors: Sequence[Tensor], owners: Sequence[int], stage: str, name: str
    ) -> list[Tensor | None]:
        """Sums over all workers, each on its owner only; None on all others.

        Received are `P - 1` times the tensors that this worker owns.

        Args:
            owners: the rank that is to have the sum, for each tensor.
        """
        return list(tensors)

    def broadcast(self, tensors: Sequence[Tensor], root: int, stage: str, name: str) -> list[Tensor]:
        """The tensors of the worker `root`, on all workers; the others' are looked at for their shapes only.

        Received are the tensors' sizes, by all but `root`.
        """
        return list(tensors)

    def exchange(
        self, tensors: Sequence[Tensor], receivers: Sequence[int], lengths: Sequence[Any], stage: str, name: str
    ) -> list[Tensor]:
        """Gives one vector to some of the workers, and takes theirs.

        Received is what is taken.

        Args:
            tensors: this worker's vectors, sent as one.
            receivers: ranks of the others that are to have it.
            lengths: of what each worker has for this one, by rank: ints or scalars, 0 for those that have nothing.

        Returns:
            The vectors that all workers have sent to this one, by rank.
        """
        return list(tensors)

    def as_sent(self, tensors: Sequence[Tensor], stage: str) -> list[Tensor]:
        """Tensors as those that receive them have them: rounded, where less than they are is sent."""
        return list(tensors)

    def gather_objects(self, value: Any) -> list[Any]:
        """All workers' Python objects, by rank, at once (not as a part of a graph)."""
        return [value]

    def broadcast_object(self, value: Any) -> Any:
        """The Python object of worker 0, at once."""
        return value

    def received_bytes(self) -> dict[str, int]:
        """Bytes that this worker has received so far, by stage."""
        return {}


def check(communicator: Communicator | str) -> None:
    """Raises a `ValueError` if an optimizer's argument cannot stand for a communicator."""
    if not isinstance(communicator, Communicator) and communicator not in ("auto", "horovod", "local"):
        raise ValueError(
            "`communicator` must be 'auto', 'horovod', 'local' or a `keras_ngd.distributed.Communicator`. Received: "
            f"communicator={communicator!r}"
        )


def resolve(communicator: Communicator | str, optimizer: keras.optimizers.Optimizer | None = None) -> Communicator:
    """The communicator that an optimizer's argument stands for.

    Args:
        communicator: `"auto"`: the replicas of a `tf.distribute` strategy, or Horovod where it is initialised with more than
            one process, or none; `"horovod"`; `"local"`; or a `Communicator`.
        optimizer: one that may have been made in the scope of a strategy.

    Raises:
        ValueError: for anything else, where Horovod is asked for but is not installed, not initialised or of no use to
            the running backend, and where there is a strategy but it cannot be used or something else is asked for.
    """
    check(communicator)
    if optimizer is not None and backend.has_strategies():
        from keras_ngd.distributed import strategies

        strategy = strategies.strategy_of(optimizer)
        if strategy is not None and communicator != "auto":
            raise ValueError(
                f"Under {type(strategy).__name__} replicas talk to each other by themselves: leave `communicator` at 'auto'. "
                f"Received: communicator={communicator!r}"
            )
        if strategy is not None:
            return strategies.make(strategy)
    if isinstance(communicator, Communicator):
        return communicator
    if communicator == "local":
        return Communicator()
    if communicator == "auto" and not backend.several_processes():
        return Communicator()
    if not backend.serves_horovod():
        raise ValueError(
            f"Horovod serves the TensorFlow backend, but {backend.setting()}. Received: communicator={communicator!r}"
        )
    from keras_ngd.distributed.horovod import Horovod

    return Horovod()
