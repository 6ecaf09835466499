"""Every worker's part of a data set."""

from collections.abc import Callable
from typing import Any

from keras_ngd.distributed.communicator import Communicator, resolve


def in_turn(function: Callable[[], Any], communicator: Communicator | str = "auto") -> Any:
    """What `function()` returns; the first worker of every machine calls it before all others do.

    For what downloads or writes a file that the others then find.
    """
    communicator = resolve(communicator)
    result = None
    for first in (True, False):
        if (communicator.local_rank == 0) == first:
            result = function()
        communicator.gather_objects(None)
    return result


def shard(dataset: Any, communicator: Communicator | str = "auto") -> Any:
    """This worker's part of a `tf.data.Dataset` of examples: every `P`-th, from its rank on.

    All parts are equally long, so that all workers make equally many steps: up to `P - 1` examples at the end are left out.
    Shuffle after it with seeds of each worker's own, or before it with the same seed on all. On one worker it is the data set
    itself.

    ```python
    dataset = keras_ngd.distributed.shard(tfds.load("cifar10", split="train", as_supervised=True))
    model.fit(dataset.shuffle(10_000).batch(128))
    ```

    Args:
        dataset: a `tf.data.Dataset` of single examples, not batches, of known length.
        communicator: as for `keras_ngd.KFAC`. Default `"auto"`.

    Raises:
        ValueError: if the length is not known, or is less than the number of workers.
    """
    communicator = resolve(communicator)
    if communicator.size == 1:
        return dataset
    length = int(dataset.cardinality())
    if length < 0:
        raise ValueError(
            "`dataset` must have a known length, so that all workers make equally many steps: use "
            "`dataset.apply(tf.data.experimental.assert_cardinality(n))`. Received one of "
            f"{'infinite' if length == -1 else 'unknown'} length."
        )
    if length < communicator.size:
        raise ValueError(
            f"`dataset` must have an example for each of {communicator.size} workers. Received one of {length} examples."
        )
    return dataset.shard(communicator.size, communicator.rank).take(length // communicator.size)
