"""SGD, Adam, KFAC, SKFAC and HyLo on the embedded images and masks: test score by epoch and by second.

Runs `examples/fashion_3c1f.py` and `examples/unet_segmentation.py` with their defaults, once for each seed and method, in
turn.

    python -m benchmarks.row_convergence
    python -m benchmarks.row_convergence --examples=fashion_3c1f --seeds=1
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from absl import app, flags

from benchmarks import results
from benchmarks.thor_convergence import draw, reached, spread

FOLDER = pathlib.Path(__file__).parent.parent / "examples"
METHODS = ("sgd", "adam", "kfac", "skfac", "hylo")
# What is tested, and what it is called.
SCORES = {
    "fashion_3c1f": ("val_accuracy", "test accuracy"),
    "unet_segmentation": ("val_dice", "test Dice score"),
}

FLAGS = flags.FLAGS
# Not when imported for its table: other benchmarks' flags have the same names.
if __name__ == "__main__":
    flags.DEFINE_list("examples", list(SCORES), "Examples to run.")
    flags.DEFINE_list("seeds", ["1", "2", "3"], "Seeds of weights and of the order of examples.")
    flags.DEFINE_list("methods", list(METHODS), "Methods to compare.")
    flags.DEFINE_list("arguments", [], "Arguments for the examples, such as --epochs=6.")
    flags.DEFINE_string("result", "row_convergence", "Name of the result.")


def train(example, method, seed, arguments):
    """One run's figures by epoch."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "history.json"
        command = [sys.executable, str(FOLDER / f"{example}.py"), f"--method={method}", f"--seed={seed}"]
        command += [f"--history={file}", "--output=", *arguments]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **results.KEEP_MEMORY}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{example}, {method}, seed {seed} failed:\n{done.stderr[-3000:]}")
        run = json.loads(file.read_text())[method]
    keep = ("loss", SCORES[example][0], "seconds")
    return {"method": method, "seed": seed, "first": run["first"], **{key: run[key] for key in keep}}


def target(example, runs):
    """The lowest of KFAC's best scores, one for each seed: what it can be counted on to reach."""
    metric = SCORES[example][0]
    return min((max(run[metric]) for run in runs if run["method"] == "kfac"), default=float("nan"))


def table(payload):
    """A Markdown table, means over seeds with standard deviations."""
    header = ["example", "method", "epochs to target", "seconds to it", "seeds that reach it", "s per epoch"]
    header += ["final score", "best score", "final loss"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for example, found in payload["examples"].items():
        metric, label = SCORES[example]
        for method in dict.fromkeys(run["method"] for run in found["runs"]):
            runs = [run for run in found["runs"] if run["method"] == method]
            ends = [end for run in runs if (end := reached(run, found["target"], metric)) is not None]
            cells = [
                f"{example}: {label} {found['target']:.4f}",
                method,
                spread([epoch for epoch, _ in ends], 1),
                spread([seconds for _, seconds in ends], 1),
                f"{len(ends)} of {len(runs)}",
                spread([float(np.median(np.diff(run["seconds"]))) for run in runs], 2),
                spread([run[metric][-1] for run in runs], 4),
                spread([max(run[metric]) for run in runs], 4),
                spread([run["loss"][-1] for run in runs], 4),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(payload, path):
    """Two rows for each example."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7 * len(payload["examples"])), layout="constrained")
    axes = figure.subplots(2 * len(payload["examples"]), 2)
    for i, (example, found) in enumerate(payload["examples"].items()):
        draw(axes[2 * i : 2 * i + 2], found, *SCORES[example])
        axes[2 * i][0].set_title(example, loc="left")
    figure.savefig(path, dpi=110)


def main(_):
    from tqdm import tqdm

    runs = {example: [] for example in FLAGS.examples}
    cases = [(example, seed, method) for example in FLAGS.examples for seed in FLAGS.seeds for method in FLAGS.methods]
    for example, seed, method in tqdm(cases, unit="run"):
        runs[example].append(train(example, method, int(seed), FLAGS.arguments))
        examples = {name: {"target": target(name, of), "runs": of} for name, of in runs.items() if of}
        payload = {"arguments": FLAGS.arguments, "examples": examples}
        path = results.save(FLAGS.result, payload)
    plot(payload, path.with_suffix(".png"))
    print(f"\n{table(payload)}\n\nwritten to {path}")


if __name__ == "__main__":
    app.run(main)
