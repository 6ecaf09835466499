"""What the methods share that keep rows of examples in place of factors."""

import keras
from keras import ops, tree

from keras_ngd import schedules
from keras_ngd.optimizers.natural_gradient import NaturalGradient, stacked


def first_batch(data):
    """The first batch of inputs of what `capture` was given as `data`."""
    if isinstance(data, keras.utils.PyDataset):
        data = data[0]
    elif hasattr(data, "element_spec"):
        data = next(iter(data.take(1)), None)
    return (data[0] if len(data) else None) if isinstance(data, (tuple, list)) else data


def steps_in(data):
    """Batches in a data set, or None where it does not say."""
    try:
        return len(data) if isinstance(data, keras.utils.PyDataset) or hasattr(data, "element_spec") else None
    except TypeError:
        return None


class RowMethod(NaturalGradient):
    """Base of the methods whose statistics are rows: one interval for rows and inverses, and room for a batch of rows.

    An inverse belongs to the rows it was made of, so it is renewed whenever rows are recorded.

    Args:
        interval: int or schedule: steps between updates.
        batch_size: int, the largest batch that will be seen; None takes it from `capture`'s `data`, or from the batch
            dimension of the model's inputs.
        losses_per_example: number of loss values an example contributes to the mean.
        **kwargs: `NaturalGradient`'s.
    """

    def __init__(self, learning_rate, damping, interval, batch_size, losses_per_example, **kwargs):
        interval = schedules.check_interval("interval", schedules.deserialize(interval))
        self._check_unknown(kwargs)
        if batch_size is not None:
            batch_size = schedules.check_count("batch_size", batch_size)
        losses_per_example = schedules.check_positive_number("losses_per_example", losses_per_example)
        super().__init__(
            learning_rate=learning_rate,
            damping=damping,
            factor_interval=interval,
            inverse_interval=interval,
            **{"factor_decay": 0.0, **kwargs},
        )
        self.batch_size, self.losses_per_example = batch_size, losses_per_example

    @property
    def interval(self):
        """Steps between updates."""
        return self.factor_interval

    def _check_unknown(self, kwargs):
        for name in ("factor_interval", "inverse_interval"):
            if name in kwargs:
                raise ValueError(
                    f"{type(self).__name__} has one `interval`, not `{name}`: an inverse belongs to the rows it was made of."
                )

    def measure(self, model, data):
        if self.batch_size is None and data is not None:
            leaves = [leaf for leaf in tree.flatten(first_batch(data)) if getattr(leaf, "shape", ())]
            self.batch_size = int(leaves[0].shape[0]) if leaves else None
        if self.batch_size is None:
            sizes = {tensor.shape[0] for tensor in tree.flatten(getattr(model, "inputs", None) or [])}
            self.batch_size = sizes.pop() if len(sizes) == 1 else None
        if not self.batch_size:
            self.batch_size = None
            name = type(self).__name__
            raise ValueError(
                f"{name} keeps a row for each example, and needs to know how many there are in a batch, which model "
                f"{model.name!r} does not say. Give it: `{name}(..., batch_size=128)`, "
                "`keras_ngd.capture(model, optimizer, data=train_dataset)`, or `keras.Input(shape, batch_size=128)`."
            )

    def refresh_due(self, step, opened):
        return opened

    def state_of(self, group, inputs):
        return [*super().state_of(group, inputs), *stacked(group, inputs(group.blocks))]

    def refresh_together(self, curvatures, inputs, damping):
        """New states of all groups' curvatures from what they take."""
        raise NotImplementedError

    def refresh(self, inputs, damping, old):
        groups = self.layout.groups
        new = self.refresh_together([g.curvature for g in groups], [stacked(g, inputs) for g in groups], damping)
        return [value for state in new for value in state]

    def curvature_input(self, statistics, averages, calls):
        # The mean over a layer's calls of `a`, and the sum of `g`: calls count like positions.
        scale = self.loss_scale_factor or 1.0
        a, g = averages
        return [a, g * ops.cast(calls, g.dtype) / scale]

    def get_config(self):
        config = super().get_config()
        for name in ("factor_decay", "factor_interval", "inverse_interval"):
            del config[name]
        return {
            **config,
            "interval": schedules.serialize(self.factor_interval),
            "batch_size": self.batch_size,
            "losses_per_example": self.losses_per_example,
        }
