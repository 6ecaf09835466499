"""Runs the cases of a benchmark, each in a process of its own, two at once, and goes on where it was interrupted.

A benchmark is a module of this package with

    cases(quick)          the cases, dicts of what JSON can hold, each with a "name"; one with a true "by_name" is measured only
                          where it is named
    measure(case)         what a case gives, a dict of what JSON can hold; what it times stands in `alone.alone()`
    environment(case)     variables of that process's environment
    table(payload)        Markdown of `{"cases": [{**case, **found}, ...]}`
    plot(payload, path)   optional: a PNG of the same
    python(case)          optional: the interpreter of that process; where it raises a RuntimeError, the case is left out
    AT_ONCE               optional: how many cases run at once, in place of two
    merged(before, case)  optional: a measured case of some "optimizers" with what it had of others
    timings(cases)        optional: cases whose "epoch_seconds" are those of measured cases, by their names

Every case that is done is kept in `results/partial/` until all are.
"""

import concurrent.futures
import fnmatch
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

from tqdm import tqdm

from benchmarks import alone, results

# What runs without being named, and what runs where it is.
USUAL = ("costs", "tasks", "ablations", "peers")
NAMED = ("fisher", "fisher_cost", "defaults", "robustness", "startup", "stagger", "kinds", "eigenvectors", "gpu")
PARTIAL = results.DIRECTORY / "partial"
AT_ONCE = 2


def module_of(name):
    """The module of a benchmark."""
    return importlib.import_module(f"benchmarks.{name}")


