"""What `capture` did, layer by layer."""

from dataclasses import dataclass


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
    shapes: tuple = ()
    bytes: int = 0
    reason: str = ""

    @property
    def captured(self):
        return not self.reason


class CaptureReport:
    """The layers of a model and what a natural-gradient optimizer makes of them; `print` shows it as a table.

    Attributes:
        layers: a `LayerReport` for each layer with weights.
    """

    def __init__(self, layers):
        self.layers = tuple(layers)

    @property
    def captured(self):
        """The paths of the captured layers."""
        return [entry.layer for entry in self.layers if entry.captured]

    @property
    def not_captured(self):
        """Reasons by path, for the layers that train by the plain update rule."""
        return {entry.layer: entry.reason for entry in self.layers if not entry.captured}

    @property
    def bytes(self):
        """Size of all second-order state."""
        return sum(entry.bytes for entry in self.layers)

    def __str__(self):
        rows = [("layer", "kind", "factors, or why not captured", "bytes")]
        for entry in self.layers:
            shapes = ", ".join("x".join(map(str, shape)) for shape in entry.shapes)
            rows.append(
                (entry.layer, entry.kind, shapes or entry.reason, f"{entry.bytes:,}" if entry.captured else "-")
            )
        rows.append((f"{len(self.captured)} of {len(self.layers)} captured", "", "", f"{self.bytes:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]

        def line(row):
            return (
                f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:>{widths[3]}}".rstrip()
            )

        rule = "-" * (sum(widths) + 6)
        return "\n".join([line(rows[0]), rule, *map(line, rows[1:-1]), rule, line(rows[-1])])

    __repr__ = __str__
