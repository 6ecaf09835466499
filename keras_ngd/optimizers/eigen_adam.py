"""EigenAdam: Adam in the eigenbasis of the curvature."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd import schedules
from keras_ngd.curvature import Curvature, EigenAdamCurvature
from keras_ngd.layers.geometry import Structure
from keras_ngd.optimizers import state_layout
from keras_ngd.optimizers.approximations import AveragedApproximation, UnitWiseApproximation
from keras_ngd.optimizers.arguments import documented
from keras_ngd.optimizers.blocks import Group, Layout, Signals
from keras_ngd.optimizers.bound import bounded
from keras_ngd.optimizers.eigenbasis_method import DEFAULT_SPLIT, NOT_OF_EIGENBASES, EigenbasisMethod
from keras_ngd.optimizers.gradient_blocks import GradientBlocks
from keras_ngd.optimizers.shares import Shares
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import Config, DampingLike, IntervalLike, Parts, RateLike, Tensor, Variable

BASES = ("fisher", "gradient")

# What the length of Adam's steps and the bases, which have no scale, leave nothing to do for.
NOT_OF_ADAM = ("damping", "momentum", "nesterov", "kl_clip", "loss_clip", "length_clip", "fisher_scale", "rest")


class AdamApproximation(UnitWiseApproximation):
    """Of scales and offsets: Adam's rule, entry by entry."""

    def make_curvature(self, group: Group) -> Curvature:
        rows, columns, dtype = group.blocks[0].shape
        return EigenAdamCurvature(group.count, ((rows, 1),), ((columns, 1),), dtype, **self.method.adam_arguments)


