"""Runs the cases of a benchmark one by one, each in a process of its own, and goes on where it was interrupted.

A benchmark is a module of this package with

    cases(quick)          the cases, dicts of what JSON can hold, each with a "name"
    measure(case)         what a case gives, a dict of what JSON can hold; runs in a process of its own
    environment(case)     variables of that process's environment
    table(payload)        Markdown of `{"cases": [{**case, **found}, ...]}`
    plot(payload, path)   optional: a PNG of the same
    python(case)          optional: the interpreter of that process; where it raises a RuntimeError, the case is left out

Every case that is done is kept in `results/partial/` until all are.
"""

import importlib
import json
import os
import subprocess
import sys

from tqdm import tqdm

from benchmarks import results

PARTIAL = results.DIRECTORY / "partial"


def module_of(name):
    """The module of a benchmark."""
    return importlib.import_module(f"benchmarks.{name}")


def measured_in_process(name, case):
    """What a case gives, from a process of its own; None, with a message, where there is no interpreter for it."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **module_of(name).environment(case)}
    try:
        python = getattr(module_of(name), "python", lambda case: sys.executable)(case)
    except RuntimeError as error:
        tqdm.write(f"{name}, {case['name']} is left out: {error}")
        return None
    command = [python, "-m", "benchmarks", f"--worker={name}", f"--case={json.dumps(case)}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}, {case['name']} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(name, quick=False, only=None):
    """Measures all cases of a benchmark that are not done yet; returns the path of the result.

    Args:
        name: of the benchmark.
        quick: whether to take its quick cases; the result is then called `quick/<name>`.
        only: names of the cases to measure anew; the result keeps the others. Default None: all.
    """
    module, title = module_of(name), f"quick/{name}" if quick else name
    cases = module.cases(quick)
    names = [case["name"] for case in cases]
    if only is not None and (unknown := set(only) - set(names)):
        raise ValueError(f"{name} has no cases {sorted(unknown)}. It has: {names}")
    kept = {}
    if only is not None and results.path_of(title).exists():
        kept = {entry["name"]: entry for entry in results.load(title)["cases"] if entry["name"] not in only}
    file = PARTIAL / f"{title}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        done = {entry["name"]: entry for entry in map(json.loads, file.read_text().splitlines())}
        # What was measured otherwise than it would be now is measured again.
        kept |= {case["name"]: done[case["name"]] for case in cases if _is_of(done.get(case["name"]), case)}
    todo = [case for case in cases if case["name"] not in kept and (only is None or case["name"] in only)]
    bar = tqdm(total=len(todo), unit="case")
    for case in todo:
        bar.set_description(f"{name}: {case['name']}")
        if (found := measured_in_process(name, case)) is not None:
            kept[case["name"]] = {**case, **found}
            with file.open("a") as out:
                out.write(json.dumps(kept[case["name"]]) + "\n")
        bar.update()
    bar.close()
    payload = {"cases": [kept[n] for n in names if n in kept]}
    path = results.save(title, payload)
    if hasattr(module, "plot"):
        try:
            module.plot(payload, path.with_suffix(".png"))
        except ModuleNotFoundError as error:
            tqdm.write(f"{name} is not plotted: {error}")
    file.unlink(missing_ok=True)
    return path


def _is_of(entry, case):
    return entry is not None and all(entry.get(key) == value for key, value in case.items())
