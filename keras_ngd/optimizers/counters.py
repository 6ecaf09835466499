"""What an optimizer counts, and when the next updates are due."""

from keras import ops

# What can have happened to statistics on their way from the probes to the optimizer.
CHANGES = ("distorted", "scaled", "accumulated", "mixed")

_ADVICE = (
    "Take the variables to clip, penalise or change from `keras_ngd.trainable_weights(model)`, and pass the gradients of the "
    "others on as they are: see 'Custom training steps' in README."
)


class Counters:
    """Mixin: counters that are a part of the optimizer's state, and what is said about them."""

    def add_counters(self):
        """Creates them, all 0."""
        self._next_factors = self._add_state((), "zeros", "int", "next_factor_step")
        self._next_inverses = self._add_state((), "zeros", "int", "next_inverse_step")
        self._factor_updates = self._add_state((), "zeros", "int", "factor_updates")
        self._inverse_updates = self._add_state((), "zeros", "int", "inverse_updates")
        self._skipped_statistics = self._add_state((), "zeros", "int", "skipped_statistics")
        self._skipped_steps = self._add_state((), "zeros", "int", "skipped_steps")
        self._changes = self._add_state((len(CHANGES),), "zeros", "int", "changed_statistics")

    def count_changes(self, happened):
        """Counts a step for each of `CHANGES` that is True in the dict `happened`, of scalars."""
        none = ops.zeros((), "bool")
        found = ops.stack([happened.get(name, none) for name in CHANGES])
        self.assign_add(self._changes, ops.cast(found, self._changes.dtype))

    def _read(self, counter):
        # Not `int` of the variable: a strategy's has none.
        return int(ops.convert_to_numpy(getattr(self, counter))) if self.built else 0

    def _read_change(self, name):
        return int(ops.convert_to_numpy(self._changes)[CHANGES.index(name)]) if self.built else 0

    @property
    def skipped_statistics(self):
        """How many updates of the statistics were left out because some of them were not finite."""
        return self._read("_skipped_statistics")

    @property
    def distorted_statistics(self):
        """How many updates of the statistics left layers out because the training step had changed what arrived."""
        return self._read_change("distorted")

    @property
    def skipped_steps(self):
        """How many steps took a zero gradient because some gradient was not finite."""
        return self._read("_skipped_steps")

    @property
    def factor_updates(self):
        """How many batches have entered the statistics' averages."""
        return self._read("_factor_updates")

    @property
    def inverse_updates(self):
        """How often the inverses were refreshed."""
        return self._read("_inverse_updates")

    def notices(self):
        found, name = super().notices(), type(self).__name__
        counts = {change: self._read_change(change) for change in CHANGES}
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
        if counts["accumulated"] and getattr(self, "losses_per_example", 1) in ("auto", None, 1):
            found.append(
                (
                    "accumulated",
                    "the gradients of several passes were added up. That is right if the passes' losses were added. If each was "
                    f"divided by the number of passes, say so: {name}(..., losses_per_example=number_of_passes).",
                )
            )
        return found
