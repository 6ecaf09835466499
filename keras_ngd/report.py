"""What `capture` did, layer by layer."""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from keras_ngd.typing import Shape

# What a layer of a method with whole factors is warned of: a factor 4,096 wide takes 64 MiB and its inverse as much, and a
# refresh of it on two cores of a CPU takes seconds.
WIDE_FACTOR = 4096
LARGE_STATE = 64 * 2**20


@dataclass(frozen=True)
class LayerReport:
    """One layer with weights.

    Attributes:
        layer: the layer's path.
        kind: its Keras class.
        shapes: shapes of what is averaged for it; empty where it is not captured.
        bytes: size of all second-order state: averages, the curvature's state, and what else a method keeps of the layer.
        reason: why it is not captured; empty where it is.
    """

    layer: str
    kind: str
    shapes: tuple[Shape, ...] = ()
    bytes: int = 0
    reason: str = ""

    @property
    def captured(self) -> bool:
        return not self.reason


class CaptureReport:
    """The layers of a model and what a natural-gradient optimizer makes of them; `print` shows it as a table.

    Args:
        layers: a `LayerReport` for each layer with weights.
        optimizer: the optimizer, or None where it captured nothing. It is held weakly.

    Attributes:
        warnings: what is said of layers with a factor wider than `WIDE_FACTOR` or with more state than `LARGE_STATE` bytes, where
            the method keeps whole factors.
    """

    def __init__(self, layers: Iterable[LayerReport], optimizer: Any = None) -> None:
        self.layers = tuple(layers)
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        whole = optimizer is not None and optimizer.whole_factors
        self.warnings = tuple(filter(None, map(_size_warning, self.layers))) if whole else ()

    @property
    def captured(self) -> list[str]:
        """The paths of the captured layers."""
        return [entry.layer for entry in self.layers if entry.captured]

    @property
    def not_captured(self) -> dict[str, str]:
        """Reasons by path, for the layers that train by the plain update rule."""
        return {entry.layer: entry.reason for entry in self.layers if not entry.captured}

    @property
    def bytes(self) -> int:
        """Size of all second-order state."""
        return sum(entry.bytes for entry in self.layers)

    @property
    def losses_per_example(self) -> float | None:
        """How many loss values an example has: as it was given, or as it was read from the compiled loss; None before a step."""
        return self._losses()[0]

    def _losses(self) -> tuple[float | None, str]:
        """That, and where it is from."""
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None:
            return None, ""
        if optimizer.losses_per_example != "auto":
            return optimizer.losses_per_example, "as given"
        if not optimizer.factor_updates:
            return None, "to be read from the compiled loss"
        heard = optimizer.ratio.heard_losses
        return optimizer.loss_ratio, "from the compiled loss" if heard else "there is no compiled loss"

    def __str__(self) -> str:
        rows = [("layer", "kind", "factors, or why not captured", "bytes")]
        for entry in self.layers:
            shapes = ", ".join("x".join(map(str, shape)) for shape in entry.shapes)
            rows.append(
                (entry.layer, entry.kind, shapes or entry.reason, f"{entry.bytes:,}" if entry.captured else "-")
            )
        rows.append((f"{len(self.captured)} of {len(self.layers)} captured", "", "", f"{self.bytes:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]

        def line(row: Sequence[str]) -> str:
            return (
                f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:>{widths[3]}}".rstrip()
            )

        rule = "-" * (sum(widths) + 6)
        number, source = self._losses()
        losses = (
            [f"losses per example: {'?' if number is None else format(number, '.6g')} ({source})"] if source else []
        )
        return "\n".join([line(rows[0]), rule, *map(line, rows[1:-1]), rule, line(rows[-1]), *losses, *self.warnings])

    __repr__ = __str__


def _size_warning(entry: LayerReport) -> str:
    width = max((shape[-1] for shape in entry.shapes), default=0)
    if width <= WIDE_FACTOR and entry.bytes <= LARGE_STATE:
        return ""
    return (
        f"Layer {entry.layer!r} keeps {entry.bytes / 1e6:,.0f} MB of second-order state, of factors up to {width:,} wide: a "
        "refresh of their inverses takes long. `keras_ngd.THOR(split=128)` keeps diagonal blocks alone, `SKFAC`, `SNGD` and "
        f"`HyLo` a batch's rows; or leave the layer out: `skip=[{entry.layer!r}]`."
    )
