"""Puts the tables of the results into README.md and docs/, between their markers: `python -m benchmarks.readme`."""

import pathlib
import re

from benchmarks import costs, defaults, results, tasks, tpu
from benchmarks.methods import METHODS

ROOT = pathlib.Path(__file__).parent.parent


def costs_table(payload):
    """Steps of all methods at the longest intervals, by network."""
    measured = {method for case in payload["cases"] for method in case["methods"]} - {"adam", "muon"}
    found = {method: costs.BESIDE.get(method, "sgd") for method in METHODS if method in measured}
    names = [method if of == "sgd" else f"{method} (of Adam's)" for method, of in found.items()]
    lines = [f"| network, backend | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for case in payload["cases"]:
        ratios = [
            f"{costs.ratio(case, method, beside=of):.2f}x" if method in case["milliseconds"] else "-"
            for method, of in found.items()
        ]
        lines.append(f"| {case['network']}, {case['mode']} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def tasks_table(payload):
    """The least epochs and seconds of first and of second order, by task."""
    columns = ["task", *(f"{unit} of {kind} order" for unit in ("epochs", "seconds") for kind in ("first", "second"))]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    cases = tasks.by_task(payload["cases"])
    for task, target in tasks.targets(payload).items():
        if not (compared := tasks.comparison(cases[task], target)):
            continue
        cells = [f"{tasks.count(number)} ({name})" for unit in ("epochs", "seconds") for name, number in compared[unit]]
        lines.append(f"| {task}, to a loss of {target:.3g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def defaults_table(payload):
    """In how many problems each method ends below Adam's loss, above SGD's, and not finite, all at defaults."""
    names = defaults.measured(payload, defaults.SECOND_ORDER)
    lines = ["| at defaults | loss below Adam's | above SGD's | not finite | median of Adam's loss |", "|---" * 5 + "|"]
    for name in names:
        cases = [case for case in payload["cases"] if name in case["found"]]
        count = len(cases)
        behind = sum(defaults.behind_adam(case, name) for case in cases)
        above = sum(defaults.worse_than_sgd(case, name) for case in cases)
        lost = sum(case["found"][name]["loss"] is None for case in cases)
        share = f"{defaults.median_share(cases, name):.2g}"
        lines.append(f"| {name} | {count - behind} of {count} | {above} | {lost} | {share} |")
    return "\n".join(lines)


def section(name, render):
    """The table of a result with its source and machine."""
    payload = results.load(name)
    return f"{render(payload)}\n\n{results.source(name, payload)}"


def insert(text, marker, content):
    """`text` with what stands between `<!-- marker -->` and `<!-- /marker -->` replaced."""
    pattern = re.compile(f"(<!-- {marker} -->).*?(<!-- /{marker} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"The page has no markers <!-- {marker} --> ... <!-- /{marker} -->.")
    return pattern.sub(lambda match: f"{match[1]}\n{content}\n{match[2]}", text)


SECTIONS = {"defaults": ("defaults", defaults_table), "costs": ("costs", costs_table), "tasks": ("tasks", tasks_table)}
TPU_SECTIONS = {
    "tpu": ("tpu", tpu.table),
    "tpu-inverses": ("tpu", lambda payload: tpu.refresh_table(payload["inverses"])),
    "tpu-bases": ("tpu", lambda payload: tpu.refresh_table(payload.get("bases", []), "new bases")),
}
PAGES = {"README.md": SECTIONS, "docs/tpu.md": TPU_SECTIONS}


def main():
    for page, sections in PAGES.items():
        text = (ROOT / page).read_text()
        for marker, (name, render) in sections.items():
            measured = results.path_of(name).exists()
            text = insert(text, marker, section(name, render) if measured else "Not measured yet.")
        (ROOT / page).write_text(text)


if __name__ == "__main__":
    main()
