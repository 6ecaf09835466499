"""What the methods share that work in the eigenbases of Kronecker factors."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd import schedules
from keras_ngd.curvature import EigenbasisCurvature
from keras_ngd.layers.geometry import Structure
from keras_ngd.linalg.orthogonal_iteration import DECOMPOSITIONS
from keras_ngd.optimizers.approximations import AveragedApproximation, UnitWiseApproximation, in_units_of_the_loss
from keras_ngd.optimizers.arguments import documented
from keras_ngd.optimizers.blocks import Group
from keras_ngd.optimizers.natural_gradient import NaturalGradient
from keras_ngd.statistics import SplitStatistics
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import Config, Tensor

# On two busy cores of a CPU TensorFlow took 0.4 s for an eigendecomposition of this size and 0.07 s for a step of orthogonal
# iteration; of 2,048, 2.3 s and 0.4 s (`benchmarks/eigenvectors.py`).
DEFAULT_SPLIT = 1024

# State that steps renew is saved, so all workers hold all of it.
NOT_OF_EIGENBASES = ("gradient_worker_fraction", "reduce_scatter")


@documented(*NOT_OF_EIGENBASES)
class EigenbasisMethod(NaturalGradient):
    """Base of the methods whose curvature is an `EigenbasisCurvature`: the factors, and how their bases are followed.

    Args:
        {{shared_arguments}}
    """

    refreshes_from_the_last = True

    def __init__(
        self,
        decomposition: str,
        basis_tolerance: float,
        split: int | None,
        weight_sharing: str,
        **kwargs: Any,
    ) -> None:
        for name in NOT_OF_EIGENBASES:
            if name in kwargs:
                raise ValueError(
                    f"{type(self).__name__} does not take `{name}`: its averages of gradients are saved, so all workers hold "
                    f"all of them. Received: {name}={kwargs[name]!r}"
                )
        if decomposition not in DECOMPOSITIONS:
            raise ValueError(
                f"`decomposition` must be one of {DECOMPOSITIONS}. Received: decomposition={decomposition!r}"
            )
        if not schedules.is_number(basis_tolerance) or not 0 <= basis_tolerance < 1:
            raise ValueError(f"`basis_tolerance` must be in [0, 1). Received: basis_tolerance={basis_tolerance!r}")
        statistics = SplitStatistics(split, weight_sharing)
        super().__init__(**kwargs)
        self.decomposition, self.basis_tolerance, self.split = decomposition, float(basis_tolerance), statistics.split
        self.weight_sharing = weight_sharing

    @property
    def approximations(self) -> dict[Structure, type[AveragedApproximation]]:
        # Of a lookup's input factor, which is diagonal, all blocks are of size 1.
        return {Structure.SCALE: UnitWiseApproximation}

    def make_statistics(self, layer: keras.layers.Layer) -> Statistics:
        return SplitStatistics(self.split, self.weight_sharing, self.losses_in_statistics, self.fraction_in_statistics)

    def basis_arguments(self, group: Group) -> dict[str, Any]:
        """The arguments of a group's `EigenbasisCurvature`."""
        statistics = group.blocks[0].statistics
        inputs, outputs = statistics.partitions(statistics.geometry)
        return {
            "count": group.count,
            "input_parts": inputs,
            "output_parts": outputs,
            "dtype": group.blocks[0].shape[2],
            "decomposition": self.decomposition,
            "tolerance": self.basis_tolerance,
        }

    def curvature_input(self, statistics: Statistics, averages: Sequence[Tensor], calls: Tensor) -> list[Tensor]:
        return in_units_of_the_loss(self, statistics, averages, calls)

    # What is counted, and said of it

    @property
    def failed_bases(self) -> int:
        """How often a basis could not be renewed, since its factor or the decomposition was not finite, and stayed as it was."""
        return sum(int(ops.convert_to_numpy(ops.sum(v))) for v in self._failures())

    def basis_curvatures(self) -> list[Any]:
        """All curvatures that may have bases."""
        return [group.curvature for group in self.local_layout.groups] if self.built else []

    def _failures(self) -> list[Any]:
        curvatures = [c for c in self.basis_curvatures() if isinstance(c, EigenbasisCurvature)]
        return [curvature.failures(curvature.variables) for curvature in curvatures]

    def further_notices(self) -> list[tuple[str, str]]:
        failed = self.failed_bases
        if not failed:
            return []
        return [
            (
                "failed bases",
                f"{failed} times a basis could not be renewed, since a factor or its decomposition was not finite; the last one "
                "stayed in use. Lower the learning rate, or see whether activations or gradients overflow.",
            )
        ]

    def get_config(self) -> Config:
        config = super().get_config()
        for name in ("decomposition", "basis_tolerance", "split", "weight_sharing", "statistics_fraction"):
            config[name] = getattr(self, name)
        return config
