"""An optimizer's arguments, the parts that it is assembled of, and what these show of themselves."""

import sys
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd import schedules, sharding
from keras_ngd.curvature import Curvature
from keras_ngd.distributed.communicator import Communicator
from keras_ngd.fisher import likelihoods
from keras_ngd.layers.geometry import Geometry
from keras_ngd.optimizers import checks, coverage
from keras_ngd.optimizers.approximations import Approximation
from keras_ngd.optimizers.arguments import documented
from keras_ngd.optimizers.arrivals import Arrivals
from keras_ngd.optimizers.blocks import Group, Layout
from keras_ngd.optimizers.bound import Bound, Clips
from keras_ngd.optimizers.checkpoint import StrictCheckpoint
from keras_ngd.optimizers.clock import Clock
from keras_ngd.optimizers.compiled_metrics import make_outside_of_traces
from keras_ngd.optimizers.counters import Count, Counters
from keras_ngd.optimizers.damping_unit import DampingUnit
from keras_ngd.optimizers.exchange import Exchange
from keras_ngd.optimizers.label_sampling import LabelSampling, check_fisher
from keras_ngd.optimizers.loss_ratio import LossRatio
from keras_ngd.optimizers.loss_value import LossCarrier, MeanLoss
from keras_ngd.optimizers.method import Method
from keras_ngd.optimizers.notices import Notices
from keras_ngd.optimizers.overwriting import OverwritingSGD
from keras_ngd.optimizers.rest import RestRule, checked_rest
from keras_ngd.optimizers.settings import check_fisher_scale
from keras_ngd.optimizers.state_layout import StateLayout
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import Config, DampingLike, IntervalLike, RateLike, Store, Tensor, Variable


