"""EKFAC: the Fisher matrix's diagonal in the eigenbasis of KFAC's factors."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd import sharding
from keras_ngd.curvature import Curvature, EKFACCurvature, ExampleEKFACCurvature
from keras_ngd.layers.geometry import Structure
from keras_ngd.optimizers import state_layout
from keras_ngd.optimizers.approximations import AveragedApproximation, KroneckerSettings, LookupApproximation
from keras_ngd.optimizers.arguments import documented
from keras_ngd.optimizers.blocks import Block, Group
from keras_ngd.optimizers.eigenbasis_method import DEFAULT_SPLIT, NOT_OF_EIGENBASES, EigenbasisMethod
from keras_ngd.optimizers.loss_ratio import check_losses_per_example
from keras_ngd.optimizers.settings import settled_damping
from keras_ngd.statistics import SecondMomentStatistics, Statistics
from keras_ngd.typing import Config, DampingLike, IntervalLike, LossesPerExample, RateLike, Tensor, Variable

DAMPING_MODES = ("global", "relative", "exact")
SCALES = ("running", "examples")


class OfSteps(AveragedApproximation):
    """Of lookups: the second moments of the steps' gradients, whatever those of matrices are of."""

    method: "EKFAC"

    def make_statistics(self, layer: Any) -> Statistics:
        # As of all other methods with bases, also where the rest of EKFAC's are of examples.
        return EigenbasisMethod.make_statistics(self.method, layer)

    def make_curvature(self, group: Group) -> Curvature:
        method = self.method
        return EKFACCurvature(
            **method.basis_arguments(group), decay=method.factor_decay, damping_mode=method.damping_mode
        )


