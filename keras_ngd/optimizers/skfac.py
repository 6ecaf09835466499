"""SKFAC: KFAC with low-rank inverses."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_ngd import schedules
from keras_ngd.curvature import WoodburyCurvature
from keras_ngd.curvature.curvature import Curvature
from keras_ngd.curvature.kronecker import DAMPING_MODES
from keras_ngd.optimizers import combining
from keras_ngd.optimizers.arguments import NOT_OF_ROWS, documented
from keras_ngd.optimizers.blocks import Block, Group
from keras_ngd.optimizers.row_method import RowMethod
from keras_ngd.optimizers.settings import settled_damping
from keras_ngd.statistics import WoodburyStatistics
from keras_ngd.statistics.factor_rows import are_rows
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import Config, DampingLike, IntervalLike, LossesPerExample, RateLike, Shape, Tensor, Variable


@keras.saving.register_keras_serializable("keras_ngd")
@documented(*NOT_OF_ROWS)
class SKFAC(RowMethod):
    """KFAC whose factors are inverted through the examples that they are made of.

    A factor of a batch has no more rank than the batch has rows: `A = X^T X` with `X`, `[n, d]`. Where `n < d`, `A` is never
    formed, and the damped inverse is applied by Woodbury's identity:

        (X^T X + dA I)^-1 V = (V - X^T (X X^T + dA I)^-1 X V) / dA

    and likewise with `G` from the right. With one row per position this is KFAC on the factors of one batch, exactly;
    convolutions, which have too many positions, are reduced to one row per example ("Reduce Sum") or to a few positions
    ("Spatial Subsampling"). Clip and step are KFAC's.

    ```python
    optimizer = keras_ngd.SKFAC()
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    model.fit(x, y)
    ```

    Args:
        learning_rate: float, `LearningRateSchedule` or callable. Default 0.02.
        damping: positive float or `LearningRateSchedule`, as for `keras_ngd.KFAC`; factors of one batch alone may need
            more than KFAC's averages. Woodbury's identity loses digits where a factor's largest eigenvalue is more than a
            thousand times what is added to it. Default None: 1.0 with `"relative"`, 0.5 with `"global"`.
        convolution: `"reduce"` (default): the mean over an example's positions of the inputs, the sum of the gradients; or
            `"subsample"`: some of a convolution's positions, drawn at random for each example.
        positions: int, how many, for `"subsample"`. Default 4.
        history: int of at least 1: of how many recorded batches the factors are made. Default 1.
        factor_decay: float in (0, 1): the weight of a batch in the history against that of the next. Default 0.95.
        damping_mode: `"relative"`, `"global"`, `"pi"`, `"sqrt"` or `"factor"`, as for `keras_ngd.KFAC`. Default None:
            `"relative"` where `damping` is not given, else `"pi"`.
        seed: int in [0, 2**12), of the positions drawn. Default 0.
        {{shared_arguments}}

    Reference:
        - [Tang et al., 2021](https://openaccess.thecvf.com/content/CVPR2021/html/Tang_SKFAC_Training_Neural_Networks_With_Faster_Kronecker-Factored_Approximate_Curvature_CVPR_2021_paper.html)
    """

    def __init__(
        self,
        learning_rate: RateLike = 0.02,
        damping: DampingLike | None = None,
        momentum: float = 0.9,
        interval: IntervalLike = 10,
        batch_size: int | None = None,
        convolution: str = "reduce",
        positions: int = 4,
        history: int = 1,
        factor_decay: float = 0.95,
        damping_mode: str | None = None,
        losses_per_example: LossesPerExample = "auto",
        kl_clip: float | None = None,
        seed: int = 0,
        name: str = "skfac",
        **kwargs: Any,
    ) -> None:
        damping, damping_mode = settled_damping(damping, damping_mode, "pi", "relative")
        modes = tuple(mode for mode in DAMPING_MODES if mode != "exact")
        if damping_mode not in modes:
            raise ValueError(
                f"`damping_mode` must be one of {modes} for SKFAC. Received: damping_mode={damping_mode!r}"
            )
        if not schedules.is_number(factor_decay) or not 0 < factor_decay < 1:
            raise ValueError(f"`factor_decay` must be in (0, 1) for SKFAC. Received: factor_decay={factor_decay!r}")
        # Its arguments are checked there, now.
        WoodburyStatistics(1, 1, convolution, positions, history, factor_decay)
        super().__init__(
            learning_rate,
            damping,
            interval,
            batch_size,
            losses_per_example,
            momentum=momentum,
            kl_clip=kl_clip,
            factor_decay=factor_decay if history > 1 else 0.0,
            seed=seed,
            name=name,
            **kwargs,
        )
        self.convolution, self.positions, self.history = convolution, int(positions), int(history)
        self.history_decay, self.damping_mode = float(factor_decay), damping_mode

    def make_statistics(self, layer: keras.layers.Layer) -> Statistics:
        return WoodburyStatistics(
            self.capacity,
            self.losses_in_statistics,
            self.convolution,
            self.positions,
            self.history,
            self.history_decay,
            strict=self.strict,
        )

    def make_curvature(self, group: Group) -> Curvature:
        block = group.blocks[0]
        sides = [shape[1:] for shape in self.combined_shapes(block)]
        return WoodburyCurvature(group.count, sides, block.shape[2], self.damping_mode)

    def combined_weights(self, block: Block) -> list[Variable]:
        return block.statistics.averages[:2]

    def combinations(self, shapes: Sequence[Shape]) -> list[int]:
        return [self._join(rows, size) for _, rows, size in shapes]

    def _join(self, rows: int, size: int) -> int:
        if rows == size:
            return combining.FACTOR
        # As on one worker, a factor with no fewer rows than columns is kept itself.
        return combining.WEIGHTED_ROWS if rows * self.exchange.communicator.size < size else combining.ROWS_OF_FACTOR

    def curvature_input(self, statistics: Statistics, averages: Sequence[Tensor], calls: Tensor) -> list[Tensor]:
        a, g = statistics.scaled(averages)
        if are_rows(g):
            return [a, self.scaled_rows(statistics, g)]
        return [a, g * (self.ratio_of(statistics, g.dtype) / self.loss_scale**2)]

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "convolution": self.convolution,
            "positions": self.positions,
            "history": self.history,
            "factor_decay": self.history_decay,
            "damping_mode": self.damping_mode,
            "seed": self.seed,
        }
