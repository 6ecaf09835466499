"""KFAC: Kronecker-factored approximate curvature."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_ngd.curvature import KroneckerCurvature
from keras_ngd.curvature.curvature import Curvature
from keras_ngd.curvature.kronecker import DAMPING_MODES, INVERSES
from keras_ngd.optimizers.approximations import KroneckerSettings, in_units_of_the_loss
from keras_ngd.optimizers.arguments import documented
from keras_ngd.optimizers.blocks import Group
from keras_ngd.optimizers.loss_ratio import check_losses_per_example
from keras_ngd.optimizers.natural_gradient import NaturalGradient
from keras_ngd.optimizers.settings import settled_damping
from keras_ngd.statistics import KroneckerStatistics
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import Config, DampingLike, IntervalLike, LossesPerExample, RateLike, Tensor


@keras.saving.register_keras_serializable("keras_ngd")
@documented()
class KFAC(NaturalGradient):
    """Kronecker-factored approximate curvature, on top of Keras's SGD with momentum.

    For every captured layer with kernel-and-bias gradient `V` (the bias its last row), input factor `A` and output
    factor `G` (running averages, see `keras_ngd.statistics.KroneckerStatistics`):

        P  = loss (A + dA I)^-1 V (G + dG I)^-1
        P <- nu P,      nu = min(1, sqrt(length_clip loss / sum over layers of <P, V>))
        m <- momentum m - learning_rate P;      W <- W + m

    with the running average of the loss in the first line (see `fisher_scale`). All other variables take Adam's step with
    their plain gradient (see `rest`). `KFAC(rate, damping, **keras_ngd.PAPER_SETTINGS)` is the method as its papers have it.

    ```python
    optimizer = keras_ngd.KFAC()
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    model.fit(x, y)
    ```

    Args:
        learning_rate: float, `LearningRateSchedule` or callable. Default 0.02.
        damping: positive float or `LearningRateSchedule`: what is added to the curvature; `damping_mode` says in which units.
            Default None: 0.5 with `"global"`, 1.0 with `"relative"`.
        inverse: how the factors are inverted. `"cholesky"`; `"newton-schulz"` (matrix products only, warm-started from
            the last inverse; where that does not converge, Cholesky, or on TPUs the same from a multiple of the identity);
            `"eigen"` (eigendecompositions: the damping may change between refreshes; twice the preconditioning cost); `"auto"`
            (default): `"newton-schulz"` on accelerators, `"cholesky"` on CPUs.
        damping_mode: what the damping is added to, and its units. `"global"`: in units of the mean eigenvalue of all layers'
            Fisher blocks, divided among factors as by `"pi"`; `"relative"`: each factor gets `damping` times its own mean
            eigenvalue, whatever its scale. All others are in units of the curvature: `"pi"`: `dA = pi sqrt(damping)`, `dG =
            sqrt(damping) / pi`, with `pi^2` the ratio of the factors' mean eigenvalues; `"sqrt"`: both `sqrt(damping)`;
            `"factor"`: both `damping`; `"exact"` (with `inverse="eigen"` only): the damping is added to `A (x) G` itself.
            Default None: `"global"` where `damping` is not given, else `"pi"`.
        {{shared_arguments}}

    Factors are as wide as their layers, and the time of a refresh grows with the cube of that: `capture` warns of layers above
    `keras_ngd.report.WIDE_FACTOR`. None is left out for its size by itself: the widest layer, such as one over a vocabulary, is
    often the one that matters, and THOR, SKFAC, SNGD and HyLo cope with it.

    Attributes:
        skipped_statistics, skipped_steps: how often something was not finite; see `NaturalGradient`.
        clipped_steps, mean_step_scale: how often a clip shortened a step, and the mean of `nu`.

    Reference:
        - [Martens & Grosse, 2015](https://arxiv.org/abs/1503.05671)
        - [Grosse & Martens, 2016](https://arxiv.org/abs/1602.01407) for convolutions
        - [Ba et al., 2017](https://openreview.net/forum?id=SkkTMpjex) for the KL clip
    """

    whole_factors = True

    def __init__(
        self,
        learning_rate: RateLike = 0.02,
        damping: DampingLike | None = None,
        momentum: float = 0.9,
        factor_decay: float = 0.95,
        factor_interval: IntervalLike = 10,
        inverse_interval: IntervalLike = 100,
        inverse: str = "auto",
        damping_mode: str | None = None,
        weight_sharing: str = "expand",
        losses_per_example: LossesPerExample = "auto",
        statistics_fraction: float | None = None,
        kl_clip: float | None = None,
        name: str = "kfac",
        **kwargs: Any,
    ) -> None:
        if inverse not in INVERSES:
            raise ValueError(f"`inverse` must be one of {INVERSES}. Received: inverse={inverse!r}")
        damping, damping_mode = settled_damping(damping, damping_mode, "pi", "global")
        if damping_mode not in DAMPING_MODES:
            raise ValueError(f"`damping_mode` must be one of {DAMPING_MODES}. Received: damping_mode={damping_mode!r}")
        if damping_mode == "exact" and inverse != "eigen":
            raise ValueError(f"`damping_mode='exact'` needs `inverse='eigen'`. Received: inverse={inverse!r}")
        losses_per_example = check_losses_per_example(losses_per_example)
        statistics = KroneckerStatistics(weight_sharing)
        super().__init__(
            learning_rate=learning_rate,
            damping=damping,
            momentum=momentum,
            factor_decay=factor_decay,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            kl_clip=kl_clip,
            statistics_fraction=statistics_fraction,
            name=name,
            **kwargs,
        )
        self.inverse, self.damping_mode = inverse, damping_mode
        self.weight_sharing = statistics.weight_sharing
        self.losses_per_example = losses_per_example

    def make_statistics(self, layer: keras.layers.Layer) -> Statistics:
        return KroneckerStatistics(self.weight_sharing, self.losses_in_statistics, self.fraction_in_statistics)

    def make_curvature(self, group: Group) -> Curvature:
        return KroneckerCurvature(
            group.count, *group.blocks[0].shape, inverse_method=self.inverse, damping_mode=self.damping_mode
        )

    def curvature_input(self, statistics: Statistics, averages: Sequence[Tensor], calls: Tensor) -> list[Tensor]:
        return in_units_of_the_loss(self, statistics, averages, calls)

    def kronecker_settings(self) -> KroneckerSettings:
        # Blocks that are diagonal have their eigenvectors already.
        inverse = "auto" if self.inverse == "eigen" else self.inverse
        mode = "pi" if self.damping_mode == "exact" else self.damping_mode
        return KroneckerSettings(inverse, mode, statistics_fraction=self.fraction_in_statistics)

    def get_config(self) -> Config:
        config = super().get_config()
        config.update(
            inverse=self.inverse,
            damping_mode=self.damping_mode,
            weight_sharing=self.weight_sharing,
            losses_per_example=self.losses_per_example,
            statistics_fraction=self.statistics_fraction,
        )
        return config
