"""THOR: trace-based, hardware-driven, layer-oriented natural gradient descent."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops, tree

from keras_ngd import schedules
from keras_ngd.curvature.curvature import Curvature
from keras_ngd.optimizers import shares, trace_rule
from keras_ngd.optimizers.approximations import split_curvature
from keras_ngd.optimizers.arguments import documented
from keras_ngd.optimizers.blocks import Block, Group, Layout
from keras_ngd.optimizers.kfac import KFAC
from keras_ngd.optimizers.method import Inputs
from keras_ngd.statistics import SplitStatistics
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import Config, DampingLike, IntervalLike, RateLike, SplitLike, Tensor, Variable

DEFAULT_SPLIT = 128

# What `split="auto"` is measured on has no more examples.
LARGEST_BATCH = 256
TRACE_DAMPINGS = ("none", "full")


@keras.saving.register_keras_serializable("keras_ngd")
@documented("reduce_scatter")
class THOR(KFAC):
    """KFAC with block-diagonal factors, and inverses that each layer renews only when its curvature has changed.

    The factors `A` and `G` of every captured layer are cut into diagonal blocks of `split` rows and columns, and only
    these are recorded, averaged, stored and inverted:

        P = diag(A1 + dA I, A2 + dA I, ...)^-1 V diag(G1 + dG I, G2 + dG I, ...)^-1 ,

    followed by KFAC's clip and step. At every `inverse_interval`, each layer looks at the change of its curvature's trace
    since its last update, `change = |trace - reference| / reference`, with `trace = tr A tr G`:

        change > omega1              update: new inverses, the trace is the new reference
        omega2 <= change <= omega1   keep:   the inverses stay
        change < omega2              stop:   the inverses stay for good, nothing more is recorded of the layer

    The paper's variants are settings: THOR is `omega=(0.01, 0.0)`, THOR_stop `(0.01, 0.001)`, THOR_NT `(0.0, 0.0)`,
    which always updates. Its growing intervals are `keras_ngd.schedules.GrowingInterval`, its learning rates and dampings
    `keras_ngd.schedules.thor_schedules`.

    ```python
    optimizer = keras_ngd.THOR(split=128)
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    model.fit(x, y)
    ```

    Args:
        split: size of the blocks: an int; None for whole factors; a dict from layer names, paths or patterns
            (`"conv1_*"`) to sizes, exact names first, 128 where nothing matches; a function of the layer; or `"auto"`:
            `capture(model, optimizer, data=x)` measures it with `keras_ngd.analysis.split_dimension`. A factor no
            larger than its split stays whole: with a split larger than every layer this is KFAC. A split that divides
            the channels of a convolution makes its statistics cheapest. Default 128.
        omega: `(omega1, omega2)`, with `0 <= omega2 <= omega1`. The running averages damp the changes: by about
            `1 - factor_decay` per update against those of single batches. Default `(0.01, 0.0)`.
        trace_damping: `"none"` (default), or `"full"`: add `damping dA dG` to the trace, as eq. 8 has it. This term, often
            hundreds of times the other, hides the change: nearly every layer keeps, or stops, by accident.
        stop_patience: how many changes below omega2 in a row it takes to stop. Single ones come by chance. Default 1, the
            paper's.
        learning_rate, damping: as for `keras_ngd.KFAC`.
        damping_mode: as for `keras_ngd.KFAC`, without `"exact"`. The paper adds the damping itself to both factors,
            `damping_mode="factor"`, and averages nothing, `factor_decay=0`.
        inverse: `"auto"` (default), `"cholesky"` or `"newton-schulz"`, as for `keras_ngd.KFAC`.
        {{shared_arguments}}

    Reference:
        - [Chen et al., 2021](https://ojs.aaai.org/index.php/AAAI/article/view/16867)
    """

    one_clock = False

    split: Any

    def __init__(
        self,
        learning_rate: RateLike = 0.02,
        damping: DampingLike | None = None,
        momentum: float = 0.9,
        factor_decay: float = 0.95,
        factor_interval: IntervalLike = 10,
        inverse_interval: IntervalLike = 100,
        split: SplitLike = DEFAULT_SPLIT,
        omega: tuple[float, float] = (0.01, 0.0),
        trace_damping: str = "none",
        stop_patience: int = 1,
        inverse: str = "auto",
        damping_mode: str | None = None,
        name: str = "thor",
        **kwargs: Any,
    ) -> None:
        if inverse == "eigen":
            raise ValueError(
                f"`inverse` must be 'auto', 'cholesky' or 'newton-schulz' for THOR. Received: inverse={inverse!r}"
            )
        if kwargs.get("reduce_scatter"):
            raise ValueError(
                "`reduce_scatter` is for KFAC: THOR's trace rule looks at all layers' statistics. Received: reduce_scatter="
                f"{kwargs['reduce_scatter']!r}"
            )
        split = _check_split(split)
        omega = _check_omega(omega)
        if trace_damping not in TRACE_DAMPINGS:
            raise ValueError(
                f"`trace_damping` must be one of {TRACE_DAMPINGS}. Received: trace_damping={trace_damping!r}"
            )
        stop_patience = schedules.check_count("stop_patience", stop_patience)
        super().__init__(
            learning_rate=learning_rate,
            damping=damping,
            momentum=momentum,
            factor_decay=factor_decay,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            inverse=inverse,
            damping_mode=damping_mode,
            name=name,
            **kwargs,
        )
        self.split, self.omega, self.trace_damping, self.stop_patience = split, omega, trace_damping, stop_patience
        self._splits: dict[str, int | None] = {}

    # Splits

    def measure(self, model: Any, data: Any, analysis: Any) -> None:
        if self.split != "auto":
            return
        if data is None:
            raise ValueError(
                "`split='auto'` is measured when the model is captured, and needs data: "
                "`keras_ngd.capture(model, optimizer, data=x)`, with a batch of the model's inputs."
            )
        # A whole data set in one array is no batch.
        data = tree.map_structure(lambda leaf: leaf[:LARGEST_BATCH] if getattr(leaf, "shape", ()) else leaf, data)
        self.split = analysis.split_dimension(model, data).split

    def split_of(self, layer: keras.layers.Layer) -> int | None:
        """The size of a layer's blocks, or None where they are whole."""
        if callable(self.split):
            # A function need not be serializable, nor give the same answer twice; what it said is kept.
            if layer.path not in self._splits:
                self._splits[layer.path] = schedules.check_split(f"split of layer {layer.path!r}", self.split(layer))
            return self._splits[layer.path]
        if not isinstance(self.split, dict):
            return self.split
        for name in (layer.path, layer.name):
            if name in self.split:
                return self.split[name]
        for pattern, size in self.split.items():
            if fnmatch.fnmatchcase(layer.path, pattern) or fnmatch.fnmatchcase(layer.name, pattern):
                return size
        return DEFAULT_SPLIT

    def make_statistics(self, layer: keras.layers.Layer) -> Statistics:
        return SplitStatistics(
            self.split_of(layer), self.weight_sharing, self.losses_in_statistics, self.fraction_in_statistics
        )

    def make_curvature(self, group: Group) -> Curvature:
        return split_curvature(group, self.kronecker_settings())

    # The trace rule

    def build_own_state(self, layout: Layout) -> None:
        layers = len(layout.blocks)
        self._rule = self.state.add(
            (len(trace_rule.STATE), layers),
            lambda shape, dtype=None: trace_rule.initial_state(layers),
            "float32",
            "trace_rule",
        )

    @property
    def decided_variables(self) -> list[Variable]:
        return [self._rule]

    def restored(self, renew: bool) -> None:
        super().restored(renew)
        if self.gradient_worker_fraction < 1:
            # All inverses are to be made anew.
            self._rule.assign(trace_rule.initial_state(len(self.layout.blocks)))

    def decide(
        self, layout: Layout, inputs: Inputs, damping: Tensor, old: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], dict[Block, Tensor] | None]:
        traces = self._traces(layout, inputs(layout.blocks), damping)
        places = [self.layout.blocks.index(block) for block in layout.blocks]
        of_part = old[0] if layout is self.layout else ops.take(old[0], places, axis=1)
        new = trace_rule.decide(of_part, traces, self.omega, self.stop_patience)
        [rule] = self.exchange.agreed([shares.put_back(old[0], new, places, axis=1)])
        update = rule[trace_rule.STATE.index("decision")] == trace_rule.UPDATE
        return [rule], {block: update[i] for i, block in zip(places, layout.blocks, strict=True)}

    def _traces(self, layout: Layout, inputs: Mapping[Block, Sequence[Tensor]], damping: Tensor) -> Tensor:
        """`tr F` of every block of a part of the layout."""
        found = {}
        for group in layout.groups:
            trace = group.curvature.trace(group.stacked(inputs))
            if self.trace_damping == "full":
                trace = trace + ops.cast(damping, trace.dtype) * group.blocks[0].shape[0] * group.blocks[0].shape[1]
            for block, part in group.parts(trace):
                found[block] = ops.cast(ops.sum(part), "float32")
        return ops.stack([found[block] for block in layout.blocks])

    def gates(self, gates: Tensor) -> Tensor:
        stopped = ops.convert_to_tensor(self._rule)[trace_rule.STATE.index("stopped")]
        return ops.where(stopped > 0, 0.0, gates)

    def trace_report(self) -> dict[str, dict[str, Any]]:
        """What the trace rule last found and decided.

        Returns:
            A dict from layer paths to dicts of `trace`, `change_rate` (infinite at a layer's first refresh), `decision`
            (`"update"`, `"keep"` or `"stop"`), `stopped` and `reference`. Empty before the first step.
        """
        if not self.built:
            return {}
        rows = dict(zip(trace_rule.STATE, ops.convert_to_numpy(self._rule), strict=True))
        return {
            block.layer: {
                "trace": float(rows["trace"][i]),
                "change_rate": float(rows["change_rate"][i]),
                "decision": trace_rule.DECISIONS[int(rows["decision"][i])],
                "stopped": bool(rows["stopped"][i]),
                "reference": float(rows["reference"][i]),
            }
            for i, block in enumerate(self.layout.blocks)
        }

    def get_config(self) -> Config:
        split = dict(self._splits) if callable(self.split) else self.split
        return {
            **super().get_config(),
            "split": split,
            "omega": list(self.omega),
            "trace_damping": self.trace_damping,
            "stop_patience": self.stop_patience,
        }


def _check_split(split: Any) -> Any:
    if split == "auto" or callable(split):
        return split
    if isinstance(split, dict):
        return {name: schedules.check_split(f"split[{name!r}]", size) for name, size in split.items()}
    if isinstance(split, str):
        raise ValueError(
            f"`split` must be an int, None, a dict, a function of the layer, or 'auto'. Received: {split!r}"
        )
    return schedules.check_split("split", split)


def _check_omega(omega: Any) -> tuple[float, float]:
    try:
        first, second = (float(value) for value in omega)
    except (TypeError, ValueError):
        first, second = -1.0, -1.0
    if not 0 <= second <= first < float("inf"):
        raise ValueError(
            "`omega` must be two numbers (omega1, omega2) with 0 <= omega2 <= omega1: above omega1 a layer updates, below "
            f"omega2 it stops. Received: omega={omega!r}"
        )
    return first, second
