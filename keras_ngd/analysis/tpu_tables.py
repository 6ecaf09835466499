"""Tables of steps compiled for TPUs."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_ngd.analysis.tpu_steps import TpuReport


def number(value):
    """A number with four digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _size(count):
    return number(count / 2**20)


def _flops(count):
    return number(count / 1e9)


# Of a row: what heads the column, and its cell of a step and the plain one.
_COLUMNS = {
    "GFLOP of products, every step": lambda step, plain: _beside(step, plain, "product_flops", _flops),
    "on updates": lambda step, plain: _flops(step.update_product_flops),
    "MiB accessed": lambda step, plain: _beside(step, plain, "bytes_accessed", _size),
    "MiB of arguments": lambda step, plain: _beside(step, plain, "argument_bytes", _size),
    "of temporaries": lambda step, plain: _beside(step, plain, "temporary_bytes", _size),
    "of collectives, every step": lambda step, plain: _size(step.collective_bytes),
    "on updates ": lambda step, plain: _size(step.update_collective_bytes),
    "conditionals, loops": lambda step, plain: f"{step.conditionals}, {step.loops}",
    "waiting for the host": lambda step, plain: str(sum(step.host.values())),
    "s to compile": lambda step, plain: f"{step.seconds:.0f}",
}


def _beside(step, plain, name, unit):
    value, of_plain = getattr(step, name), getattr(plain, name)
    return unit(value) if step is plain else f"{unit(value)} ({value / of_plain:.2f}x)"


def tpu_table(reports: "Iterable[TpuReport]") -> str:
    """A Markdown table of `TpuReport`s: a row for each, after one for SGD on the same model, topology and batch.

    Numbers are of one chip; in brackets, in those of SGD.
    """
    lines = ["| model | chips | batch | optimizer | " + " | ".join(map(str.strip, _COLUMNS)) + " |"]
    lines.append("|---" * (4 + len(_COLUMNS)) + "|")
    seen = set()
    for report in reports:
        case = (report.model, f"{report.topology} ({report.chips})", str(report.batch_per_chip * report.chips))
        steps = [report.step] if case in seen else [report.plain, report.step]
        seen.add(case)
        for step in steps:
            cells = [cell(step, report.plain) for cell in _COLUMNS.values()]
            lines.append(f"| {' | '.join([*case, step.optimizer, *cells])} |")
    return "\n".join(lines)