@documented()
class AssembledOptimizer(Method, OverwritingSGD):
    """What all methods share but the flow of a step, which is `NaturalGradient`'s.

    Args:
        learning_rate: float, `LearningRateSchedule` or callable, as for every Keras optimizer.
        damping: positive float or `LearningRateSchedule` (of the step).
        {{shared_arguments}}
    """

    # Parts that `build` makes; None before.
    clock: Clock
    counters: Counters
    arrivals: Arrivals
    mean_loss: MeanLoss
    bound: Bound
    rest_rule: RestRule
    damping_unit: DampingUnit

    def __init__(
        self,
        learning_rate: RateLike,
        damping: DampingLike,
        momentum: float = 0.9,
        factor_decay: float = 0.95,
        factor_interval: IntervalLike = 10,
        inverse_interval: IntervalLike = 100,
        kl_clip: float | None = None,
        loss_clip: float | str | None = "auto",
        length_clip: float | str | None = "auto",
        fisher: str = "empirical",
        likelihood: Any = None,
        statistics_fraction: float | None = None,
        fisher_scale: str | None = "auto",
        interval_growth: float | None = 0.1,
        stagger: bool = False,
        rest: str = "adam",
        rest_learning_rate: DampingLike | None = None,
        communicator: Communicator | str = "auto",
        gradient_worker_fraction: float = 1.0,
        reduce_scatter: bool = False,
        shard_state: bool = False,
        seed: int = 0,
        not_captured: Any = None,
        **kwargs: Any,
    ) -> None:
        checks.check_own_arguments(type(self).__name__, factor_decay, kwargs)
        clips = Clips(length_clip, loss_clip, kl_clip).settled(self.default_clip)
        check_fisher_scale(fisher_scale)
        likelihood, fraction, fisher_scale = check_fisher(fisher, likelihood, statistics_fraction, fisher_scale)
        seed = schedules.check_seed("seed", seed)
        if interval_growth is not None:
            interval_growth = schedules.check_positive_number("interval_growth", interval_growth)
        rest, rest_learning_rate = checked_rest(rest, rest_learning_rate)
        damping = schedules.check_positive("damping", schedules.deserialize(damping))
        factor_interval = schedules.check_interval("factor_interval", schedules.deserialize(factor_interval))
        inverse_interval = schedules.check_interval("inverse_interval", schedules.deserialize(inverse_interval))
        checks.check_division(communicator, gradient_worker_fraction, reduce_scatter, shard_state)
        checks.check_stagger(stagger)
        super().__init__(learning_rate=learning_rate, momentum=momentum, **kwargs)
        self.damping, self.factor_decay = damping, float(factor_decay)
        self.length_clip, self.loss_clip, self.kl_clip = clips
        self.fisher, self.likelihood, self.statistics_fraction = fisher, likelihood, fraction
        self.fisher_scale, self.seed = fisher_scale, seed
        self.factor_interval, self.inverse_interval = factor_interval, inverse_interval
        self.interval_growth, self.stagger = interval_growth, stagger
        self.rest, self.rest_learning_rate = rest, rest_learning_rate
        self.communicator, self.gradient_worker_fraction = communicator, float(gradient_worker_fraction)
        self.reduce_scatter, self.shard_state, self.not_captured = reduce_scatter, shard_state, not_captured
        self.layout = Layout()
        self._model: weakref.ref[keras.Model] | None = None
        self.exchange, self.checkpoint = Exchange(self), StrictCheckpoint(self)
        self.labels = LabelSampling(self)
        self.loss_carrier, self.ratio = LossCarrier(), LossRatio(self)
        self.state = StateLayout(self.add_variable, shard_state)
        self._notices = Notices(self.name)
        unbuilt: Any = None
        self.clock = self.counters = self.arrivals = self.mean_loss = self.bound = self.rest_rule = unbuilt
        self.damping_unit = unbuilt

    def __setattr__(self, name: str, value: Any) -> None:
        # Keras's LossScaleOptimizer announces itself to the optimizer it wraps by resetting this attribute. MultiOptimizer sets
        # it too, to the scale that it applies itself.
        if name == "loss_scale_factor" and name in self.__dict__:
            checks.check_loss_scale(self)
        super().__setattr__(name, value)

    # Capture

    def note_capture(self, model: keras.Model) -> None:
        """Told that a model was captured for this optimizer."""
        self._model = weakref.ref(model)
        self.not_captured = coverage.count_not_captured(model.trainable_variables)

    def captured_model(self) -> keras.Model | None:
        """The model that was captured for this optimizer, or None. Not a property: Keras saves and loads what those return."""
        return None if self._model is None else self._model()

    def new_statistics(self, layer: keras.layers.Layer, geometry: Geometry) -> Statistics:
        """What the approximation of a geometry's structure records of a layer, told where it is to lie."""
        self.labels.check_losses()
        statistics = self.approximation_of(geometry).make_statistics(layer)
        statistics.shard_state, statistics.sampled_fraction = self.shard_state, self.labels.fraction
        return statistics

    def called(self, statistics: Statistics, x: Tensor) -> None:
        """Told that a captured layer is called with `x`, before its statistics' weights are looked at."""
        model = self.captured_model()
        self.labels.called(statistics, x)
        self.ratio.listen(model)
        make_outside_of_traces(model)

    def labels_are_drawn(self) -> bool:
        """Whether labels are drawn, where it is time to, for the loss whose derivative is taken here."""
        return self.labels.drawn()

    def approximation_of(self, geometry: Geometry) -> Approximation:
        """How blocks of this geometry are approximated."""
        kind = self.approximations.get(geometry.structure)
        return self if kind is None else kind(self)

    def curvature_of(self, group: Group) -> Curvature:
        """A new curvature for a group of blocks of one structure and shape."""
        return self.approximation_of(group.blocks[0].geometry).make_curvature(group)

    # The loss

    @property
    def loss_scale(self) -> float:
        """What the losses were multiplied with whose gradients arrive."""
        return self.loss_scale_factor or 1.0

    @property
    def losses_in_statistics(self) -> float:
        """The argument `losses_per_example` of this optimizer's statistics."""
        return 1 if isinstance(self.losses_per_example, str) else self.losses_per_example

    @property
    def fraction_in_statistics(self) -> float:
        """The argument `statistics_fraction` of this optimizer's statistics."""
        return self.statistics_fraction if self.labels.fraction is None else 1.0

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss that is to be differentiated, as every Keras trainer asks for it; its value travels along.

        In a loop of one's own: `loss = optimizer.scale_loss(loss)` before it is differentiated, inside the tape.
        """
        return super().scale_loss(self.loss_carrier.put_into(loss))

    @property
    def fisher_factor(self) -> Tensor:
        """What the empirical Fisher matrix is to be multiplied with, a scalar."""
        return ops.ones((), "float32") if self.fisher_scale is None else self.mean_loss.inverse()

    def ratio_of(self, statistics: Statistics, dtype: str = "float32", before: bool = False) -> Tensor:
        """What a block's statistics are multiplied with, the ratio and the `fisher_factor` in one; see `LossRatio.of`."""
        return self.ratio.of(statistics, self.fisher_factor, dtype, before)

    # Workers

    @property
    def gradients_are_reduced(self) -> bool:
        return self.exchange.workers is not None

    def received_bytes(self) -> dict[str, int]:
        """What this worker has received from others in training steps, in bytes, by stage; `{}` on one worker.

        Stages are `initial state`, `gradients`, `statistics`, `inverses`, `preconditioned`, `decisions` and `saving`.
        """
        return self.exchange.received_bytes()

    def gather_statistics(self) -> None:
        """Gives all workers the statistics of all layers; to be called on all, outside a step (`callbacks.GatherStatistics`).

        With `reduce_scatter=True` only a layer's owner has them, and nobody could save them all.
        """
        self.exchange.gather_statistics()

    @property
    def gathered(self) -> bool:
        """Whether this worker has the statistics of all layers."""
        return self.exchange.gathered

    @gathered.setter
    def gathered(self, value: bool) -> None:
        self.exchange.gathered = value

    # What is counted, and said of it

    skipped_statistics = Count("counters", "How many updates of the statistics were left out: some were not finite.")
    distorted_statistics = Count(
        "counters", "How many updates left layers out: the training step had changed what arrived."
    )
    skipped_steps = Count("counters", "How many steps took a zero gradient because some gradient was not finite.")
    unsampled_updates = Count(
        "counters",
        "How many updates of the statistics were of a batch of one, for which no labels are drawn: `fisher='sampled'`.",
    )
    factor_updates = Count("counters", "How many batches have entered the statistics' averages.")
    inverse_updates = Count(
        "counters", "How often the inverses were refreshed; with `stagger`, how many rounds of that have begun."
    )
    clipped_steps = Count("bound", "How many steps a clip has shortened.")
    mean_step_scale = Count(
        "bound", "The mean over all steps of what clips multiplied a step with; 1 if they never did.", 1.0
    )

    @property
    def loss_ratio(self) -> float:
        """What statistics are multiplied with: how many loss values each example has, as the compiled loss weighs them.

        A number; of layers that see more examples than the batch has (windows of an image), theirs is as much smaller. 1 before
        the first step, where `losses_per_example` was given, and in training without a compiled loss.
        """
        return self.ratio.read()

    def give_notices(self) -> None:
        """Warns of what was not said before. `fit` calls it when it ends; a loop of your own may, at any time."""
        if self.built and self.bound is not None:
            found = [*self.counters.notices(self.losses_per_example), *self.bound.notices(), *self.further_notices()]
            self._notices.give(found)

    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        """Called by Keras's trainers on the host when a `fit` ends."""
        super().finalize_variable_values(var_list)
        # On JAX Keras calls this on the way of an error, too, when variables have no values; the error is what is to be seen.
        if sys.exc_info()[0] is None:
            self.give_notices()

    # Saving

    def save_own_variables(self, store: Store) -> None:
        self.checkpoint.save(store)

    def load_own_variables(self, store: Store) -> None:
        """Restores the optimizer's variables from a checkpoint; see `StrictCheckpoint.load`."""
        self.checkpoint.load(store)

    def restored(self, renew: bool) -> None:
        if self.gradient_worker_fraction < 1:
            self.clock.refresh_at_once()
        # What was saved is complete.
        self.exchange.gathered = True

    @classmethod
    def from_config(cls, config: Config, custom_objects: dict[str, Any] | None = None) -> "AssembledOptimizer":
        if config.get("shard_state") and sharding.distribution() is None:
            warnings.warn(
                f"The state of this {cls.__name__} was sharded over several devices. There is no `keras.distribution` of several "
                "devices now, so it is whole again: `shard_state=False`.",
                stacklevel=2,
            )
            config = {**config, "shard_state": False}
        optimizer = super().from_config(config, custom_objects)
        optimizer.checkpoint.from_config = True
        return optimizer

    def get_config(self) -> Config:
        config = super().get_config()
        config.pop("gradient_accumulation_steps", None)
        for name in ("damping", "factor_interval", "inverse_interval", "rest_learning_rate"):
            config[name] = schedules.serialize(getattr(self, name))
        for name in ("factor_decay", *Clips._fields, "fisher_scale", "interval_growth", "rest"):
            config[name] = getattr(self, name)
        if self.gradient_worker_fraction != 1:
            config["gradient_worker_fraction"] = self.gradient_worker_fraction
        if self.fisher != "empirical":
            config |= {"fisher": self.fisher, "statistics_fraction": self.statistics_fraction, "seed": self.seed}
        if self.likelihood is not None:
            config["likelihood"] = likelihoods.serialized(self.likelihood)
        config |= {name: True for name in ("reduce_scatter", "shard_state", "stagger") if getattr(self, name)}
        if isinstance(self.communicator, str) and self.communicator != "auto":
            config["communicator"] = self.communicator
        return config | ({"not_captured": self.not_captured} if self.not_captured else {})
