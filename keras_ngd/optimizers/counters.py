"""What an optimizer counts, and when the next updates are due."""

from keras import ops


class Counters:
    """Mixin: counters that are a part of the optimizer's state."""

    def add_counters(self):
        """Creates them, all 0."""
        self._next_factors = self._add_state((), "zeros", "int", "next_factor_step")
        self._next_inverses = self._add_state((), "zeros", "int", "next_inverse_step")
        self._factor_updates = self._add_state((), "zeros", "int", "factor_updates")
        self._inverse_updates = self._add_state((), "zeros", "int", "inverse_updates")
        self._skipped_statistics = self._add_state((), "zeros", "int", "skipped_statistics")
        self._skipped_steps = self._add_state((), "zeros", "int", "skipped_steps")

    def _read(self, counter):
        # Not `int` of the variable: a strategy's has none.
        return int(ops.convert_to_numpy(getattr(self, counter))) if self.built else 0

    @property
    def skipped_statistics(self):
        """How many updates of the statistics were left out because some of them were not finite."""
        return self._read("_skipped_statistics")

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
