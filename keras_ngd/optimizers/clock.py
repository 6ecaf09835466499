"""When statistics are recorded and inverses refreshed."""

from keras import ops

from keras_ngd import schedules


class Clock:
    """The steps at which the next batch enters the statistics, and the next refresh of the inverses is due.

    Args:
        optimizer: whose they are: its `factor_interval`, `inverse_interval` and `interval_growth` are looked at in every step.
        add: its `StateLayout.add`.
        refreshes_what_was_recorded: whether inverses are made of each batch that was recorded, and of no other.
    """

    def __init__(self, optimizer, add, refreshes_what_was_recorded=False):
        self._optimizer, self._tied = optimizer, refreshes_what_was_recorded
        self.next_factors = add((), "zeros", "int", "next_factor_step")
        self.next_inverses = add((), "zeros", "int", "next_inverse_step")

    def records_next(self, step):
        """Whether the batch after that of `step` is to enter the statistics."""
        return step + 1 >= ops.convert_to_tensor(self.next_factors)

    def recorded(self, step, done):
        """Told whether the batch of `step` has entered the statistics, or is not to be tried again at once."""
        self._set("next_factors", self._optimizer.factor_interval, step, done)

    def refresh_due(self, step, recorded, known):
        """Whether inverses are to be refreshed at `step`.

        Args:
            step: scalar.
            recorded: whether this step has recorded statistics.
            known: whether any step ever has.
        """
        return recorded if self._tied else known & (step >= ops.convert_to_tensor(self.next_inverses))

    def refreshed(self, step, due):
        """Told whether inverses were refreshed at `step`."""
        self._set("next_inverses", self._optimizer.inverse_interval, step, due)

    def refresh_at_once(self):
        """Has the inverses refreshed at the next step."""
        self.next_inverses.assign(0)

    def _set(self, name, interval, step, done):
        variable = getattr(self, name)
        following = step + schedules.interval_at(interval, step, self._optimizer.interval_growth)
        self._optimizer.assign(variable, ops.where(done, following, ops.convert_to_tensor(variable)))
