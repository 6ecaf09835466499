"""What `capture` did, layer by layer."""

import html
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
        parameters: how many trainable numbers it has.
        captured_parameters: how many of them are in captured weight matrices; the others follow the rule of the rest.
        curvature: how the Fisher blocks of its matrices are approximated, such as `"Kronecker"`; empty where it is not captured.
        refresh_cost: about how many multiplications a refresh of its curvature takes.
    """

    layer: str
    kind: str
    shapes: tuple[Shape, ...] = ()
    bytes: int = 0
    reason: str = ""
    parameters: int = 0
    captured_parameters: int = 0
    curvature: str = ""
    refresh_cost: float = 0.0

    @property
    def captured(self) -> bool:
        return not self.reason


class CaptureReport:
    """The layers of a model and what a natural-gradient optimizer makes of them; `print` shows it as a table, as do notebooks.

    `summary` has less of it, in fewer columns; `to_markdown` is for documents.

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
    def refresh_cost(self) -> float:
        """About how many multiplications a refresh of all curvatures takes."""
        return sum(entry.refresh_cost for entry in self.layers)

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

    @property
    def parameters(self) -> int:
        """How many trainable numbers the model has."""
        return sum(entry.parameters for entry in self.layers)

    @property
    def captured_share(self) -> float:
        """The share of these that is in captured weight matrices."""
        return sum(entry.captured_parameters for entry in self.layers) / max(self.parameters, 1)

    # Tables

    def __str__(self) -> str:
        return "\n".join([_table([cells[:-1] for cells in self._cells()], right=2), *self._remarks()])

    __repr__ = __str__

    def summary(self, width: int = 79) -> str:
        """What fits a terminal: for each kind of layer how many there are, their parameters, state and cost of a refresh.

        Args:
            width: characters in a line; longer names and reasons are cut. Default 79.
        """
        groups: dict[tuple[str, str], list[LayerReport]] = {}
        for entry in self.layers:
            groups.setdefault((entry.kind, entry.curvature if entry.captured else entry.reason), []).append(entry)
        rows = [("layers", "curvature, or why not", "parameters", "bytes", "refresh")]
        for (kind, what), entries in groups.items():
            captured = entries[0].captured
            cost = sum(entry.refresh_cost for entry in entries)
            rows.append(
                (
                    f"{len(entries)} {kind}",
                    what,
                    _short(sum(entry.parameters for entry in entries)),
                    _short(sum(entry.bytes for entry in entries)) if captured else "-",
                    _short(cost) if captured else "-",
                )
            )
        rows.append((self._total(), "", _short(self.parameters), _short(self.bytes), _short(self.refresh_cost)))
        free = (
            width - max(len(row[0]) for row in rows[:-1]) - sum(max(len(row[i]) for row in rows) for i in (2, 3, 4)) - 8
        )
        rows = [(a, b if len(b) <= free else b[: max(free - 1, 0)] + "…", c, d, e) for a, b, c, d, e in rows]
        return "\n".join([_table(rows, right=3), *self._remarks()])

    def to_markdown(self) -> str:
        """All layers as a table in Markdown."""
        header, *rows, total = self._cells()
        rule = ["---", "---", "---", "---", "---:", "---:", "---:"]
        lines = [header, rule, *rows, [f"**{total[0]}**", *total[1:]]]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def _repr_html_(self) -> str:
        header, *rows, total = self._cells()

        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        remarks = "".join(f"<p>{html.escape(remark)}</p>" for remark in self._remarks())
        body = "".join(line(row, "td") for row in rows)
        return (
            f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody><tfoot>{line(total, 'th')}</tfoot></table>"
            f"{remarks}"
        )

    def _cells(self) -> list[list[str]]:
        """A header, a row for each layer, and a total."""
        cells = [["layer", "kind", "curvature", "factors, or why not captured", "parameters", "bytes", "refresh"]]
        for entry in self.layers:
            shapes = ", ".join("x".join(map(str, shape)) for shape in entry.shapes)
            sizes = [f"{entry.bytes:,}", _short(entry.refresh_cost)] if entry.captured else ["-", "-"]
            cells.append(
                [entry.layer, entry.kind, entry.curvature, shapes or entry.reason, f"{entry.parameters:,}", *sizes]
            )
        total = [f"{self.parameters:,}", f"{self.bytes:,}", _short(self.refresh_cost)]
        cells.append([self._total(), "", "", "", *total])
        return cells

    def _total(self) -> str:
        return f"{len(self.captured)} of {len(self.layers)} captured, {100 * self.captured_share:.3g}% of parameters"

    def _remarks(self) -> list[str]:
        number, source = self._losses()
        losses = f"losses per example: {'?' if number is None else format(number, '.6g')} ({source})" if source else ""
        return [*([losses] if losses else []), *self.warnings]


def _table(rows: Sequence[Sequence[str]], right: int) -> str:
    """Rows in columns, the last `right` of them flush right; rules below the first row and above the last."""
    # The last row's first cell may run on into empty ones.
    widths = [max(len(row[i]) for row in rows[:-1]) for i in range(len(rows[0]))]
    for i in range(len(widths) - right, len(widths)):
        widths[i] = max(widths[i], len(rows[-1][i]))
    left = len(widths) - right

    def line(row: Sequence[str], sizes: Sequence[int]) -> str:
        flush_left = [f"{cell:<{size}}" for cell, size in zip(row[:-right], sizes[:-right], strict=True)]
        flush_right = [f"{cell:>{size}}" for cell, size in zip(row[-right:], sizes[-right:], strict=True)]
        return "  ".join([*flush_left, *flush_right]).rstrip()

    # One cell as wide as all that it runs on into.
    first = max(sum(widths[:left]) + 2 * (left - 1), len(rows[-1][0]))
    total = line([rows[-1][0], *rows[-1][-right:]], [first, *widths[left:]])
    rule = "-" * (first + sum(widths[left:]) + 2 * right)
    return "\n".join([line(rows[0], widths), rule, *(line(row, widths) for row in rows[1:-1]), rule, total])


def _short(number: float) -> str:
    """A number in three digits, with a letter for thousands, millions and so on."""
    for letter in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{letter}"
        number /= 1000
    return f"{number:.3g}T"


def _size_warning(entry: LayerReport) -> str:
    width = max((shape[-1] for shape in entry.shapes), default=0)
    if width <= WIDE_FACTOR and entry.bytes <= LARGE_STATE:
        return ""
    return (
        f"Layer {entry.layer!r} keeps {entry.bytes / 1e6:,.0f} MB of second-order state, of factors up to {width:,} wide: a "
        "refresh of their inverses takes long. `keras_ngd.THOR(split=128)` keeps diagonal blocks alone, `SKFAC`, `SNGD` and "
        f"`HyLo` a batch's rows; or leave the layer out: `skip=[{entry.layer!r}]`."
    )