@keras.saving.register_keras_serializable("keras_ngd")
@documented(*NOT_OF_EIGENBASES)
class EKFAC(EigenbasisMethod):
    """KFAC with second moments of the gradients, in the eigenbasis of its factors, in place of their eigenvalues.

    For every captured layer with kernel-and-bias gradient `V` (the bias its last row), input factor `A` and output
    factor `G` (running averages, see `keras_ngd.statistics.KroneckerStatistics`), whose eigenvectors are `QA` and `QG`:

        V~ = QA^T V QG
        S  <- factor_decay S + (1 - factor_decay) N V~ o V~                                   at every step
        P  = loss QA [ V~ / (S + d) ] QG^T
        P <- nu P,      nu = min(1, sqrt(length_clip loss / sum over layers of <P, V>))
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
        damping: positive float or `LearningRateSchedule`: `d`; `damping_mode` says in which units. Default None: 0.5 with
            `"global"`, 1.0 with `"relative"`.
        damping_mode: `"global"`: `d` is `damping` times the mean eigenvalue of all layers' Fisher blocks; `"relative"`: times the
            mean of the layer's `S`; `"exact"`: `damping` itself, in units of the curvature. Default None: `"global"` where
            `damping` is not given, else `"exact"`.
        scale: what `S` is of. `"running"` (default): the gradients of batches, as above, at no cost. `"examples"`: those of all
            examples of each batch that is recorded, `S = N sum over examples of (QA^T (sum over positions of a g^T) QG)^2`, which
            is the Fisher matrix's diagonal in that basis; `S` then begins and goes on with the statistics. An example's gradient
            is as large as the layer, so convolutions and sequences take a few examples at a time, and a while. Embeddings stay at
            `"running"`, and have `keras_ngd.KFAC`'s approximation with `fisher="sampled"`, which needs `"examples"`.
        inverse_interval: int or schedule: steps between refreshes of the bases; see `interval_growth`. Default 100.
        {{shared_arguments}}

    Attributes:
        failed_bases: how often a basis could not be renewed and stayed as it was; said once, when `fit` ends.
        skipped_statistics, skipped_steps: how often something was not finite; see `NaturalGradient`.

    Raises:
        ValueError: for arguments out of range, and for those of other methods that have no meaning here.

    Reference:
        - [George et al., 2018](https://arxiv.org/abs/1806.03884): algorithm 1 for `S` of examples, section 4.2 for that of steps
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
        scale: str = "running",
        decomposition: str = "qr",
        basis_tolerance: float = 0.01,
        split: int | None = DEFAULT_SPLIT,
        weight_sharing: str = "expand",
        losses_per_example: LossesPerExample = "auto",
        statistics_fraction: float | None = None,
        name: str = "ekfac",
        **kwargs: Any,
    ) -> None:
        damping, damping_mode = settled_damping(damping, damping_mode, "exact", "global")
        if damping_mode not in DAMPING_MODES:
            raise ValueError(f"`damping_mode` must be one of {DAMPING_MODES}. Received: damping_mode={damping_mode!r}")
        if scale not in SCALES:
            raise ValueError(f"`scale` must be one of {SCALES}. Received: scale={scale!r}")
        if scale == "running" and kwargs.get("fisher", "empirical") == "sampled":
            raise ValueError(
                "`scale='running'` is of the gradients that steps are made of, which are those of the data's labels. With "
                "fisher='sampled' take scale='examples'."
            )
        losses_per_example = check_losses_per_example(losses_per_example)
        super().__init__(
            decomposition,
            basis_tolerance,
            split,
            weight_sharing,
            statistics_fraction=statistics_fraction,
            learning_rate=learning_rate,
            damping=damping,
            momentum=momentum,
            factor_decay=factor_decay,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            name=name,
            **kwargs,
        )
        self.damping_mode, self.scale, self.losses_per_example = damping_mode, scale, losses_per_example

    @property
    def approximations(self) -> dict[Structure, type[AveragedApproximation]]:
        if self.scale == "running":
            return super().approximations
        # The gradients of steps are those of the data's labels.
        of_lookups = OfSteps if self.fisher == "empirical" else LookupApproximation
        return super().approximations | {Structure.LOOKUP: of_lookups}

    def make_statistics(self, layer: keras.layers.Layer) -> Statistics:
        if self.scale != "examples":
            return super().make_statistics(layer)
        return SecondMomentStatistics(
            self.split, self.weight_sharing, self.losses_in_statistics, self.fraction_in_statistics
        )

    def make_curvature(self, group: Group) -> Curvature:
        kind = ExampleEKFACCurvature if self.scale == "examples" else EKFACCurvature
        return kind(**self.basis_arguments(group), decay=self.factor_decay, damping_mode=self.damping_mode)

    # Second moments of examples

    def _bases(self, groups: Sequence[Group]) -> Iterator[tuple[Group, Block, list[Tensor]]]:
        """Blocks of these groups whose second moments are recorded, and their bases as they are now."""
        for group in groups:
            if not isinstance(group.curvature, ExampleEKFACCurvature):
                continue
            bases = state_layout.gathered_state(group.curvature.variables[: len(group.curvature.with_bases)])
            parts = [dict(group.parts(basis)) for basis in bases]
            for block in group.blocks:
                yield group, block, [of_part[block] for of_part in parts]

    def after_refresh(self, averages: dict[Block, list[Tensor]]) -> dict[Block, list[Tensor]]:
        new = dict(averages)
        for group, block, bases in self._bases(self.layout.groups):
            controls = block.statistics.controls
            changed = ops.zeros((), "bool")
            for basis, control in zip(bases, controls, strict=True):
                changed = changed | ops.any(ops.not_equal(basis, sharding.gathered(control)))
            *factors, second = averages[block]
            whole = state_layout.gathered_averages(block, averages)

            def begun(group: Group = group, whole: list[Tensor] = whole, bases: list[Tensor] = bases) -> Tensor:
                return ops.reshape(group.curvature.eigenvalues(whole[:-1], bases), whole[-1].shape)

            kept: Callable[[], Tensor] = functools.partial(ops.convert_to_tensor, whole[-1])
            second = sharding.stored(block.statistics.averages[-1], ops.cond(changed, begun, kept))
            new[block] = [*factors, second]
        return new

    def control_values(self, block: Block, step: Tensor) -> list[tuple[Variable, Tensor]]:
        for _, other, bases in self._bases([group for group in self.layout.groups if block in group.blocks]):
            if other is block:
                controls = block.statistics.controls
                return [(c, sharding.stored(c, b)) for c, b in zip(controls, bases, strict=True)]
        return []

    def kronecker_settings(self) -> KroneckerSettings:
        mode = "pi" if self.damping_mode == "exact" else self.damping_mode
        return KroneckerSettings(damping_mode=mode, statistics_fraction=self.fraction_in_statistics)

    def get_config(self) -> Config:
        config = super().get_config()
        for name in ("damping_mode", "scale", "losses_per_example"):
            config[name] = getattr(self, name)
        return config
