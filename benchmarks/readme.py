"""Puts the tables of the results into README.md and docs/, between their markers: `python -m benchmarks.readme`."""

import pathlib
import re

from benchmarks import (
    communication,
    convergence,
    replicas,
    results,
    row_convergence,
    row_cost,
    step_cost,
    thor_convergence,
    tpu,
    update_cost,
)

ROOT = pathlib.Path(__file__).parent.parent


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


SECTIONS = {
    "step-cost": ("step_cost", lambda payload: step_cost.table(payload["results"])),
    "step-cost-thor": ("step_cost_thor", lambda payload: step_cost.table(payload["results"])),
    "step-cost-rows": ("step_cost_rows", lambda payload: step_cost.table(payload["results"])),
    "update-cost": ("update_cost", update_cost.table),
    "row-cost": ("row_cost", row_cost.table),
    "communication": ("communication", communication.table),
    "replicas": ("replicas", replicas.table),
    "convergence": ("convergence", convergence.table),
    "thor-convergence": ("thor_convergence", thor_convergence.table),
    "row-convergence": ("row_convergence", row_convergence.table),
}
TPU_SECTIONS = {
    "tpu": ("tpu", tpu.table),
    "tpu-inverses": ("tpu", lambda payload: tpu.refresh_table(payload["inverses"])),
}
PAGES = {"README.md": SECTIONS, "docs/tpu.md": TPU_SECTIONS}


def main():
    for page, sections in PAGES.items():
        text = (ROOT / page).read_text()
        for marker, (name, render) in sections.items():
            measured = (results.DIRECTORY / f"{name}.json").exists()
            text = insert(text, marker, section(name, render) if measured else "Not measured yet.")
        (ROOT / page).write_text(text)


if __name__ == "__main__":
    main()
