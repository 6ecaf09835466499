"""How long a step may be, and what becomes of it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from keras import ops

from keras_ngd import backend, schedules
from keras_ngd.optimizers.blocks import Signals
from keras_ngd.typing import AddVariable, Tensor

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient

# From which share of the steps, and from how many, the user is told that they were clipped.
INERT_SHARE, INERT_STEPS = 0.95, 100

# Divisors are kept above it.
SMALLEST_LENGTH = 1e-30

# The arguments that default to "auto".
CLIPS_BY_LOSS = ("length_clip", "loss_clip")


class Clips(NamedTuple):
    """The arguments that bound a step, each a positive float or None for none; see `Bound`."""

    length_clip: float | str | None
    loss_clip: float | str | None
    kl_clip: float | None

    def settled(self, default: Mapping[str, float]) -> "Clips":
        """These with floats for `"auto"`: `default`, a method's own bound by name, where none was chosen, else None.

        Raises:
            ValueError: naming an argument that is neither a positive float nor one of these.
        """
        autos = [
            name for name in CLIPS_BY_LOSS if isinstance(getattr(self, name), str) and getattr(self, name) == "auto"
        ]
        chosen = self.kl_clip is not None or len(autos) < len(CLIPS_BY_LOSS)
        values = self._asdict() | {name: None if chosen else default.get(name) for name in autos}
        for name, value in values.items():
            if value is not None and not (schedules.is_number(value) and 0 < value < float("inf")):
                auto = ", None or 'auto'" if name in CLIPS_BY_LOSS else " or None"
                raise ValueError(f"`{name}` must be a positive float{auto}. Received: {name}={value!r}")
        return Clips(**{name: None if value is None else float(value) for name, value in values.items()})


class Bound:
    """The bounds of a step's length, and how often they shortened one.

    With `V` a gradient, `P` the preconditioned one and `<P, V>` their product over all blocks, `learning_rate^2 <P, V>` is the
    squared length of a step in the metric that preconditions it.

        length_clip:   P <- nu P,   nu = min(1, largest_rate / learning_rate sqrt(length_clip loss / <P, V>))
        loss_clip:     P <- nu P,   nu = min(1, loss_clip loss / <P, V>)
        kl_clip:       P <- nu P,   nu = min(1, sqrt(kl_clip / (learning_rate^2 <P, V>)))    (Ba et al., 2017)

    The first bounds that squared length by `length_clip largest_rate^2 loss`, with the largest learning rate so far: the rate has
    its say, and a schedule that lowers it acts as soon as steps are shorter than the bound, which stays. The second bounds the
    decrease of the loss that a step promises, about `learning_rate <P, V>`, by a share of the loss. Under the third the learning
    rate has no say in the length of steps that are clipped.

    The first two hold for each block alone, too, at the largest learning rate, before they do for all: so they do for blocks of
    the Fisher matrix itself, and one whose curvature is far too small (such as that of an attention's keys, whose gradients add
    up to zero over the positions, from rows that are such sums) leaves the others their steps.

    Args:
        optimizer: whose steps they are: its `length_clip`, `loss_clip`, `kl_clip` and `loss_scale` are looked at.
        add: its `StateLayout.add`.
    """

    def __init__(self, optimizer: "NaturalGradient", add: AddVariable) -> None:
        self._optimizer = optimizer
        self.clipped_steps = add((), "zeros", "int", "clipped_steps")
        self.sum_of_scales = add((), "zeros", "float32", "sum_of_step_scales")
        self._largest_rate = None if optimizer.length_clip is None else add((), "zeros", "float32", "largest_rate")

    def read(self, name: str) -> float:
        """`"clipped_steps"`, an int, or `"mean_step_scale"`, the mean over all steps of `nu`, a float."""
        if name == "clipped_steps":
            return int(ops.convert_to_numpy(self.clipped_steps))
        steps = int(ops.convert_to_numpy(self._optimizer.iterations))
        return float(ops.convert_to_numpy(self.sum_of_scales)) / steps if steps else 1.0

    def notices(self) -> list[tuple[str, str]]:
        """Pairs of a key and a message, of what the user should know of."""
        clipped, steps = self.read("clipped_steps"), int(ops.convert_to_numpy(self._optimizer.iterations))
        kl_clip = self._optimizer.kl_clip
        if kl_clip is None or clipped < max(INERT_SHARE * steps, INERT_STEPS):
            return []
        return [
            (
                "clipped",
                f"`kl_clip={kl_clip:g}` shortened {clipped} of {steps} steps, to {self.read('mean_step_scale'):.2g} of their "
                "length in the mean, so that neither the learning rate nor its schedule had a say in them. Raise `kl_clip`, "
                "lower the rate, or leave `kl_clip` out: the bound by default leaves the learning rate its say.",
            )
        ]

    @property
    def is_of_blocks(self) -> bool:
        """Whether the step of each block is bounded, as `of_blocks` says."""
        return self._optimizer.loss_clip is not None or self._optimizer.length_clip is not None

    def of_blocks(self, lengths: Tensor, loss: Tensor) -> Tensor:
        """`[blocks]`, what each block's step is multiplied with before the step of all is bounded.

        Args:
            lengths: `[blocks]`, the `<P, V>` of each.
            loss: scalar, this batch's.
        """
        return self._by_loss(ops.maximum(ops.abs(lengths / self._optimizer.loss_scale**2), SMALLEST_LENGTH), loss)

    def _by_loss(self, lengths: Tensor, loss: Tensor, rates: Tensor | float = 1.0) -> Tensor:
        """`nu`, with the quotient `rates` of the largest learning rate and that of this step."""
        optimizer, nu = self._optimizer, ops.ones_like(lengths)
        loss = ops.where(ops.isfinite(loss), loss, 0.0)
        if optimizer.length_clip is not None:
            nu = ops.minimum(nu, rates * ops.sqrt(optimizer.length_clip * loss / lengths))
        if optimizer.loss_clip is not None:
            nu = ops.minimum(nu, optimizer.loss_clip * loss / lengths)
        return nu

    def _rates(self, rate: Tensor) -> Tensor | float:
        """The quotient of the largest learning rate so far, which is kept, and that of this step."""
        if self._largest_rate is None:
            return 1.0
        largest = ops.maximum(rate, ops.convert_to_tensor(self._largest_rate))
        self._optimizer.assign(self._largest_rate, largest)
        return ops.where(rate > 0, largest / ops.where(rate > 0, rate, 1.0), 1.0)

    def scale(self, length: Tensor, loss: Tensor, finite: Tensor) -> Tensor:
        """`nu`, which is counted.

        Args:
            length: scalar, the sum of `<P, V>` over all blocks, with `P` as bounded by `of_blocks`.
            loss: scalar, this batch's.
            finite: whether the step is to be taken at all.
        """
        optimizer = self._optimizer
        length = ops.maximum(ops.abs(length / optimizer.loss_scale**2), SMALLEST_LENGTH)
        rate = ops.cast(optimizer.learning_rate, "float32")
        nu = self._by_loss(length, loss, self._rates(rate))
        if optimizer.kl_clip is not None:
            nu = ops.minimum(nu, ops.sqrt(optimizer.kl_clip / ops.maximum(rate * rate * length, SMALLEST_LENGTH)))
        optimizer.assign_add(self.clipped_steps, ops.cast(finite & (nu < 1), self.clipped_steps.dtype))
        optimizer.assign_add(self.sum_of_scales, ops.where(finite, nu, 1.0))
        return nu


def bounded(
    signals: Signals,
    preconditioned: dict[int, Tensor],
    scales: dict[int, Tensor],
    others: Sequence[int],
    nu: Tensor,
    finite: Tensor,
) -> dict[int, Tensor]:
    """By position: `nu P` of all blocks, times the `scales` of some, and the gradients of the variables `others`.

    All of them are zeros unless `finite`.
    """

    def times(tensor: Tensor, factor: Tensor) -> Tensor:
        return backend.times_or_zero(tensor, ops.cast(factor, tensor.dtype))

    of_all, taken = ops.where(finite, nu, 0.0), ops.cast(finite, "float32")
    of_some = {}
    if scales:
        values = ops.where(finite, nu * ops.stack(list(scales.values())), 0.0)
        of_some = dict(zip(scales, ops.unstack(values, num=len(scales)), strict=True))
    new = {i: times(p, of_some.get(i, of_all)) for i, p in preconditioned.items()}
    for i in others:
        gradient = signals.grads[i]
        sparse = backend.is_sparse(gradient)
        new[i] = backend.sparse_zero_unless(finite, gradient) if sparse else times(gradient, taken)
    return new
