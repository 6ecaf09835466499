"""The contract between the flow of a step and the methods: what `NaturalGradient` asks of KFAC, THOR and all others."""

import abc
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from keras_ngd.layers.geometry import Structure
from keras_ngd.optimizers.approximations import (
    SHARED_APPROXIMATIONS,
    Approximation,
    AveragedApproximation,
    KroneckerSettings,
)
from keras_ngd.optimizers.blocks import Block, Layout
from keras_ngd.optimizers.shares import Shares
from keras_ngd.statistics import Statistics
from keras_ngd.typing import LossesPerExample, Tensor, Variable

if TYPE_CHECKING:
    from keras_ngd.optimizers.exchange import Exchange
    from keras_ngd.optimizers.label_sampling import LabelSampling

# What the curvatures of some blocks are refreshed with: function of a list of blocks to a dict from these to lists of tensors.
Inputs = Callable[[Sequence[Block]], dict[Block, list[Tensor]]]


class Method(Approximation):
    """What a method consists of: how it approximates the Fisher blocks of matrices, and what it decides from them.

    The abstract methods of `Approximation` are what every method has; `share_statistics` is the flow's own (means), unless a
    method's statistics are not averages. The others have defaults that suit one whose layers all record and
    refresh in the same steps, as KFAC's do.

    Attributes:
        one_clock: whether all layers record in the same steps. Default True.
        refreshes_what_was_recorded: whether inverses are made of each batch that was recorded, and of no other. Default False.
        refreshes_from_the_last: whether what a refresh makes depends on the last one, so that there is none in a step that is not
            finite. Default False.
        whole_factors: whether the state of a layer grows with the squares of its sizes. Default False.
        losses_per_example: how many loss values each example contributes to the mean, a number, or `"auto"`.
        factor_decay: decay of the running averages.
        damping_mode: in which units the damping is; of `"global"`, see `DampingUnit`.
        default_clip: what bounds a step where no bound is asked for, by the argument's name. Default: `length_clip` 0.4.
        labels: what draws labels from the model.
        exchange: what workers do together.
        layout: the blocks of the model.
        shares: what is refreshed together where refreshes are spread over steps.
        rest_share: what Adam's learning rate for the rest is of the optimizer's, unless `rest_learning_rate` is given.
    """

    one_clock: bool = True
    refreshes_what_was_recorded: bool = False
    refreshes_from_the_last: bool = False
    whole_factors: bool = False
    losses_per_example: LossesPerExample = 1.0
    factor_decay: float = 0.95
    damping_mode: str = "absolute"
    default_clip: Mapping[str, float] = MappingProxyType({"length_clip": 0.4})
    rest_share: float = 0.1
    labels: "LabelSampling"
    exchange: "Exchange"
    layout: Layout
    shares: Shares = Shares()

    @property
    def approximations(self) -> Mapping[Structure, type[AveragedApproximation]]:
        """The approximations of structures other than matrices, of which the method itself is the approximation."""
        return SHARED_APPROXIMATIONS

    def kronecker_settings(self) -> KroneckerSettings:
        """The settings of the Kronecker factors of these. Default: those that `KroneckerSettings` has."""
        return KroneckerSettings()

    def decay_of(self, block: Block) -> float:
        """The decay of the running averages of a block's statistics."""
        return self.factor_decay

    # Before the first step

    def measure(self, model: Any, data: Any, analysis: Any) -> None:
        """Settles what is to be measured on a model about to be captured, and on a batch of its inputs (or None).

        `keras_ngd.analysis` stands above the optimizers, so it is handed down.
        """

    def further_bytes(self, block: Block) -> int:
        """Size of what a block needs besides its statistics' averages and its curvature."""
        return 0

    def build_own_state(self, layout: Layout) -> None:
        """Creates further variables, once the curvatures have theirs."""

    @property
    def further_variables(self) -> list[Variable]:
        """Variables of no captured layer that do not follow the rule of the rest either."""
        return []

    def start_statistics(self, statistics: Statistics, number: int) -> None:
        """Opens the gate of the layer `number` for the first batch."""
        statistics.gate.assign(1.0)
        self.labels.start(statistics)

    def separate_draws(self) -> None:
        """Makes every worker draw random numbers of its own, if there are any to be drawn in the backward pass."""
        if not self.exchange.communicator.single_program:
            self.labels.separate([block.statistics for block in self.layout.blocks])

    def further_notices(self) -> list[tuple[str, str]]:
        """Pairs of a key and a message, of what the user should know of when training ends."""
        return []

    # Loading

    def can_renew(self, variable: Variable) -> bool:
        """Whether training can go on without a variable's value, if it is of another shape than here."""
        return False

    def convert_from(self, version: int) -> None:
        """Makes of all variables, which were restored from a state of an older format, what they are today."""

    def restored(self, renew: bool) -> None:
        """Told that a state was restored; `renew` if some values that `can_renew` were left out."""

    # In every step

    @abc.abstractmethod
    def share_statistics(
        self, averages: dict[Block, list[Tensor]], calls: dict[Block, Tensor], share: Tensor, left_out: Tensor
    ) -> tuple[dict[Block, list[Tensor]], dict[Block, list[Tensor]]]:
        """Brings the statistics of several workers together.

        Args:
            averages: for each block what this worker's probes emitted.
            calls: for each block how often its layer was called.
            share: scalar, this worker's share of all examples; None where it is alone.
            left_out: `[blocks]`, whose statistics are not to be had of some worker.

        Returns:
            For each block what its statistics go on with; and what its curvature takes, where that is not made of these by
            `curvature_input`.
        """

    @property
    def decided_variables(self) -> list[Variable]:
        """Variables that a refresh renews besides the curvatures'; see `decide`."""
        return []

    def decide(
        self, layout: Layout, inputs: Inputs, damping: Tensor, old: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], dict[Block, Tensor] | None]:
        """What is to be renewed at a refresh. Default: everything.

        Args:
            layout: whose turn it is, all of the layout or a part of it.
            inputs: see `Inputs`.
            damping: scalar.
            old: values of `decided_variables`.

        Returns:
            The new values of these variables, and for each block of `layout` whether it is to be renewed (a dict), or None for
            all.
        """
        return old, None

    def after_refresh(self, averages: dict[Block, list[Tensor]]) -> dict[Block, list[Tensor]]:
        """What the statistics go on with, now that the curvatures are refreshed, if they were. Default: the same."""
        return averages

    def observe_gradients(self, gradients: dict[Block, list[Tensor]], finite: Tensor, step: Tensor) -> None:
        """Sees the plain gradients of every block's variables, and whether all gradients are finite."""

    def gates(self, gates: Tensor) -> Tensor:
        """`[blocks]`, the gates of the layout's blocks for the next batch, from those that the intervals ask for."""
        return gates

    def control_values(self, block: Block, step: Tensor) -> list[tuple[Variable, Tensor]]:
        """Pairs of a control of a block's statistics and its value for the next step."""
        return []
