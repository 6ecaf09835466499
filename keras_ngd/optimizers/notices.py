"""What an optimizer says once, after training: what went on in its steps that the user should know of."""

import warnings
from collections.abc import Iterable


class Notices:
    """Says each thing once.

    Args:
        name: of the optimizer.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._combined: set[str] = set()

    def give(self, found: Iterable[tuple[str, str]]) -> None:
        """Warns of those of the pairs `(key, message)` whose key was not seen before."""
        for key, message in found:
            if key not in self._combined:
                self._combined.add(key)
                warnings.warn(f"{self._name}: {message}", stacklevel=4)
