"""What an optimizer counts, and what there is to say about it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_ngd.typing import AddVariable, LossesPerExample, Tensor

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient

# What can have happened to statistics on their way from the probes to the optimizer.
CHANGES = ("distorted", "scaled", "accumulated", "mixed")

_ADVICE = (
    "Take the variables to clip, penalise or change from `keras_ngd.trainable_weights(model)`, and pass the gradients of the "
    "others on as they are: see 'Custom training steps' in README."
)


class Count:
    """A number that a part of an optimizer counts, as an attribute of the optimizer.

    Args:
        part: name of the optimizer's attribute that is the part; its `read(name)` gives the number.
        doc: what it is.
        initial: its value before the optimizer is built. Default 0.
    """

    def __init__(self, part: str, doc: str, initial: float = 0) -> None:
        self._part, self.__doc__, self._initial = part, doc, initial

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        part = getattr(optimizer, self._part)
        return self._initial if part is None else part.read(self._name)


class Counters:
    """Counters that are a part of an optimizer's state, all 0 at first.

    Args:
        optimizer: whose they are.
        add: its `StateLayout.add`.
    """

    def __init__(self, optimizer: "NaturalGradient", add: AddVariable) -> None:
        self._optimizer = optimizer
        self.factor_updates = add((), "zeros", "int", "factor_updates")
        self.inverse_updates = add((), "zeros", "int", "inverse_updates")
        self.skipped_statistics = add((), "zeros", "int", "skipped_statistics")
        self.skipped_steps = add((), "zeros", "int", "skipped_steps")
        # Not where no labels are drawn, as in checkpoints from before they could be.
        sampled = optimizer.fisher == "sampled"
        self.unsampled_updates = add((), "zeros", "int", "unsampled_updates") if sampled else None
        self.changes = add((len(CHANGES),), "zeros", "int", "changed_statistics")

    def count(self, name: str, happened: Tensor) -> None:
        """Adds 1 to a counter if `happened`, a scalar boolean."""
        counter = getattr(self, name)
        self._optimizer.assign_add(counter, ops.cast(happened, counter.dtype))

    def count_changes(self, happened: Mapping[str, Tensor]) -> None:
        """Counts a step for each of `CHANGES` that is True in the dict `happened`, of scalars."""
        none = ops.zeros((), "bool")
        found = ops.stack([happened.get(name, none) for name in CHANGES])
        self._optimizer.assign_add(self.changes, ops.cast(found, self.changes.dtype))

    def read(self, name: str) -> int:
        """A counter as an int, 0 where there is none; `"distorted_statistics"` is one of the changes."""
        if name == "distorted_statistics":
            return self.changed("distorted")
        counter = getattr(self, name)
        # Not `int` of the variable: a strategy's has none.
        return 0 if counter is None else int(ops.convert_to_numpy(counter))

    def changed(self, name: str) -> int:
        """How often one of `CHANGES` was counted, an int."""
        return int(ops.convert_to_numpy(self.changes)[CHANGES.index(name)])

    def notices(self, losses_per_example: LossesPerExample) -> list[tuple[str, str]]:
        """Pairs of a key and a message, of what the user should know of."""
        found, name = [], type(self._optimizer).__name__
        if unsampled := self.read("unsampled_updates"):
            found.append(
                (
                    "unsampled",
                    f"in {unsampled} of {self.read('factor_updates')} updates of the statistics the batch was a single example, "
                    "for which no label was drawn, since weights would learn from none. Its statistics are of the data's label.",
                )
            )
        counts = {change: self.changed(change) for change in CHANGES}
        if counts["mixed"]:
            found.append(
                (
                    "mixed",
                    f"in {counts['mixed']} steps the gradients of several passes were added up. {name} keeps rows of one pass, "
                    "which cannot be added to another's, so layers kept those they had. Use one pass with a larger batch, or "
                    "KFAC or THOR, whose statistics add up.",
                )
            )
        elif counts["distorted"]:
            found.append(
                (
                    "distorted",
                    f"in {counts['distorted']} updates the statistics of some layers arrived changed (by noise, or clipped one "
                    f"by one) so that they could not be told, and stayed as they were. {_ADVICE}",
                )
            )
        if counts["scaled"]:
            found.append(
                (
                    "scaled",
                    f"in {counts['scaled']} steps the statistics arrived multiplied by a factor, as if they were weights: "
                    "clipped by a norm of all gradients, or penalised. The factor was taken out of them; but the norm, or the "
                    f"penalty, had them in it. {_ADVICE}",
                )
            )
        if counts["accumulated"] and losses_per_example in ("auto", 1):
            found.append(
                (
                    "accumulated",
                    "the gradients of several passes were added up. That is right if the passes' losses were added. If each was "
                    f"divided by the number of passes, say so: {name}(..., losses_per_example=number_of_passes).",
                )
            )
        return found
