"""EKFAC: the Fisher matrix's diagonal in the eigenbasis of KFAC's factors."""

from typing import Any

import keras

from keras_ngd.curvature import Curvature, EKFACCurvature
from keras_ngd.optimizers.approximations import KroneckerSettings
from keras_ngd.optimizers.arguments import documented
from keras_ngd.optimizers.blocks import Group
from keras_ngd.optimizers.eigenbasis_method import DEFAULT_SPLIT, NOT_OF_EIGENBASES, EigenbasisMethod
from keras_ngd.optimizers.loss_ratio import check_losses_per_example
from keras_ngd.optimizers.settings import settled_damping
from keras_ngd.typing import Config, DampingLike, IntervalLike, LossesPerExample, RateLike

DAMPING_MODES = ("relative", "exact")


@keras.saving.register_keras_serializable("keras_ngd")
@documented(*NOT_OF_EIGENBASES)
class EKFAC(EigenbasisMethod):
    """KFAC with second moments of the gradients, in the eigenbasis of its factors, in place of their eigenvalues.

    For every captured layer with kernel-and-bias gradient `V` (the bias its last row), input factor `A` and output
    factor `G` (running averages, see `keras_ngd.statistics.KroneckerStatistics`), whose eigenvectors are `QA` and `QG`:

        V~ = QA^T V QG
        S  <- factor_decay S + (1 - factor_decay) N V~ o V~                                   at every step
        P  = loss QA [ V~ / (S + d) ] QG^T
        P <- nu P,      nu = min(1, loss_clip loss / sum over layers of <P, V>)
        m <- momentum m - learning_rate P;      W <- W + m

    with the running average of the loss in the third line (see `fisher_scale`), and `N` the number of loss values in a batch,
    weighed as the loss weighs them: `N V V^T` is an estimate of the Fisher matrix from a batch's gradient. Where a refresh has
    changed a basis, `S` begins anew with the eigenvalues of `A (x) G`. All other variables take Adam's step with their plain
    gradient (see `rest`).

    ```python
    optimizer = keras_ngd.EKFAC()
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    model.fit(x, y)
    ```

    Args:
        learning_rate: float, `LearningRateSchedule` or callable. Default 0.02.
        damping: positive float or `LearningRateSchedule`: `d`; `damping_mode` says in which units. Default None: 1.0, relative.
        damping_mode: `"relative"`: `d` is `damping` times the mean of `S`; `"exact"`: `damping` itself, in units of the
            curvature. Default None: `"relative"` where `damping` is not given, else `"exact"`.
        inverse_interval: int or schedule: steps between refreshes of the bases; see `interval_growth`. Default 100.
        decomposition: how bases are renewed. `"qr"` (default): the first by an eigendecomposition, others by one step of
            orthogonal iteration, `Q <- qr(F Q)`, largest eigenvalues first; `"eigh"`: by an eigendecomposition every time.
        basis_tolerance: float in [0, 1): a basis stays as it is where it still diagonalizes its factor, `|offdiag(Q^T F Q)| <=
            basis_tolerance |F|`. Default 0.01.
        split: int or None: factors of more rows and columns are cut into diagonal blocks of this size, each with a basis of its
            own, as `keras_ngd.THOR` cuts them. Default 1024.
        {{shared_arguments}}

    Attributes:
        failed_bases: how often a basis could not be renewed and stayed as it was; said once, when `fit` ends.
        skipped_statistics, skipped_steps: how often something was not finite; see `NaturalGradient`.

    Raises:
        ValueError: for arguments out of range, and for those of other methods that have no meaning here.

    Reference:
        - [George et al., 2018](https://arxiv.org/abs/1806.03884): section 4.2 for the running `S`
    """

    def __init__(
        self,
        learning_rate: RateLike = 0.02,
        damping: DampingLike | None = None,
        momentum: float = 0.9,
        factor_decay: float = 0.95,
        factor_interval: IntervalLike = 10,
        inverse_interval: IntervalLike = 100,
        damping_mode: str | None = None,
        decomposition: str = "qr",
        basis_tolerance: float = 0.01,
        split: int | None = DEFAULT_SPLIT,
        weight_sharing: str = "expand",
        losses_per_example: LossesPerExample = "auto",
        statistics_fraction: float = 1.0,
        name: str = "ekfac",
        **kwargs: Any,
    ) -> None:
        damping, damping_mode = settled_damping(damping, damping_mode, "exact")
        if damping_mode not in DAMPING_MODES:
            raise ValueError(f"`damping_mode` must be one of {DAMPING_MODES}. Received: damping_mode={damping_mode!r}")
        losses_per_example = check_losses_per_example(losses_per_example)
        super().__init__(
            decomposition,
            basis_tolerance,
            split,
            weight_sharing,
            statistics_fraction,
            learning_rate=learning_rate,
            damping=damping,
            momentum=momentum,
            factor_decay=factor_decay,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            name=name,
            **kwargs,
        )
        self.damping_mode, self.losses_per_example = damping_mode, losses_per_example

    def make_curvature(self, group: Group) -> Curvature:
        return EKFACCurvature(**self.basis_arguments(group), decay=self.factor_decay, damping_mode=self.damping_mode)

    def kronecker_settings(self) -> KroneckerSettings:
        mode = "pi" if self.damping_mode == "exact" else self.damping_mode
        return KroneckerSettings(damping_mode=mode, statistics_fraction=self.statistics_fraction)

    def get_config(self) -> Config:
        return super().get_config() | {"damping_mode": self.damping_mode, "losses_per_example": self.losses_per_example}
