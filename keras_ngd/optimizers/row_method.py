"""What the methods share that keep rows of examples in place of factors."""

import functools
import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import keras
from keras import ops, tree

from keras_ngd import backend, schedules, sharding
from keras_ngd.optimizers import combining
from keras_ngd.optimizers.approximations import KroneckerSettings
from keras_ngd.optimizers.arguments import NOT_OF_ROWS, documented
from keras_ngd.optimizers.blocks import Block, Layout
from keras_ngd.optimizers.capacity import Capacity
from keras_ngd.optimizers.loss_ratio import check_losses_per_example
from keras_ngd.optimizers.natural_gradient import NaturalGradient
from keras_ngd.statistics import RowStatistics
from keras_ngd.statistics.draws import LAYERS, Draws
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import Config, DampingLike, IntervalLike, LossesPerExample, RateLike, Shape, Tensor, Variable

# More examples in one array are not taken for a batch.
LARGEST_ARRAY = 1024

# Of the running averages of blocks that are not described by rows.
AVERAGES_DECAY = 0.95


def of_rows(block: Block) -> bool:
    """Whether a block is described by rows, as those of matrices are, rather than by averages."""
    return isinstance(block.statistics, RowStatistics)


def is_dataset(data: Any) -> bool:
    """Whether `data` has batches, rather than being one."""
    return isinstance(data, keras.utils.PyDataset) or hasattr(data, "element_spec")


def first_batch(data: Any) -> Any:
    """The first batch of inputs of what `capture` was given as `data`."""
    if isinstance(data, keras.utils.PyDataset):
        data = data[0]
    elif hasattr(data, "element_spec"):
        data = next(iter(data.take(1)), None)
    return (data[0] if len(data) else None) if isinstance(data, (tuple, list)) else data


def steps_in(data: Any) -> int | None:
    """Batches in a data set, or None where it does not say."""
    try:
        return len(data) if is_dataset(data) else None
    except TypeError:
        return None


class Combined:
    """Of each block, variables with what its curvature takes of all workers. (Keras does not look into objects of ours.)"""

    def __init__(self) -> None:
        self.of_block: dict[Block, list[Variable]] = {}


