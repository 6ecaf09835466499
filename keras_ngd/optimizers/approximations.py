"""How Fisher blocks are approximated: the contract, and the approximations of structures that are the same for all methods.

A method is an approximation of blocks of matrices. What it has no approximation of its own for, lookups and scales, has one
here, which asks the method for its settings alone.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_ngd.curvature import Curvature, SplitCurvature, UnitWiseCurvature
from keras_ngd.layers.geometry import Structure
from keras_ngd.optimizers.blocks import Group
from keras_ngd.statistics import SplitStatistics, Statistics, UnitWiseStatistics
from keras_ngd.typing import Tensor

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient


class Approximation(abc.ABC):
    """What is recorded of blocks of one structure, and the curvature that is made of it."""

    @abc.abstractmethod
    def make_statistics(self, layer: Any) -> Statistics:
        """New, unattached statistics of the kind that is needed of a captured layer."""

    @abc.abstractmethod
    def make_curvature(self, group: Group) -> Curvature:
        """A new curvature for a group of blocks of one shape."""

    def name_of(self, curvature: Curvature) -> str:
        """What reports call the approximation, one of whose curvatures this is."""
        return type(curvature).__name__.removesuffix("Curvature")

    @abc.abstractmethod
    def curvature_input(self, statistics: Statistics, averages: Sequence[Tensor], calls: Tensor) -> list[Tensor]:
        """A block's averages as its curvature takes them: summed over the layer's calls, without the loss scale, in the units of
        the loss (`NaturalGradient.ratio_of`).

        Args:
            statistics: the block's.
            averages: their averages, each of them whole.
            calls: scalar, how often the layer was called.
        """


@dataclasses.dataclass(frozen=True)
class KroneckerSettings:
    """The settings of Kronecker factors, where a method uses some beside its own kind of curvature.

    Attributes:
        inverse: how factors are inverted: `"auto"`, `"cholesky"` or `"newton-schulz"`.
        damping_mode: see `curvature.kronecker.factor_dampings`.
        damping_factor: what the method's damping is multiplied with.
        statistics_fraction: the share of each batch's examples that is observed.
    """

    inverse: str = "auto"
    damping_mode: str = "relative"
    damping_factor: float = 1.0
    statistics_fraction: float = 1.0


class AveragedApproximation(Approximation):
    """Base of those whose statistics are running averages of second moments.

    Args:
        method: the optimizer, whose settings they have.
    """

    def __init__(self, method: "NaturalGradient") -> None:
        self.method = method

    def name_of(self, curvature: Curvature) -> str:
        return type(self).__name__.removesuffix("Approximation")

    def curvature_input(self, statistics: Statistics, averages: Sequence[Tensor], calls: Tensor) -> list[Tensor]:
        return in_units_of_the_loss(self.method, statistics, averages, calls)


def in_units_of_the_loss(
    method: "NaturalGradient", statistics: Any, averages: Sequence[Tensor], calls: Tensor
) -> list[Tensor]:
    """Averages of second moments as curvatures take them, those about gradients in the units of the loss."""
    # They are made of squared gradients: a loss scale enters squared. What is averaged is its mean over the calls.
    inputs, dtype = statistics.input_parts, averages[-1].dtype
    factor = ops.cast(calls, dtype) * method.ratio_of(statistics, dtype) / method.loss_scale**2
    return [*averages[:inputs], *(g * factor for g in averages[inputs:])]


def split_curvature(group: Group, settings: KroneckerSettings) -> SplitCurvature:
    """The curvature of a group whose statistics are diagonal blocks of factors."""
    statistics = group.blocks[0].statistics
    inputs, outputs = statistics.partitions(statistics.geometry)
    return SplitCurvature(
        group.count,
        inputs,
        outputs,
        group.blocks[0].shape[2],
        settings.inverse,
        settings.damping_mode,
        settings.damping_factor,
    )


class LookupApproximation(AveragedApproximation):
    """Of a lookup: `F ~ A (x) G` with a diagonal `A`, how often each row was looked up, and a whole `G`.

    The looked-up rows are those of a dense layer with one-hot inputs and no bias.
    """

    def make_statistics(self, layer: Any) -> Statistics:
        fraction = self.method.kronecker_settings().statistics_fraction
        return SplitStatistics(None, "expand", self.method.losses_in_statistics, fraction)

    def make_curvature(self, group: Group) -> Curvature:
        return split_curvature(group, self.method.kronecker_settings())


class UnitWiseApproximation(AveragedApproximation):
    """Of scales and offsets: for each feature the block of its own two (SP-NGD's unit-wise Fisher)."""

    def make_statistics(self, layer: Any) -> Statistics:
        return UnitWiseStatistics(self.method.losses_in_statistics)

    def make_curvature(self, group: Group) -> Curvature:
        settings = self.method.kronecker_settings()
        return UnitWiseCurvature(
            group.count, *group.blocks[0].shape, settings.damping_mode, damping_factor=settings.damping_factor
        )


# Of the structures that methods need no approximation of their own for.
SHARED_APPROXIMATIONS: Mapping[Structure, type[AveragedApproximation]] = {
    Structure.LOOKUP: LookupApproximation,
    Structure.SCALE: UnitWiseApproximation,
}
