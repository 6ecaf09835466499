"""HyLo: hybrid low-rank natural gradient descent."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ngd import backend, schedules
from keras_ngd.linalg.sampling import SAMPLINGS
from keras_ngd.optimizers import combining, gradient_switch
from keras_ngd.optimizers.arguments import NOT_OF_ROWS, documented
from keras_ngd.optimizers.blocks import Block, Layout
from keras_ngd.optimizers.row_method import of_rows, steps_in
from keras_ngd.optimizers.sngd import SNGD
from keras_ngd.statistics import LowRankStatistics
from keras_ngd.statistics.draws import LAYERS, draw_number
from keras_ngd.statistics.low_rank import KID, KIS
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import Config, DampingLike, IntervalLike, LossesPerExample, RateLike, Shape, Tensor, Variable

MODES = ("switch", "kid", "kis", "random")

# Steps between the decisions of the switch, where nothing says how many an epoch has.
DEFAULT_PERIOD = 100


@keras.saving.register_keras_serializable("keras_ngd")
@documented("factor_decay", *NOT_OF_ROWS)
class HyLo(SNGD):
    """SNGD with a few rows in place of a batch's, chosen anew at every update by one of two means.

    KID chooses them by an interpolative decomposition of the kernel matrix `Q = U U^T` and weights them so that they stand for
    all; KIS draws them at random by their importance (see `keras_ngd.statistics.LowRankStatistics`). With `Us` the
    outer products of the chosen rows, and `Y` their weights,

        P = (V - Us^T (Us Us^T + damping Y^-1)^-1 Us V) / damping

    (HyLo, eq. 8 and 9), followed by KFAC's clip and step. With `rank` equal to the batch size this is SNGD. The switch
    decides at the end of each epoch which it is in the next: KID where the sum of the epoch's gradients changed by `eta`
    or more in length, and where the learning rate decayed; KIS where neither did (eq. 10).

    ```python
    optimizer = keras_ngd.HyLo()
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    model.fit(x, y)
    ```

    Args:
        learning_rate: float, `LearningRateSchedule` or callable. Default 0.02.
        damping: positive float or `LearningRateSchedule`: what is added to the curvature; the gradient's part outside the
            chosen rows is divided by it alone, so that far smaller ones take steps far too long. `damping_mode` says in which
            units. Default None: 0.3, relative.
        damping_mode: `"relative"` or `"absolute"`, as for `keras_ngd.SNGD`.
        rank: how many rows: an int up to the batch size, or a float in (0, 1], a fraction of it, or of the room where there is
            more. Default 0.1, the paper's.
        mode: `"switch"` (default), `"kid"`, `"kis"`, or `"random"`: one or the other by a coin for each epoch (the paper's
            Table III).
        sampling: of KIS: `"priority"` (default) and `"replacement"` weight the rows so that the curvature is unbiased;
            `"paper"` takes them as they are, which is too small a curvature.
        power: KIS draws rows in proportion to this power of their size. Default 2, of least variance; the paper's is 1.
        residual: whether KID keeps what the chosen rows do not explain (eq. 8) or saves the time. Default True.
        eta: relative change of the epoch's gradient from which it is KID. Default 0.25.
        decay_ratio: a learning rate of at most this share of the last epoch's counts as decayed. Default 0.9.
        steps_per_epoch: int, how often `"switch"` and `"random"` decide. Default None: the length of `capture`'s `data`, if it
            is a data set that has one; else they decide every 100 steps.
        seed: int in [0, 2**12), of samples and coins. Default 0.
        {{shared_arguments}}

    Reference:
        - [Mu et al., 2022](https://doi.org/10.1109/SC41404.2022.00053)
        - [Duffield et al., 2007](https://doi.org/10.1145/1314690.1314696), priority sampling
    """

    def __init__(
        self,
        learning_rate: RateLike = 0.02,
        damping: DampingLike | None = None,
        momentum: float = 0.9,
        interval: IntervalLike = 10,
        batch_size: int | None = None,
        rank: int | float = 0.1,
        mode: str = "switch",
        sampling: str = "priority",
        power: float = 2.0,
        residual: bool = True,
        eta: float = 0.25,
        decay_ratio: float = 0.9,
        steps_per_epoch: int | None = None,
        losses_per_example: LossesPerExample = "auto",
        kl_clip: float | None = None,
        damping_mode: str | None = None,
        seed: int = 0,
        name: str = "hylo",
        **kwargs: Any,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}")
        if sampling not in SAMPLINGS:
            raise ValueError(f"`sampling` must be one of {SAMPLINGS}. Received: sampling={sampling!r}")
        if not isinstance(residual, bool):
            raise ValueError(f"`residual` must be True or False. Received: residual={residual!r}")
        if not schedules.is_number(decay_ratio) or not 0 < decay_ratio < 1:
            raise ValueError(f"`decay_ratio` must be in (0, 1). Received: decay_ratio={decay_ratio!r}")
        if steps_per_epoch is not None:
            steps_per_epoch = schedules.check_count("steps_per_epoch", steps_per_epoch)
        super().__init__(
            learning_rate,
            damping,
            momentum,
            interval,
            batch_size,
            losses_per_example,
            kl_clip,
            damping_mode,
            name,
            seed=seed,
            **kwargs,
        )
        self.rank = _check_rank(rank, self.batch_size)
        self.mode, self.sampling, self.residual = mode, sampling, residual
        self.power = schedules.check_positive_number("power", power)
        self.eta = schedules.check_positive_number("eta", eta)
        self.decay_ratio, self.steps_per_epoch = float(decay_ratio), steps_per_epoch

    def measure(self, model: Any, data: Any, analysis: Any) -> None:
        super().measure(model, data, analysis)
        _check_rank(self.rank, self.batch_size or self.found_batch_size)
        if self.mode in ("switch", "random") and self.steps_per_epoch is None:
            self.steps_per_epoch = steps_in(data) or None

    @property
    def rows(self) -> int:
        """How many rows are chosen of a batch."""
        if isinstance(self.rank, float):
            return max(round(self.rank * self.capacity), 1)
        # Of a smaller batch, all rows stand for themselves.
        return min(max(round(self.rank * self.exchange.communicator.batch_share), 1), self.capacity)

    def make_statistics(self, layer: keras.layers.Layer) -> Statistics:
        return LowRankStatistics(
            self.rows,
            self.capacity,
            self.losses_in_statistics,
            self.mode if self.mode in ("kid", "kis") else "both",
            self.sampling,
            self.power,
            self.residual,
            self.damping_mode == "relative",
            strict=self.strict,
        )

    def curvature_input(self, statistics: Statistics, averages: Sequence[Tensor], calls: Tensor) -> list[Tensor]:
        a, g, weights, damping = averages
        # A damping that was relative to the probe's rows is scaled with these, and others as they were on their way there.
        units = self._units_of_probe(self.ratio_of(statistics, before=self.damping_mode == "absolute"))
        return [a, self.scaled_rows(statistics, g), weights, damping / ops.cast(units, damping.dtype)]

    def combinations(self, shapes: Sequence[Shape]) -> list[int]:
        relative = self.damping_mode == "relative"
        return [*super().combinations(shapes), combining.WEIGHTS, combining.MEAN if relative else combining.SAME]

    def weights_travel(self, block: Block) -> Tensor:
        return block.statistics.gate > (KIS + KID) / 2 if self.mode in ("switch", "random") else self.mode == "kid"

    # The switch

    def build_own_state(self, layout: Layout) -> None:
        super().build_own_state(layout)
        self._sums = []
        if self.mode not in ("switch", "random"):
            return
        self._switch = self.state.add(
            (len(gradient_switch.STATE),),
            lambda shape, dtype=None: gradient_switch.initial_state(self._first_mode()),
            "float32",
            "gradient_switch",
        )
        if self.mode == "random":
            return
        for variable in (v for block in layout.blocks for v in block.variables):
            self._sums.append(self.add_variable_from_reference(variable, "gradient_sum"))

    def further_bytes(self, block: Block) -> int:
        rows = super().further_bytes(block)
        if self.mode != "switch":
            return rows
        return rows + sum(math.prod(v.shape) * backend.itemsize(v.dtype) for v in block.variables)

    def start_statistics(self, statistics: Statistics, number: int) -> None:
        super().start_statistics(statistics, number)
        if not isinstance(statistics, LowRankStatistics):
            return
        # The ratio of the loss is not known before the first batch, whose rows KID weighs as for a mean over the examples.
        statistics.damping.assign(self._damping_for_probe(0, 1.0))
        statistics.gate.assign(self._first_mode())

    def _first_mode(self) -> Tensor:
        # Of a dtype that JAX takes for no number's: the next step would be compiled anew for its own gates.
        mode = self._coin(0.0) if self.mode == "random" else KIS if self.mode == "kis" else KID
        return ops.convert_to_tensor(mode, dtype="float32")

    def _units_of_probe(self, ratio: Tensor) -> Tensor:
        """How many times larger rows' outer products are in the probe than those that the damping is added to."""
        # A worker compares the damping with the sum over its own examples' rows; all workers' is as much larger.
        return self.exchange.communicator.size * self.loss_scale**2 / ratio

    def _damping_for_probe(self, step: Tensor, ratio: Tensor) -> Tensor:
        damping = schedules.value_at(self.damping, step)
        return damping if self.damping_mode == "relative" else damping * self._units_of_probe(ratio)

    def control_values(self, block: Block, step: Tensor) -> list[tuple[Variable, Tensor]]:
        if not of_rows(block):
            return []
        return [(block.statistics.damping, self._damping_for_probe(step + 1, self.ratio_of(block.statistics)))]

    def _coin(self, epoch: Tensor) -> Tensor:
        seed = ops.stack([float(draw_number(self.seed, LAYERS - 1)), epoch])
        return ops.where(backend.uniform((), ops.cast(seed, "int32"), "float32") < 0.5, KIS, KID)

    def _mode(self) -> Tensor:
        if self.mode in ("kid", "kis"):
            return KID if self.mode == "kid" else KIS
        return ops.convert_to_tensor(self._switch)[gradient_switch.STATE.index("mode")]

    def gates(self, gates: Tensor) -> Tensor:
        chosen = ops.convert_to_tensor([of_rows(block) for block in self.layout.blocks], "bool")
        return super().gates(ops.where(chosen & (gates > 0), self._mode(), gates))

    def observe_gradients(self, gradients: dict[Block, list[Tensor]], finite: Tensor, step: Tensor) -> None:
        if self.mode not in ("switch", "random"):
            return
        state = ops.convert_to_tensor(self._switch)
        period = self.steps_per_epoch or DEFAULT_PERIOD
        ends, begins = (step + 1) % period == 0, step % period == 0
        sums = [ops.convert_to_tensor(v) for v in self._sums]
        if self.mode == "switch":
            flat = [g for block in self.layout.blocks for g in gradients[block]]
            sums = [
                s + backend.times_or_zero(ops.cast(g, s.dtype), ops.cast(finite, s.dtype))
                for s, g in zip(sums, flat, strict=True)
            ]
            now = ops.cast(self.learning_rate, "float32")
            following = self._learning_rate_at(step + 1)
            state = ops.where(begins, gradient_switch.at_first_step(state, now, self.decay_ratio), state)

        def decided() -> list[Tensor]:
            if self.mode == "random":
                epoch = state[gradient_switch.STATE.index("epochs")] + 1
                return [ops.stack([self._coin(epoch), epoch, *ops.unstack(state, num=len(gradient_switch.STATE))[2:]])]
            # The norms differ by rounding at most, but a worker in another mode than the others would wait for them.
            norm = ops.sqrt(sum(ops.sum(ops.square(ops.cast(s, "float32"))) for s in sums))
            new = gradient_switch.after_epoch(state, norm, following, self.eta, self.decay_ratio)
            [new] = self.exchange.agreed([new])
            return [new, *(ops.zeros_like(s) for s in sums)]

        new, *sums = ops.cond(ends, decided, lambda: [state, *sums])
        for variable, value in zip([self._switch, *self._sums], [new, *sums], strict=True):
            self.assign(variable, value)

    def _learning_rate_at(self, step: Tensor) -> Tensor:
        rate = self._learning_rate
        schedule = isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)
        return ops.cast(rate(step) if schedule else self.learning_rate, "float32")

    def switch_report(self) -> dict[str, Any]:
        """What the switch knows: a dict of `mode` (`"kid"` or `"kis"`), `epochs` that are over, `norm` and `previous_norm`."""
        if self.mode in ("kid", "kis") or not self.built:
            return {"mode": "kis" if self.mode == "kis" else "kid", "epochs": 0, "norm": 0.0, "previous_norm": 0.0}
        found = dict(zip(gradient_switch.STATE, ops.convert_to_numpy(self._switch), strict=True))
        return {
            "mode": "kid" if found["mode"] == KID else "kis",
            "epochs": int(found["epochs"]),
            "norm": float(found["norm"]),
            "previous_norm": float(found["previous_norm"]),
        }

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "rank": self.rank,
            "mode": self.mode,
            "sampling": self.sampling,
            "power": self.power,
            "residual": self.residual,
            "eta": self.eta,
            "decay_ratio": self.decay_ratio,
            "steps_per_epoch": self.steps_per_epoch,
            "seed": self.seed,
        }


def _check_rank(rank: Any, batch_size: int | None) -> int | float:
    if schedules.is_count(rank):
        if batch_size is not None and rank > batch_size:
            raise ValueError(f"`rank` must not exceed the batch size. Received: rank={rank}, batch_size={batch_size}")
        return int(rank)
    if schedules.is_number(rank) and not isinstance(rank, numbers.Integral) and 0 < rank <= 1:
        return float(rank)
    raise ValueError(
        "`rank` must be an int from 1 to the batch size, a number of rows, or a float in (0, 1], a share of the batch. "
        f"Received: rank={rank!r}"
    )
