"""Makes `docs/benchmarks.md` of the results that are there."""

import pathlib

from benchmarks import harness, results

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "benchmarks.md"
SECTIONS = {
    "costs": (
        "Step cost",
        "What a step costs in steps of SGD with momentum, on the same network, backend and batch, all in one run, turn by turn. "
        "`(f,i)` are the steps between updates of the statistics and between refreshes of the inverses; a cost is the average "
        "over a whole cycle. SKFAC, SNGD and HyLo have one interval, the second. THOR renews all layers at every refresh here; "
        "`captured` is SGD on a model captured for KFAC that never records.",
    ),
    "tasks": (
        "Convergence",
        "Epochs and seconds to a target loss on the digits, each optimizer tuned on a grid of 16 trials with a seed of its own, "
        "then run with five fresh seeds. The loss is that of the whole training set after each epoch; seconds are of training "
        "alone, after compiling, an epoch in one `steps_per_execution` on JAX.",
    ),
    "ablations": (
        "The papers' ideas one by one",
        "The digits CNN with each variant, tuned over four learning rates, then run with five fresh seeds; otherwise as above. "
        "THOR's blocks have 16 rows and columns here; without its trace rule all layers renew their inverses at every refresh.",
    ),
    "peers": (
        "Beside kfac-jax",
        "KFAC of this package and of kfac-jax 0.0.8 on the same Keras model, data, batch and jax, in one run, turn by turn, in "
        "an environment of their own (`.venv-peers`, made by the benchmark). Of kfac-jax its `Optimizer` is used, with its "
        "automatic registration of layers and without its adaptive damping and rates.",
    ),
    "gpu": (
        "On a GPU",
        "As step costs above, with JAX on a GPU (`benchmarks/on_gpu.sh` on a machine without a network).",
    ),
}


def section(name):
    """A benchmark's part of the page."""
    title, text = SECTIONS[name]
    path = results.path_of(name)
    parts = [f"## {title}", text, f"`python -m benchmarks {name}`"]
    if not path.exists():
        return "\n\n".join([*parts, "Not measured."])
    payload = results.load(name)
    parts.append(harness.module_of(name).table(payload))
    if path.with_suffix(".png").exists():
        parts.append(f"![{title}](../benchmarks/results/{name}.png)")
    return "\n\n".join([*parts, results.source(name, payload)])


def write():
    """Writes the page."""
    head = "# Benchmarks\n\nMade by `python -m benchmarks` (`--render` makes the page alone). Nothing here is typed."
    PAGE.write_text("\n\n".join([head, *map(section, SECTIONS)]) + "\n")