@documented(*NOT_OF_ROWS)
class RowMethod(Capacity, NaturalGradient):
    """Base of the methods whose statistics are rows: one interval for rows and inverses, and room for a batch of rows.

    An inverse belongs to the rows it was made of, so it is renewed whenever rows are recorded.

    Args:
        {{shared_arguments}}
    """

    def __init__(
        self,
        learning_rate: RateLike,
        damping: DampingLike,
        interval: IntervalLike,
        batch_size: int | None,
        losses_per_example: LossesPerExample,
        **kwargs: Any,
    ) -> None:
        interval = schedules.check_interval("interval", schedules.deserialize(interval))
        self._check_unknown(kwargs)
        if batch_size is not None:
            batch_size = schedules.check_count("batch_size", batch_size)
        losses_per_example = check_losses_per_example(losses_per_example)
        super().__init__(
            learning_rate=learning_rate,
            damping=damping,
            factor_interval=interval,
            inverse_interval=interval,
            **{"factor_decay": 0.0, **kwargs},
        )
        self.batch_size, self.losses_per_example = batch_size, losses_per_example

    refreshes_what_was_recorded = True
    # The curvature of one batch, from rows as few as its examples, says less of the next: steps are bounded by what they promise.
    default_clip = MappingProxyType({"loss_clip": 1.0})

    # In which units the damping is, and what it is where none is asked for.
    damping_mode: str
    default_damping: float = 1.0

    # What `capture` found in data or in the model.
    found_batch_size = None

    @property
    def interval(self) -> IntervalLike:
        """Steps between updates."""
        return self.factor_interval

    def _check_unknown(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("gradient_worker_fraction", 1) != 1:
            raise ValueError(
                f"{type(self).__name__} holds its small inverses on all workers. Received: "
                f"gradient_worker_fraction={kwargs['gradient_worker_fraction']!r}"
            )
        fraction = kwargs.get("statistics_fraction")
        if fraction is not None and kwargs.get("fisher", "empirical") == "empirical":
            raise ValueError(
                f"{type(self).__name__} keeps a row of every example of a batch: `statistics_fraction` is for fisher='sampled'. "
                f"Received: statistics_fraction={fraction!r}"
            )
        if kwargs.get("stagger", False) is not False:
            raise ValueError(
                f"{type(self).__name__} refreshes each layer with the batch whose rows it has recorded, so all layers at once: "
                f"leave `stagger` out. Received: stagger={kwargs['stagger']!r}"
            )
        for name in ("factor_interval", "inverse_interval"):
            if name in kwargs:
                raise ValueError(
                    f"{type(self).__name__} has one `interval`, not `{name}`: an inverse belongs to the rows it was made of."
                )

    def decay_of(self, block: Block) -> float:
        return self.factor_decay if of_rows(block) else AVERAGES_DECAY

    def kronecker_settings(self) -> KroneckerSettings:
        # A damping that is relative has the default's proportion to KFAC's.
        if self.damping_mode == "relative":
            return KroneckerSettings(damping_factor=1 / self.default_damping)
        return KroneckerSettings(damping_mode="pi" if self.damping_mode == "absolute" else self.damping_mode)

    def measure(self, model: Any, data: Any, analysis: Any) -> None:
        found = None if data is None else self._batch_of(data)
        if found is None:
            sizes = {tensor.shape[0] for tensor in tree.flatten(getattr(model, "inputs", None) or [])}
            found = sizes.pop() if len(sizes) == 1 else None
        self.found_batch_size = found
        self.start_capacity(found)

    @staticmethod
    def _batch_of(data: Any) -> int | None:
        """How many examples the first batch of `data` has, or None where that is no batch."""
        leaves = [leaf for leaf in tree.flatten(first_batch(data)) if getattr(leaf, "shape", ())]
        size = int(leaves[0].shape[0]) if leaves else 0
        return size if size and (is_dataset(data) or size <= LARGEST_ARRAY) else None

    # Several workers

    def combinations(self, shapes: Sequence[Shape]) -> list[int]:
        """How each tensor that a curvature takes is made of those of all workers: kinds of `combining`, for their shapes."""
        return [combining.ROWS, combining.WEIGHTED_ROWS]

    def combined_shapes(self, block: Block) -> list[Shape]:
        """The shapes of what a block's curvature takes, of all workers together."""
        shapes, workers = [sharding.shape_of(v) for v in self.combined_weights(block)], self.exchange.communicator.size
        if workers == 1:
            return shapes
        return [
            combining.combined_shape(s, kind, workers)
            for s, kind in zip(shapes, self.combinations(shapes), strict=True)
        ]

    def combined_weights(self, block: Block) -> list[Variable]:
        """The weights of a block's statistics that have the shapes of what its curvature takes."""
        return block.statistics.averages

    def weights_travel(self, block: Block) -> Tensor:
        """Whether weights of rows are to be sent: True, or a scalar tensor. Those that are not are identities."""
        return True

    def further_bytes(self, block: Block) -> int:
        if self.exchange.communicator.size == 1 or not of_rows(block):
            return 0
        return backend.itemsize(block.shape[2]) * sum(math.prod(shape) for shape in self.combined_shapes(block))

    def build_own_state(self, layout: Layout) -> None:
        if self.exchange.workers is None:
            return
        self._combined = Combined()
        for i, block in enumerate(filter(of_rows, layout.blocks)):
            # Not a part of what is saved: other numbers of workers would have no use for it. Keras tracks attributes of its own.
            self._combined.of_block[block] = [
                keras.Variable("zeros", shape, block.shape[2], trainable=False, name=f"rows_of_all_{i}_{j}")
                for j, shape in enumerate(self.combined_shapes(block))
            ]

    def can_renew(self, variable: Variable) -> bool:
        return any(variable is v for group in self.layout.groups for v in group.curvature.variables)

    def restored(self, renew: bool) -> None:
        # The rows of all workers are not saved, and inverses of another number of workers' rows are of no use: the next batch
        # makes new ones of both.
        super().restored(renew)
        if renew or self.exchange.workers is not None:
            for block, gate in zip(self.layout.blocks, ops.unstack(self.gates(self.arrivals.rates())), strict=True):
                block.statistics.gate.assign(gate)
                for variable, value in self.control_values(block, self.iterations - 1):
                    variable.assign(value)

    def share_statistics(
        self, averages: dict[Block, list[Tensor]], calls: dict[Block, Tensor], share: Tensor | None, left_out: Tensor
    ) -> tuple[dict[Block, list[Tensor]], dict[Block, list[Tensor]]]:
        if self.exchange.workers is None:
            return super().share_statistics(averages, calls, share, left_out)
        combined, shared = {}, {block: averages[block] for block in self.layout.blocks if not of_rows(block)}
        shared = self.exchange.mean_statistics(shared, share, left_out)
        for i, block in enumerate(self.layout.blocks):
            if not of_rows(block):
                continue
            old = [ops.convert_to_tensor(v) for v in self._combined.of_block[block]]
            combined[block] = ops.cond(
                block.statistics.gate > 0,
                functools.partial(self._combination, i, block, averages[block], calls[block], share, left_out[i], old),
                functools.partial(list, old),
            )
            for variable, value in zip(self._combined.of_block[block], combined[block], strict=True):
                self.assign(variable, value)
        return averages | shared, combined

    def _combination(
        self,
        number: int,
        block: Block,
        averages: Sequence[Tensor],
        calls: Tensor,
        share: Tensor | None,
        left_out: Tensor,
        old: Sequence[Tensor],
    ) -> list[Tensor]:
        tensors = self.curvature_input(block.statistics, averages, calls)
        kinds = self.combinations([t.shape for t in tensors])
        new = [
            combining.combine(
                self.exchange.communicator, t, kind, share, self.weights_travel(block), f"keras_ngd_rows_{number}_{j}"
            )
            for j, (t, kind) in enumerate(zip(tensors, kinds, strict=True))
        ]
        return [ops.where(left_out, o, t) for o, t in zip(old, new, strict=True)]

    def worker_seed(self) -> int:
        """A seed for what each worker draws for itself."""
        rank: Any = self.exchange.communicator.rank
        return (self.seed + 1009 * rank) % LAYERS

    def start_statistics(self, statistics: Statistics, number: int) -> None:
        super().start_statistics(statistics, number)
        if isinstance(statistics, Draws):
            statistics.start_draws(self.worker_seed(), number)

    def separate_draws(self) -> None:
        super().separate_draws()
        if self.exchange.communicator.single_program:
            return  # Of replicas the draws are the same, and each draws for itself: see `Draws`.
        for number, block in enumerate(self.layout.blocks):
            if isinstance(block.statistics, Draws):
                block.statistics.start_draws(self.worker_seed(), number, block.statistics.draw[1])

    def curvature_input(self, statistics: Statistics, averages: Sequence[Tensor], calls: Tensor) -> list[Tensor]:
        # The mean over a layer's calls of `a`, and the sum of `g`: calls count like positions.
        a, g = averages
        return [a, self.scaled_rows(statistics, g * ops.cast(calls, g.dtype))]

    def scaled_rows(self, statistics: Statistics, g: Tensor) -> Tensor:
        """Gradient rows without the loss scale, in the loss's own units."""
        return g * (ops.sqrt(ops.cast(self.ratio_of(statistics), g.dtype)) / self.loss_scale)

    def get_config(self) -> Config:
        config = super().get_config()
        for name in ("factor_decay", "factor_interval", "inverse_interval"):
            del config[name]
        return {
            **config,
            "interval": schedules.serialize(self.factor_interval),
            "batch_size": self.batch_size,
            "losses_per_example": self.losses_per_example,
        }
