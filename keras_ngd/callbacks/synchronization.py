"""What workers share outside their training steps."""

import json
from typing import Any

import keras
import numpy as np

from keras_ngd import distributed, schedules
from keras_ngd.distributed.communicator import Communicator
from keras_ngd.typing import Logs


class BroadcastInitialState(keras.callbacks.Callback):
    """Starts all workers with worker `root`'s model and optimizer, when `fit` begins.

    The first step of a `keras_ngd` optimizer does so, too, with worker 0's values. This callback is for what happens later: a
    second `fit` after worker 0 alone has loaded or changed something. It also stops a training of which one worker has fewer
    steps than the others, which would wait for it forever.

    Args:
        root: rank of the worker whose values are taken. Default 0.
        communicator: as for `keras_ngd.KFAC`. Default `"auto"`.

    Raises:
        ValueError: on all workers, if their numbers of steps differ, or if worker `root` has not all statistics
            (`GatherStatistics`).
    """

    def __init__(self, root: int = 0, communicator: Communicator | str = "auto") -> None:
        super().__init__()
        distributed.check(communicator)
        self.root, self.communicator = root, communicator

    def on_train_begin(self, logs: Logs = None) -> None:
        communicator = distributed.resolve(self.communicator)
        if not 0 <= self.root < communicator.size:
            raise ValueError(
                f"`root` must be the rank of one of {communicator.size} workers, from 0. Received: root={self.root!r}"
            )
        steps = communicator.gather_objects(self.params.get("steps"))
        if len(set(steps)) > 1:
            raise ValueError(
                f"Workers have different numbers of steps in an epoch, by rank: {steps}. Those with fewer would leave the others "
                "waiting. Give all equally many, as `keras_ngd.distributed.shard(dataset)` does."
            )
        variables, gathers = list(self.model.weights), False
        if self.model.optimizer is not None and all(communicator.gather_objects(self.model.optimizer.built)):
            variables += self.model.optimizer.variables
            gathers = hasattr(self.model.optimizer, "gathered")
            if gathers and not communicator.gather_objects(self.model.optimizer.gathered)[self.root]:
                raise ValueError(distributed.NOT_GATHERED)
        distributed.broadcast_variables(communicator, variables, self.root)
        if gathers:
            self.model.optimizer.gathered = True


class GatherStatistics(keras.callbacks.Callback):
    """Brings together what workers have of the statistics under `reduce_scatter=True`, so that one of them can save it all.

    Put it before callbacks that save (`ModelCheckpoint`, `BackupAndRestore`), on all workers, with the same `save_freq`. Under
    optimizers whose statistics all workers have, it does nothing.

    Args:
        save_freq: `"epoch"` (default), or an int: batches from one time to the next, as for `ModelCheckpoint`. It is done at the
            end of training in any case.

    Raises:
        ValueError: if `save_freq` is neither, or the model's optimizer is not of `keras_ngd`.
    """

    def __init__(self, save_freq: int | str = "epoch") -> None:
        super().__init__()
        if save_freq != "epoch" and not schedules.is_count(save_freq):
            raise ValueError(f"`save_freq` must be 'epoch' or an int of at least 1. Received: save_freq={save_freq!r}")
        self.save_freq: Any = save_freq
        self._seen, self._last = 0, 0

    def on_train_begin(self, logs: Logs = None) -> None:
        if not hasattr(self.model.optimizer, "gather_statistics"):
            raise ValueError(
                "`GatherStatistics` is for optimizers of keras_ngd. Received a model compiled with optimizer="
                f"{self.model.optimizer!r}"
            )

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._last = 0

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        # One call stands for several batches with `steps_per_execution`.
        self._seen, self._last = self._seen + batch + 1 - self._last, batch + 1
        if self.save_freq != "epoch" and self._seen >= self.save_freq:
            self._seen = 0
            self.model.optimizer.gather_statistics()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if self.save_freq == "epoch":
            self.model.optimizer.gather_statistics()

    def on_train_end(self, logs: Logs = None) -> None:
        self.model.optimizer.gather_statistics()


class MetricAverage(keras.callbacks.Callback):
    """Replaces an epoch's logs with their means over all workers.

    Put it before callbacks that look at the logs (`ModelCheckpoint`, `ReduceLROnPlateau`, `EarlyStopping`): workers that see
    different metrics would decide differently.

    Args:
        communicator: as for `keras_ngd.KFAC`. Default `"auto"`.

    Raises:
        ValueError: on all workers, if they have different logs.
    """

    def __init__(self, communicator: Communicator | str = "auto") -> None:
        super().__init__()
        distributed.check(communicator)
        self.communicator = communicator

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self._average(logs)

    def on_test_end(self, logs: Logs = None) -> None:
        self._average(logs)

    def _average(self, logs: Logs) -> None:
        communicator = distributed.resolve(self.communicator)
        if communicator.size == 1 or logs is None:
            return
        numbers = {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}
        found = [json.loads(text) for text in communicator.gather_objects(json.dumps(numbers))]
        for rank, other in enumerate(found):
            if other.keys() != found[0].keys():
                raise ValueError(
                    f"Workers have different logs: {sorted(found[0])} on worker 0 but {sorted(other)} on worker {rank}. Give "
                    "all the same metrics and validation data."
                )
        for name in found[0]:
            logs[name] = float(np.mean([other[name] for other in found]))
