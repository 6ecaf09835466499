"""What an optimizer says once, after training: what went on in its steps that the user should know of."""

import sys
import warnings


class Notices:
    """Mixin: collects what its classes have to say, and says each thing once.

    Keras's trainers call `finalize_variable_values` on the host when a `fit` ends. Classes say something by overriding
    `notices`, which adds to what `super().notices()` returns.
    """

    _given_notices = frozenset()

    def notices(self):
        """A list of pairs `(key, message)` of what there is to say now; a key is said once."""
        return []

    def give_notices(self):
        """Warns of what was not said before. `fit` calls it when it ends; a loop of your own may, at any time."""
        if not self.built:
            return
        for key, message in self.notices():
            if key not in self._given_notices:
                self._given_notices = self._given_notices | {key}
                warnings.warn(f"{self.name}: {message}", stacklevel=3)

    def finalize_variable_values(self, var_list):
        super().finalize_variable_values(var_list)
        # On JAX Keras calls this on the way of an error, too, when variables have no values; the error is what is to be seen.
        if sys.exc_info()[0] is None:
            self.give_notices()
