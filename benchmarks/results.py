"""Where benchmark results go, and what they must say about where they came from."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re

DIRECTORY = pathlib.Path(__file__).parent / "results"
PACKAGES = ("keras", "tensorflow", "tensorflow-cpu", "jax", "jaxlib", "libtpu", "numpy", "scikit-learn")

# Set where times are taken, for all that is compared: glibc keeps freed memory, so that page faults do not add to times
# at random.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}

# The threads of the LAPACK that JAX factorizes matrices with on a CPU. They wait for each other without giving way: beside four
# busy processes on two cores QR factorizations of two matrices of 257 rows took 1.7 s on two threads, and 2 to 10 ms on one. A
# result says how many there were, if that was set.
THREADS = "OPENBLAS_NUM_THREADS"


def _processor():
    """`platform.processor()` is empty or a bare architecture on Linux."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment():
    """The machine and the versions a result holds for."""
    versions = {package: _version(package) for package in PACKAGES}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {package: version for package, version in versions.items() if version},
        **({THREADS: os.environ[THREADS]} if THREADS in os.environ else {}),
    }


def path_of(name):
    """The file of a result."""
    return DIRECTORY / f"{name}.json"


def save(name, payload):
    """Writes `payload` and the environment to `results/<name>.json`; returns the path."""
    path = path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), **payload}, indent=1)
    # A list of numbers on one line: curves are long.
    text = re.sub(r"\[([^\[\]{}]*)\]", lambda match: "[" + " ".join(match[1].split()) + "]", text)
    path.write_text(text + "\n")
    return path


def load(name):
    """What `save` wrote."""
    return json.loads(path_of(name).read_text())


def source(name, payload):
    """One line on where a result is, and where and with what it was measured."""
    environment = payload["environment"]
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    machine = f"{environment['processor']}, {environment['cores']} cores, {environment['date']}; {versions}."
    if THREADS in environment:
        machine += f" {THREADS}={environment[THREADS]}."
    return f"From `benchmarks/results/{name}.json`: {machine}"
