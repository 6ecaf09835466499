"""What one call of a captured layer emits in the backward pass: the new value of each weight of its statistics."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from keras import ops

from keras_ngd import backend
from keras_ngd.fisher import sampled_rows
from keras_ngd.typing import Tensor

if TYPE_CHECKING:
    from keras_ngd.statistics.statistics import Statistics

# What `Statistics.tally` counts, in its order.
TALLIED = ("calls", "accepted", "examples")

# What a call emits as `sentinel`: more than gradients are usually clipped to one by one, so that this shows, but no more than
# the length of a batch, which is in the norm of all of them too. It is a weight of its own, and not the norm of any tally: what
# divides each gradient by its own norm would else change both alike.
SENTINEL = 61.5

# What an error calls that whose shape it names.
MADE = "what its statistics make of a batch"


class Weights(NamedTuple):
    """The weights of statistics, or values of theirs, by what they are for: see `Statistics`."""

    averages: Sequence[Any]
    controls: Sequence[Any]
    gate: Any
    tally: Any
    sentinel: Any

    @classmethod
    def named(cls, values: Sequence[Any], averages: int, controls: int) -> Self:
        """The same of a list in the order of `flat`, which begins with so many averages and controls."""
        return cls(values[:averages], values[averages : averages + controls], *values[averages + controls :])

    def flat(self) -> tuple[Any, ...]:
        """All of them, the averages first."""
        return (*self.averages, *self.controls, self.gate, self.tally, self.sentinel)


def emission(
    observer: "Statistics",
    geometry: Any,
    x: Tensor,
    ds: Tensor,
    weights: Tensor | None = None,
    *,
    values: Sequence[Tensor],
    controls: int,
    spreads: Sequence[Any],
    replicas: int,
    fraction: float | None = None,
    shared: bool = False,
) -> tuple[Tensor, ...]:
    """What one call emits: the new value of each weight, of their old `values`, both in the order of `Weights.flat`.

    Of a batch some of whose labels are drawn, a `fraction`, these examples are observed as if they were all there are. What is
    `shared` is used by several layers.
    """
    before = Weights.named(values, len(spreads), controls)

    def stored(values: Sequence[Tensor]) -> list[Tensor]:
        return [value if s is None else s.stored(value) for value, s in zip(values, spreads, strict=True)]

    def recorded() -> tuple[Tensor, ...]:
        old = [
            average if s is None else s.gathered(average) for average, s in zip(before.averages, spreads, strict=True)
        ]
        # Keras divides the loss of a replica by how many there are; what is kept does not depend on that.
        upstream = ds if replicas == 1 else ds * ops.cast(replicas, ds.dtype)
        batch = (x, upstream, weights)
        seen, batch = (geometry, batch) if fraction is None else _with_drawn_labels(geometry, *batch, fraction)
        observed, total = observer.observe(seen, *batch, before.controls, old[0].dtype)
        observed = backend.on_every_device(observed)
        if spreads[0] is not None and observer.merges_together:
            observed = [spreads[0].replicated(value) for value in observed]
        finite = ops.isfinite(total)
        merged, following = observer.merge(old, observed, before.controls, finite, before.gate)
        backend.check_shapes(list(merged), [backend.static_shape(average) for average in old], MADE)
        new = [ops.where(finite, value, average) for value, average in zip(merged, old, strict=True)]
        return (*stored(new), *following, ops.cast(finite, "float32"))

    def kept() -> tuple[Tensor, ...]:
        return (*before.averages, *before.controls, ops.zeros((), "float32"))

    *new, accepted = ops.cond(before.gate > 0, backend.called(recorded) if shared else recorded, kept)
    return Weights(
        averages=new[: len(spreads)],
        controls=new[len(spreads) :],
        # Each call emits its share of the gate, so that over all calls it sums to what it was: emitting nothing would close
        # every gate after one step under an optimizer that only overwrites.
        gate=before.gate / ops.maximum(before.tally[TALLIED.index("calls")], 1.0),
        # Some are numbers known to the compiler, which then knows that nothing was done to them on their way, where nothing was.
        tally=ops.stack([1.0, accepted, ops.cast(ops.shape(x)[0], "float32")]),
        sentinel=SENTINEL * ops.ones_like(before.sentinel),
    ).flat()


def _with_drawn_labels(
    geometry: Any, x: Tensor, ds: Tensor, weights: Tensor | None, fraction: float
) -> tuple[Any, tuple[Tensor, Tensor, Tensor | None]]:
    """The examples whose labels are drawn, with gradients of a mean over these, and the geometry that presents them."""
    # What is normalized over the batch is so before it is divided.
    geometry, x, weights = geometry.divisible(x, weights)
    count, ratio = sampled_rows.observed(x, fraction)
    ds = ds[:count] * ops.cast(ratio, ds.dtype)
    return geometry, (x[:count], ds, None if weights is None else weights[:count])


def mixed(average: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """`(1 - gate) average + gate value`, for a gate of at most 1."""
    backend.check_shapes(value, backend.static_shape(average), MADE)
    mixing = ops.cast(ops.minimum(gate, 1.0), average.dtype)
    return (1 - mixing) * average + mixing * value
