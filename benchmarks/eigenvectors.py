"""What renewing bases costs, by size: eigendecompositions, QR factorizations, steps of orthogonal iteration as they are taken.

    python -m benchmarks eigenvectors

Matrices have eigenvalues of 1 to a ten-thousandth, and the bases that are renewed are those of matrices a hundredth from them. As
many are renewed at once as a refresh takes at a time.
"""

import os
import statistics
import time

from benchmarks import results
from benchmarks.alone import alone

SIZES = (128, 512, 1024, 2048)
BACKENDS = ("tensorflow", "jax")
KINDS = ("eigh", "qr", "iteration", "check")
# One after the other: linear algebra starts threads of its own.
AT_ONCE = 1


def cases(quick):
    """One for each backend and size."""
    sizes, rounds = ((64,), 2) if quick else (SIZES, 9)
    return [
        {
            "name": f"{size}-{backend}",
            "size": size,
            "backend": backend,
            "rounds": rounds if size < 2048 else min(rounds, 5),
        }
        for backend in BACKENDS
        for size in sizes
    ]


def environment(case):
    """The backend, and memory that is kept."""
    return {"KERAS_BACKEND": case["backend"], **results.KEEP_MEMORY}


def drawn(count, size):
    """Matrices `[count, size, size]`, and the eigenvectors of others near them."""
    import numpy as np

    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0]
    change = rng.normal(size=(size, size)) / size**0.5
    matrix = (turn * np.logspace(0, -4, size)) @ turn.T
    _, near = np.linalg.eigh(matrix + 5e-3 * (change + change.T))
    return tuple(np.tile(t.astype("float32"), (count, 1, 1)) for t in (matrix, near[:, ::-1]))


def functions():
    """By kind, of matrices, bases and `Q^T F Q`."""
    from keras import ops

    from keras_ngd import backend
    from keras_ngd.linalg import orthogonal_iteration

    def qr(matrices, bases, seen):
        product = backend.matmul(matrices, bases)
        order = ops.argsort(-ops.sum(bases * product, axis=1), axis=1)
        return ops.qr(ops.take_along_axis(product, ops.expand_dims(order, 1), axis=2))[0]

    return {
        "eigh": lambda matrices, bases, seen: orthogonal_iteration.eigenvectors(matrices),
        "qr": qr,
        "iteration": lambda matrices, bases, seen: orthogonal_iteration.iterated(seen, bases),
        "check": lambda matrices, bases, seen: orthogonal_iteration.rotated(matrices, bases),
    }


def measure(case):
    """Medians in milliseconds for one matrix, turn by turn, and how busy the machine was."""
    from keras import ops

    from keras_ngd import backend
    from keras_ngd.linalg import batching, orthogonal_iteration

    count = batching.at_once(case["size"])
    matrices, bases = (ops.convert_to_tensor(t) for t in drawn(count, case["size"]))
    given = (matrices, bases, orthogonal_iteration.rotated(matrices, bases))
    compiled = {kind: backend.traced_once(function) for kind, function in functions().items()}
    times = {kind: [] for kind in compiled}
    with alone():
        before = os.getloadavg()[0]
        for turn in range(case["rounds"] + 1):
            for kind, function in compiled.items():
                start = time.perf_counter()
                ops.convert_to_numpy(function(*given)[:, :1, :1])
                if turn:
                    times[kind].append((time.perf_counter() - start) * 1e3 / count)
        load = [before, os.getloadavg()[0]]
    found = {kind: {"median": statistics.median(v), "spread": [min(v), max(v)]} for kind, v in times.items()}
    return {"count": count, "milliseconds": found, "load": load}


def shares(case):
    """Of an eigendecomposition what a step takes, and what one takes with the product that decides whether it is due, of both."""
    ms = {kind: found["median"] for kind, found in case["milliseconds"].items()}
    return ms["iteration"] / ms["eigh"], (ms["iteration"] + ms["check"]) / (ms["eigh"] + ms["check"])


def table(payload):
    """A Markdown table."""
    lines = [
        "| backend | rows | at once | eigendecomposition, ms a matrix | QR factorization of the product | a step | `Q^T F Q`, "
        "which says whether it is due | step / eigendecomposition | both with `Q^T F Q` | load |",
        "|---" * 10 + "|",
    ]
    for case in payload["cases"]:
        ms = [f"{case['milliseconds'][kind]['median']:.1f}" for kind in KINDS]
        share = [f"{value:.2f}" for value in shares(case)]
        load = f"{max(case['load']):.0f}"
        lines.append(f"| {' | '.join([case['backend'], str(case['size']), str(case['count']), *ms, *share, load])} |")
    return "\n".join(lines)


def goals(payload):
    """What is asked of steps at 512 and 2,048 rows, and what they take."""
    for case in payload["cases"]:
        if case["size"] in (512, 2048):
            share, _ = shares(case)
            name = f"a step of orthogonal iteration, {case['size']} rows, {case['backend']}"
            yield name, "<= 0.33 of an eigendecomposition", f"{share:.2f}", share <= 1 / 3, ""