def measured_in_process(name, case, running):
    """What a case gives, from a process of its own; None, with a message, where there is no interpreter for it.

    Args:
        name: of the benchmark.
        case: to measure.
        running: a set that the process is in while it runs.
    """
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **module_of(name).environment(case)}
    try:
        python = getattr(module_of(name), "python", lambda case: sys.executable)(case)
    except RuntimeError as error:
        tqdm.write(f"{name}, {case['name']} is left out: {error}")
        return None
    command = [python, "-m", "benchmarks", f"--worker={name}", f"--case={json.dumps(case)}"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    running.add(process)
    out, errors = process.communicate()
    running.discard(process)
    # It may have ended before it could say that it does not need the machine for itself any more.
    alone.send([other.pid for other in list(running)], signal.SIGCONT)
    if process.returncode:
        raise RuntimeError(f"{name}, {case['name']} failed:\n{errors[-3000:]}")
    return json.loads(out.splitlines()[-1])


def found_of(name, cases):
    """Yields each case with what it gives, as they are done; ends all processes if one fails or this is interrupted."""
    running = set()
    at_once = getattr(module_of(name), "AT_ONCE", AT_ONCE)
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        os.environ[alone.VARIABLE] = folder
        todo = {pool.submit(measured_in_process, name, case, running): case for case in cases}
        try:
            for done in concurrent.futures.as_completed(todo):
                yield todo[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.kill()
            del os.environ[alone.VARIABLE]


def run(name, quick=False, only=None, optimizers=None):
    """Measures all cases of a benchmark that are not done yet; returns the path of the result.

    The result has "minutes", what all cases but those that have to be named took when they were last measured in one run; None
    where they never were.

    Args:
        name: of the benchmark.
        quick: whether to take its quick cases; the result is then called `quick/<name>`.
        only: names of the cases to measure anew, or patterns of names (`"text-*"`); the result keeps the others. Default
            None: all but those that have to be named, which it keeps.
        optimizers: of cases of several "optimizers" those to measure anew; the result keeps what it has of the others. Default
            None: all.

    Raises:
        ValueError: for cases or optimizers that there are not.
    """
    module, title = module_of(name), f"quick/{name}" if quick else name
    cases = module.cases(quick)
    if optimizers is not None:
        if not hasattr(module, "merged") or not set(optimizers) <= set(cases[0]["optimizers"]):
            raise ValueError(f"{name} has no cases of the optimizers {optimizers}.")
        cases = [{**case, "optimizers": [o for o in case["optimizers"] if o in optimizers]} for case in cases]
    names = [case["name"] for case in cases]
    usual = [case["name"] for case in cases if not case.get("by_name")]
    chosen = usual if only is None else [n for n in names if any(fnmatch.fnmatchcase(n, one) for one in only)]
    if only is not None and (unknown := [one for one in only if not fnmatch.filter(names, one)]):
        raise ValueError(f"{name} has no cases {sorted(unknown)}. It has: {names}")
    kept, older, minutes, start = {}, {}, None, time.monotonic()
    if results.path_of(title).exists():
        before = results.load(title)
        older = {entry["name"]: entry for entry in before["cases"]}
        kept = {name: entry for name, entry in older.items() if name not in chosen}
        minutes = before.get("minutes") if only is not None else None
    file = PARTIAL / f"{title}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        done = {entry["name"]: entry for entry in map(json.loads, file.read_text().splitlines())}
        # What was measured otherwise than it would be now is measured again.
        kept |= {case["name"]: done[case["name"]] for case in cases if _is_of(done.get(case["name"]), case)}
    todo = [case for case in cases if case["name"] in chosen and case["name"] not in kept]
    bar = tqdm(total=len(todo), unit="case", desc=name)
    for case, found in found_of(name, todo):
        if found is not None:
            kept[case["name"]] = {**case, **found}
            with file.open("a") as out:
                out.write(json.dumps(kept[case["name"]]) + "\n")
        bar.update()
        bar.set_postfix_str(case["name"])
    bar.close()
    if optimizers is not None:
        kept |= {n: module.merged(older[n], kept[n]) for n in chosen if n in older and n in kept}
    elif [case["name"] for case in todo] == usual:
        minutes = (time.monotonic() - start) / 60
    path = results.save(title, {"minutes": minutes, "cases": [kept[n] for n in names if n in kept]})
    file.unlink(missing_ok=True)
    plot(name, title)
    return path


def time_again(name, only=None):
    """Measures the seconds of cases that are measured, beside each other, and puts them into the result; returns its path.

    What is done stays if this is interrupted.

    Args:
        name: of the benchmark.
        only: as for `run`; cases that are compared are measured together, so all of them should be named. Default None: all.

    Raises:
        ValueError: if nothing of that is measured, or the benchmark has no such seconds.
    """
    module = module_of(name)
    if not hasattr(module, "timings"):
        raise ValueError(f"{name} has no seconds that could be measured again.")
    cases = results.load(name)["cases"] if results.path_of(name).exists() else []
    chosen = [case for case in cases if only is None or any(fnmatch.fnmatchcase(case["name"], one) for one in only)]
    if not chosen:
        raise ValueError(f"{name} has no measured cases {only or ''}. It has: {[case['name'] for case in cases]}")
    todo = module.timings(chosen)
    bar = tqdm(total=len(todo), unit="case", desc=f"{name}, seconds")
    for case, found in found_of(name, todo):
        payload = results.load(name)
        for entry in payload["cases"]:
            if entry["name"] in found["epoch_seconds"]:
                entry["epoch_seconds"] = found["epoch_seconds"][entry["name"]]
        results.save(name, {key: value for key, value in payload.items() if key != "environment"})
        bar.update()
        bar.set_postfix_str(case["name"])
    bar.close()
    plot(name, name)
    return results.path_of(name)


def plot(name, title):
    """Draws a benchmark's result again, where it has a plot."""
    if hasattr(module_of(name), "plot"):
        try:
            module_of(name).plot(results.load(title), results.path_of(title).with_suffix(".png"))
        except ModuleNotFoundError as error:
            tqdm.write(f"{name} is not plotted: {error}")


def _is_of(entry, case):
    return entry is not None and all(entry.get(key) == value for key, value in case.items())