@keras.saving.register_keras_serializable("keras_ngd")
@documented(*NOT_OF_EIGENBASES, *NOT_OF_ADAM)
class EigenAdam(EigenbasisMethod):
    """Adam in the eigenbasis of the Fisher matrix's Kronecker factors.

    For every captured layer with kernel-and-bias gradient `V` (the bias its last row), input factor `A` and output
    factor `G` (running averages, see `keras_ngd.statistics.KroneckerStatistics`), whose eigenvectors are `QA` and `QG`:

        V~ = QA^T V QG
        M~ <- beta_1 M~ + (1 - beta_1) V~
        S <- beta_2 S + (1 - beta_2) V~ o V~
        P  = QA [ M~ / (1 - beta_1^t) / (sqrt(S / (1 - beta_2^t)) + epsilon) ] QG^T
        W <- W - learning_rate P - learning_rate weight_decay W

    with `t` the number of steps that called the layer. Where a basis is renewed, `M~` is turned with it: it stays `QA^T M QG` of
    the same mean `M`. Steps have the length of Adam's, whatever the scale of the loss and of
    the factors, so there is no damping and no clip. Of embeddings the input factor is diagonal, and its basis the identity;
    scales and offsets of captured normalisation layers take Adam's step, and so do, at the same rate and with Adam's usual
    decays of 0.9 and 0.999, all variables that are not captured.

    ```python
    optimizer = keras_ngd.EigenAdam()
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    model.fit(x, y)
    ```

    With `basis="gradient"` the factors are `L` and `R`, averages of `V V^T` and of `V^T V` over the steps. This is SOAP (Vyas et
    al. 2024). It needs no captured layers, and no `capture`: `model.compile(optimizer=keras_ngd.EigenAdam(basis="gradient"))`
    trains every matrix of any model so, and what has no two axes by Adam. Kernels of more axes are cut into rows and columns
    where both are as equal as can be, and a side wider than `split` has no basis. On several workers gradients are averaged with
    equal weights.

    Args:
        learning_rate: float, `LearningRateSchedule` or callable. Default 0.01.
        beta_1: float in [0, 1): decay of the mean of the gradients. Default 0.9.
        beta_2: float in [0, 1): decay of the mean of their squares. Default 0.95.
        epsilon: positive float: see above. Default 1e-8.
        factor_interval: int or schedule: steps between updates of `A` and `G`; see `interval_growth`. Those of `L` and `R` are at
            every step. Default 10.
        inverse_interval: int or schedule: steps between refreshes of the bases; see `interval_growth`. Default 100.
        basis: `"fisher"` (default): the eigenvectors of `A` and `G`; `"gradient"`: those of `L` and `R`, see above.
        rest_learning_rate: float or `LearningRateSchedule`: the learning rate of variables that are not captured. Default None:
            `learning_rate`.
        name: str: what the optimizer's variables are named after. Default `"eigen_adam"`.
        {{shared_arguments}}

    Attributes:
        failed_bases: how often a basis could not be renewed and stayed as it was; said once, when `fit` ends.
        skipped_statistics, skipped_steps: how often something was not finite; see `NaturalGradient`.

    Raises:
        ValueError: for arguments out of range, and for those of other methods that have no meaning here.

    Reference:
        - [Vyas et al., 2024](https://arxiv.org/abs/2409.11321), algorithm 3, with the bases of `E[V V^T]` and `E[V^T V]`
        - [Martens & Grosse, 2015](https://arxiv.org/abs/1503.05671) for `A` and `G`
        - [George et al., 2018](https://arxiv.org/abs/1806.03884) for second moments in their eigenbasis
    """

    rest_share = 1.0

    def __init__(
        self,
        learning_rate: RateLike = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.95,
        epsilon: float = 1e-8,
        factor_decay: float = 0.95,
        factor_interval: IntervalLike = 10,
        inverse_interval: IntervalLike = 100,
        decomposition: str = "qr",
        basis: str = "fisher",
        basis_tolerance: float = 0.01,
        split: int | None = DEFAULT_SPLIT,
        weight_sharing: str = "expand",
        statistics_fraction: float | None = None,
        rest_learning_rate: DampingLike | None = None,
        name: str = "eigen_adam",
        **kwargs: Any,
    ) -> None:
        for argument in NOT_OF_ADAM:
            if argument in kwargs:
                raise ValueError(
                    f"EigenAdam does not take `{argument}`: its steps have the length of Adam's, and its bases no scale. "
                    f"Received: {argument}={kwargs[argument]!r}"
                )
        for argument, value in (("beta_1", beta_1), ("beta_2", beta_2)):
            if not schedules.is_number(value) or not 0 <= value < 1:
                raise ValueError(f"`{argument}` must be in [0, 1). Received: {argument}={value!r}")
        epsilon = schedules.check_positive_number("epsilon", epsilon)
        if basis not in BASES:
            raise ValueError(f"`basis` must be one of {BASES}. Received: basis={basis!r}")
        super().__init__(
            decomposition,
            basis_tolerance,
            split,
            weight_sharing,
            statistics_fraction=statistics_fraction,
            learning_rate=learning_rate,
            damping=1.0,
            momentum=0.0,
            factor_decay=factor_decay,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            loss_clip=None,
            fisher_scale=None,
            rest_learning_rate=rest_learning_rate,
            name=name,
            **kwargs,
        )
        self.beta_1, self.beta_2, self.epsilon, self.basis = float(beta_1), float(beta_2), float(epsilon), basis
        self.gradient_blocks: GradientBlocks | None = None

    @property
    def adam_arguments(self) -> dict[str, float]:
        """The arguments of an `EigenAdamCurvature` that are Adam's."""
        return {"beta_1": self.beta_1, "beta_2": self.beta_2, "epsilon": self.epsilon}

    def adam_curvature(self, count: int, input_parts: Parts, output_parts: Parts, dtype: str) -> EigenAdamCurvature:
        """A new curvature for `count` blocks with bases of these parts."""
        return EigenAdamCurvature(
            count, input_parts, output_parts, dtype, self.decomposition, self.basis_tolerance, **self.adam_arguments
        )

    @property
    def approximations(self) -> dict[Structure, type[AveragedApproximation]]:
        return {Structure.SCALE: AdamApproximation}

    def make_curvature(self, group: Group) -> Curvature:
        return EigenAdamCurvature(**self.basis_arguments(group), **self.adam_arguments)

    def curvature_input(self, statistics: Statistics, averages: Sequence[Tensor], calls: Tensor) -> list[Tensor]:
        # Bases have no scale.
        return list(averages)

    def convert_from(self, version: int) -> None:
        for curvature in self.basis_curvatures():
            if isinstance(curvature, EigenAdamCurvature):
                # In format 0 the mean of the gradients was not in the bases.
                state = state_layout.gathered_state(curvature.variables)
                curvature.first_moment.assign(
                    *state_layout.stored_state([curvature.first_moment], [curvature.turned_into_bases(state)])
                )

    def get_config(self) -> Config:
        config = {name: value for name, value in super().get_config().items() if name not in NOT_OF_ADAM}
        return config | {"basis": self.basis, **self.adam_arguments}

    # Bases of gradients

    def measure(self, model: Any, data: Any, analysis: Any) -> None:
        if self.basis == "gradient":
            raise ValueError(
                "EigenAdam(basis='gradient') needs no captured layers: compile the model with it as it is, or leave `basis` out."
            )

    def scale_loss(self, loss: Tensor) -> Tensor:
        if self.basis == "gradient":
            # No layer is to read the loss's value, least of all one of another model.
            return keras.optimizers.Optimizer.scale_loss(self, loss)
        return super().scale_loss(loss)

    def _checked_layout(self, variables: Sequence[Variable]) -> Layout:
        if self.basis != "gradient":
            return super()._checked_layout(variables)
        if self.fisher != "empirical":
            raise ValueError(
                "`basis='gradient'` takes its bases from the gradients that steps are made of, and from no Fisher matrix: leave "
                f"`fisher` out. Received: fisher={self.fisher!r}"
            )
        return Layout()

    def build_own_state(self, layout: Layout) -> None:
        if self.basis == "gradient":
            self.gradient_blocks = GradientBlocks(self, self.built_on)
            self.shares = Shares(self.gradient_blocks.shares)

    @property
    def further_variables(self) -> list[Variable]:
        return [] if self.gradient_blocks is None else self.gradient_blocks.variables

    def basis_curvatures(self) -> list[Any]:
        further = [] if self.gradient_blocks is None else [group.curvature for group in self.gradient_blocks.groups]
        return super().basis_curvatures() + further

    def _natural_gradients(self, signals: Signals) -> list[Tensor]:
        if self.gradient_blocks is None:
            return super()._natural_gradients(signals)
        signals = self.exchange.plain_mean_gradients(signals)
        found, finite = self.gradient_blocks.directions(signals)
        others = self._others(signals, found)
        finite = self._all_finite([signals.grads[i] for i in others], ops.zeros(()), finite)
        self.gradient_blocks.assign(finite)
        nu = self.bound.scale(ops.zeros(()), ops.ones(()), finite)
        new = bounded(signals, found, {}, others, nu, finite)
        return [new.get(i, gradient) for i, gradient in enumerate(signals.grads)]
