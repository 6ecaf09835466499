"""Momentum, KFAC and THOR on the embedded 32x32 images with a small ResNet-18: accuracy by epoch and by second.

Runs `examples/cifar_resnet.py` once for each seed and method, in turn, with the settings given here for all seeds.

    python -m benchmarks.thor_convergence
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from absl import app, flags

from benchmarks import results

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "cifar_resnet.py"
METHODS = ("momentum", "kfac", "thor")
# The best of 0.02, 0.05 and 0.1 by the training loss after six epochs (1.93, 2.13, 2.29; the last of six epochs, the others
# of seven); the second-order methods keep the paper's.
LEARNING_RATES = {"momentum": 0.02}

FLAGS = flags.FLAGS
# Not when imported for its table: other benchmarks' flags have the same names.
if __name__ == "__main__":
    flags.DEFINE_list("seeds", ["1", "2", "3"], "Seeds of weights and of the order of examples.")
    flags.DEFINE_list("methods", list(METHODS), "Methods to compare.")
    flags.DEFINE_float("target", 0.7, "Test accuracy to reach.")
    flags.DEFINE_list("arguments", [], "Arguments for the example, such as --epochs=6.")
    flags.DEFINE_string("result", "thor_convergence", "Name of the result.")


def train(method, seed, arguments):
    """One run's figures by epoch."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "history.json"
        command = [sys.executable, str(EXAMPLE), f"--method={method}", f"--seed={seed}", f"--history={file}"]
        command.append(f"--learning_rate={LEARNING_RATES.get(method, 0.1)}")
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **results.KEEP_MEMORY}
        done = subprocess.run([*command, "--output=", *arguments], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{method}, seed {seed} failed:\n{done.stderr[-3000:]}")
        run = json.loads(file.read_text())[method]
    keep = ("loss", "val_accuracy", "seconds", "layers_updated", "layers_kept", "layers_stopped")
    return {"method": method, "seed": seed, "first": run["first"], **{k: run[k] for k in keep if k in run}}


def reached(run, target, metric="val_accuracy"):
    """`(epochs, seconds)` of training until the test result is at the target, or None. Seconds without the first step."""
    for epoch, value in enumerate(run[metric]):
        if value >= target:
            return epoch + 1, run["seconds"][epoch] - run["first"]
    return None


def spread(values, digits):
    """Mean and standard deviation."""
    if not values:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(payload):
    """A Markdown table, means over seeds with standard deviations."""
    target = payload["target"]
    bests = {run["seed"]: max(run["val_accuracy"]) for run in payload["runs"] if run["method"] == "momentum"}
    header = ["method", f"epochs to {target:.0%}", f"seconds to {target:.0%}", "seeds that reach it"]
    header += ["seconds to Momentum's best", "s per epoch", "final test accuracy", "final loss"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]

    for method in dict.fromkeys(run["method"] for run in payload["runs"]):
        runs = [run for run in payload["runs"] if run["method"] == method]
        ends = [end for run in runs if (end := reached(run, target)) is not None]
        equal = [reached(run, bests[run["seed"]]) for run in runs if run["seed"] in bests]
        epoch = [float(np.median(np.diff(run["seconds"]))) for run in runs]
        cells = [
            method,
            spread([e for e, _ in ends], 1),
            spread([s for _, s in ends], 1),
            f"{len(ends)} of {len(runs)}",
            spread([end[1] for end in equal if end is not None], 1),
            spread(epoch, 2),
            spread([run["val_accuracy"][-1] for run in runs], 4),
            spread([run["loss"][-1] for run in runs], 4),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(axes, payload, metric="val_accuracy", label="test accuracy"):
    """Mean and range over the seeds, by epoch and by second, on two rows of two axes."""
    for i, method in enumerate(dict.fromkeys(run["method"] for run in payload["runs"])):
        runs = [run for run in payload["runs"] if run["method"] == method]
        seconds = np.mean([np.array(run["seconds"]) - run["first"] for run in runs], axis=0)
        for row, key in zip(axes, ("loss", metric), strict=True):
            values = np.array([run[key] for run in runs])
            for axis, x in zip(row, (np.arange(1, values.shape[1] + 1), seconds), strict=True):
                axis.plot(x, values.mean(axis=0), label=method, color=f"C{i}")
                axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=f"C{i}", alpha=0.15, linewidth=0)
    for row, name in zip(axes, ("training loss", label), strict=True):
        row[0].set(ylabel=name, xlabel="epoch")
        row[1].set(ylabel=name, xlabel="seconds of training, without the first step's tracing")
        for axis in row:
            axis.grid(alpha=0.3)
    for axis in axes[0]:
        axis.set_yscale("log")
    for axis in axes[1]:
        axis.axhline(payload["target"], color="black", linestyle=":", linewidth=1)
    axes[1][1].legend()


def plot(payload, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    draw(figure.subplots(2, 2), payload)
    figure.savefig(path, dpi=110)


def main(_):
    from tqdm import tqdm

    runs = []
    for seed, method in tqdm([(s, m) for s in FLAGS.seeds for m in FLAGS.methods], unit="run"):
        runs.append(train(method, int(seed), FLAGS.arguments))
        payload = {"arguments": FLAGS.arguments, "target": FLAGS.target, "runs": runs}
        path = results.save(FLAGS.result, payload)
    plot(payload, path.with_suffix(".png"))
    print(f"\n{table(payload)}\n\nwritten to {path}")


if __name__ == "__main__":
    app.run(main)
