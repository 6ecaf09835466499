"""How far the clips shorten a training's steps."""

import keras

from keras_ngd.typing import Logs


class StepMonitor(keras.callbacks.Callback):
    """Puts into each epoch's logs which share of its steps was shortened, `clipped_share`, and by how much, `step_scale`.

    `step_scale` is the mean over the epoch's steps of what they were multiplied with, 1 where none was shortened. Put it before
    callbacks that look at the logs (`CSVLogger`, `TensorBoard`).

    Raises:
        ValueError: if the model's optimizer is not one of `keras_ngd`.
    """

    def on_train_begin(self, logs: Logs = None) -> None:
        if not hasattr(self.model.optimizer, "clipped_steps"):
            raise ValueError(
                "`StepMonitor` is for optimizers of keras_ngd. Received a model compiled with optimizer="
                f"{self.model.optimizer!r}"
            )

    def _counts(self) -> tuple[int, int, float]:
        optimizer = self.model.optimizer
        steps = int(keras.ops.convert_to_numpy(optimizer.iterations))
        return steps, optimizer.clipped_steps, optimizer.mean_step_scale * steps

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._before = self._counts()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        steps, clipped, scales = (now - then for now, then in zip(self._counts(), self._before, strict=True))
        if logs is not None and steps:
            logs["clipped_share"], logs["step_scale"] = clipped / steps, scales / steps
