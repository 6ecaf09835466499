"""The papers' ideas one by one: what each does for the epochs and the seconds to a target loss.

All train the digits CNN of `benchmarks.tasks`, each variant tuned over the same four learning rates with a seed of its own, then
run with fresh seeds. THOR's blocks have 16 rows and columns here, so that layers of this size have several.
"""

from benchmarks import tasks

_GROWING = {
    "module": "keras_ngd.schedules",
    "class_name": "GrowingInterval",
    "config": {"initial": 1, "growth": 1.3, "maximum": 20},
    "registered_name": "keras_ngd>GrowingInterval",
}
# Every layer renews its inverses at every refresh.
_ALWAYS = {"omega": [0, 0]}
# For each variant its optimizer, damping and arguments.
VARIANTS = {
    "KFAC, Cholesky": ("KFAC", 0.001, {"inverse": "cholesky"}),
    "KFAC, Newton-Schulz": ("KFAC", 0.001, {"inverse": "newton-schulz"}),
    "KFAC, eigen": ("KFAC", 0.001, {"inverse": "eigen"}),
    "THOR: blocks": ("THOR", 0.001, {"split": 16, **_ALWAYS}),
    "THOR: blocks, trace rule": ("THOR", 0.001, {"split": 16}),
    "THOR: blocks, growing interval": ("THOR", 0.001, {"split": 16, **_ALWAYS, "inverse_interval": _GROWING}),
    "THOR: all three": ("THOR", 0.001, {"split": 16, "inverse_interval": _GROWING}),
    **{f"HyLo, rank {rank}%": ("HyLo", 0.1, {"rank": rank / 100}) for rank in (10, 20, 40)},
    "HyLo, random switch, rank 10%": ("HyLo", 0.1, {"rank": 0.1, "mode": "random"}),
    "HyLo-KID, rank 10%": ("HyLo", 0.1, {"rank": 0.1, "mode": "kid"}),
    "HyLo-KIS, rank 10%": ("HyLo", 0.1, {"rank": 0.1, "mode": "kis"}),
}
environment, measure = tasks.environment, tasks.measure


def cases(quick):
    """One for each variant."""
    names = ("THOR: all three", "HyLo, rank 10%") if quick else VARIANTS
    found = []
    for name in names:
        optimizer, damping, arguments = VARIANTS[name]
        case = {"name": name, "task": "cnn", "optimizer": optimizer, "arguments": arguments, **tasks.TASKS["cnn"]}
        case |= {
            "intervals": [1, 1],
            # Methods that keep few rows take more than the epochs of a task to its own.
            "target": 0.05,
            "grid": {"momentum": [0.9], "learning_rate": [0.01, 0.03, 0.1, 0.3], "damping": [damping]},
            "trial_seeds": 1,
            "seeds": 5,
        }
        found.append(case | ({"epochs": 3, "grid": tasks.first_points(case["grid"]), "seeds": 2} if quick else {}))
    return found


def table(payload):
    """A Markdown table of all variants."""
    lines = tasks.header("variant")
    return "\n".join([*lines, *(tasks.row(case["name"], case, case["target"]) for case in payload["cases"])])
