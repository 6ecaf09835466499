"""How many epochs KFAC, SGD with momentum and Adam need, each tuned by the same number of trials.

    python -m benchmarks.convergence                          # both tasks, five seeds
    python -m benchmarks.convergence --task cnn --quick       # a look at whether it runs

Both tasks train on the 1,500 training images of the digits (8x8):

    cnn           a small convolutional network, cross-entropy; epochs until the loss is 0.05
    autoencoder   64-48-32-16-8-16-32-48-64 with tanh hidden layers, the classical test of second-order methods: binary
                  cross-entropy of the pixels in [0, 1], averaged over pixels; epochs until the loss that the better of
                  SGD and Adam has, in the mean over the seeds, after all its epochs

Every optimizer is tuned on a full grid of the same size, with one seed that is not used again; what is best there by
the loss after the last epoch is then run with fresh seeds. The loss is that of the whole training set after each
epoch, not a running mean. All of it runs through plain `fit`, an epoch in one `steps_per_execution`, since on networks
of this size Python would otherwise be most of the time; JAX is the default backend because its steps are the fastest
here. A trial reuses the compiled step: variables start over, learning rates are variables, and dampings follow a
schedule that reads the number of the trial off the step counter.
"""

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

from examples import datasets  # isort: skip  (before keras: it imports TensorFlow without its greetings)
import keras
import numpy as np
from absl import app, flags
from tqdm import tqdm

import keras_ngd
from benchmarks import results
from benchmarks.tasks import epochs_to, spread
from benchmarks.trials import FIRST_SEED, TRIAL_SEED, OfTrial, Training, autoencoder
from examples.networks import digits_cnn

FIRST_ORDER = ("SGD", "Adam")

FLAGS = flags.FLAGS
flags.DEFINE_enum("task", "all", ["all", "cnn", "autoencoder"], "Task to run.")
flags.DEFINE_integer("seeds", 5, "Runs of each tuned optimizer.", lower_bound=1)
flags.DEFINE_boolean("quick", False, "Three epochs and two trials, and nothing written.")
flags.DEFINE_boolean("render", False, "Write the table and the plot of the results that are there, and run nothing.")
flags.DEFINE_string("data_dir", None, "Where tensorflow-datasets keeps prepared data. Default: its own choice.")
flags.DEFINE_string("output", "convergence", "Name of the results.")


@dataclass(frozen=True)
class Task:
    """What is trained, for how long, and which settings are tried.

    Attributes:
        make_data: of the training images and labels, the inputs and targets.
        target: the loss to reach; None for the one the better first-order optimizer ends with.
        grids: for each optimizer the learning rates and the values of one more argument, named first.
        kfac: KFAC's other arguments.
    """

    make_model: Callable
    make_data: Callable
    loss: Any
    batch_size: int
    epochs: int
    target: float | None
    grids: dict
    kfac: dict


def pixels(images, labels):
    flat = images.reshape(len(images), -1)
    return flat, flat


TASKS = {
    "cnn": Task(
        make_model=digits_cnn,
        make_data=lambda images, labels: (images, labels),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        batch_size=250,
        epochs=20,
        target=0.05,
        grids={
            "SGD": ("momentum", (0.9, 0.99), (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)),
            "Adam": ("beta_1", (0.9, 0.5), (0.001, 0.002, 0.003, 0.005, 0.01, 0.015, 0.02, 0.03)),
            "KFAC": ("damping", (0.0003, 0.001, 0.003, 0.01), (0.01, 0.03, 0.1, 0.3)),
        },
        kfac={"factor_interval": 1, "inverse_interval": 1},
    ),
    "autoencoder": Task(
        make_model=autoencoder,
        make_data=pixels,
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        batch_size=250,
        epochs=150,
        target=None,
        grids={
            "SGD": ("momentum", (0.9, 0.99), (0.1, 0.3, 0.5, 1.0, 2.0, 3.0, 4.0, 8.0)),
            "Adam": ("beta_1", (0.9, 0.5), (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02)),
            "KFAC": ("damping", (1e-5, 1e-4, 1e-3, 1e-2), (0.003, 0.01, 0.03, 0.1)),
        },
        kfac={"factor_interval": 1, "inverse_interval": 3, "losses_per_example": 64},
    ),
}


class Tuned:
    """An optimizer over its grid: `trainings` holds what must be compiled apart."""

    def __init__(self, name, task, data):
        self.argument, self.values, self.rates = task.grids[name]
        self.name, self.task, self.data = name, task, data
        self.trainings = {}

    def _make(self, value):
        if self.name == "KFAC":
            return keras_ngd.KFAC(0.1, **{self.argument: OfTrial(self.values)}, **self.task.kfac)
        optimizer = {"SGD": keras.optimizers.SGD, "Adam": keras.optimizers.Adam}[self.name]
        return optimizer(0.1, **{self.argument: value})

    def run(self, value, rate, seed, epochs):
        key = None if self.name == "KFAC" else value
        if key not in self.trainings:
            self.trainings[key] = Training(
                self.task.make_model, self.data, self.task.loss, self.task.batch_size, self._make(value)
            )
            self.trainings[key].run(rate, seed, 1)
        trial = self.values.index(value) if self.name == "KFAC" else 0
        return self.trainings[key].run(rate, seed, epochs, trial)

    def trials(self, epochs, bar, quick):
        """One run for each point of the grid, in its order."""
        points = list(itertools.product(self.values, self.rates))
        done = []
        for value, rate in points[:: len(points) // 2] if quick else points:
            run = self.run(value, rate, TRIAL_SEED, epochs)
            done.append({self.argument: value, "learning_rate": rate, "final_loss": run["loss"][-1]})
            bar.update()
        return done


def measure(name, task, bar):
    """Trials and runs of every optimizer on a task."""
    data = task.make_data(*datasets.arrays("digits", "train", FLAGS.data_dir))
    epochs = 3 if FLAGS.quick else task.epochs
    optimizers = {}
    for optimizer in task.grids:
        bar.set_description(f"{name}, {optimizer}")
        tuned = Tuned(optimizer, task, data)
        trials = tuned.trials(epochs, bar, FLAGS.quick)
        best = min(trials, key=lambda trial: trial["final_loss"])
        runs = []
        for seed in range(FIRST_SEED, FIRST_SEED + FLAGS.seeds):
            runs.append({"seed": seed, **tuned.run(best[tuned.argument], best["learning_rate"], seed, epochs)})
            bar.update()
        arguments = task.kfac if optimizer == "KFAC" else {}
        optimizers[optimizer] = {"trials": trials, "best": best, "arguments": arguments, "runs": runs}
    target = task.target or min(float(np.mean([run["loss"][-1] for run in optimizers[o]["runs"]])) for o in FIRST_ORDER)
    for entry in optimizers.values():
        for run in entry["runs"]:
            run["epochs_to_target"] = epochs_to(run["loss"], target)
    return {"batch_size": task.batch_size, "epochs": epochs, "target": target, "optimizers": optimizers}


def table(payload):
    """The Markdown table of what `main` writes."""
    columns = (
        "task",
        "optimizer",
        "best of its trials",
        "trials",
        "epochs to target",
        "seeds that reach it",
        "seconds to it",
        "ms per epoch",
        "final loss",
    )
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, task in payload["tasks"].items():
        title = f"{name}: loss {task['target']:.4g}, batch {task['batch_size']}, {task['epochs']} epochs"
        for optimizer, entry in task["optimizers"].items():
            best = ", ".join(f"{key} {value:g}" for key, value in entry["best"].items() if key != "final_loss")
            runs = entry["runs"]
            reached = [run for run in runs if run["epochs_to_target"]]
            seconds = [sum(run["seconds"][: run["epochs_to_target"]]) for run in reached]
            cells = [
                title,
                optimizer,
                best,
                str(len(entry["trials"])),
                spread([run["epochs_to_target"] for run in reached], 1) if reached else f"> {task['epochs']}",
                f"{len(reached)} of {len(runs)}",
                spread(seconds, 2) if seconds else "-",
                f"{np.median([s for run in runs for s in run['seconds'][1:]]) * 1e3:.1f}",
                spread([run["loss"][-1] for run in runs], 5),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(payload):
    """For each task, KFAC's epochs in those of the better first-order optimizer."""
    lines = []
    for name, task in payload["tasks"].items():

        def mean_epochs(optimizer, task=task):
            # A seed that does not get there counts with all its epochs, to the other optimizer's disadvantage.
            runs = task["optimizers"][optimizer]["runs"]
            return np.mean([run["epochs_to_target"] or task["epochs"] for run in runs])

        best = min(FIRST_ORDER, key=mean_epochs)
        share = mean_epochs("KFAC") / mean_epochs(best)
        lines.append(
            f"{name}: KFAC reaches loss {task['target']:.4g} in {mean_epochs('KFAC'):.1f} epochs, {best} in "
            f"{mean_epochs(best):.1f}: {share:.2f} of its epochs"
        )
    return "\n".join(lines)


def plot(payload, path):
    """Median and range over the seeds of the loss, by epoch and by second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"SGD": "tab:gray", "Adam": "tab:orange", "KFAC": "tab:blue"}
    tasks = payload["tasks"]
    figure, axes = plt.subplots(len(tasks), 2, figsize=(9, 3 * len(tasks)), layout="constrained", squeeze=False)
    for row, (name, task) in zip(axes, tasks.items(), strict=True):
        for optimizer, entry in task["optimizers"].items():
            losses = np.array([run["loss"] for run in entry["runs"]])
            epochs = np.arange(1, losses.shape[1] + 1)
            seconds = np.median([np.cumsum(run["seconds"]) for run in entry["runs"]], axis=0)
            for axis, x in zip(row, (epochs, seconds), strict=True):
                axis.plot(x, np.median(losses, axis=0), color=colours[optimizer], linewidth=1.8, label=optimizer)
                axis.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=colours[optimizer], alpha=0.2, lw=0)
        for axis, label in zip(row, ("epoch", "seconds of training, after compiling"), strict=True):
            axis.axhline(task["target"], color="black", linestyle=":", linewidth=1)
            axis.set(yscale="log", xlabel=label, ylabel=f"{name}: training loss")
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if name == "autoencoder":
                axis.set(yscale="linear", ylim=(None, 0.45))
            else:
                axis.set_ylim(bottom=1e-6)
        row[0].legend(fontsize="small")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def render(payload):
    """Writes the table and the plot beside the results; returns the text."""
    text = f"{table(payload)}\n\n{summary(payload)}\n"
    (results.DIRECTORY / f"{FLAGS.output}.md").write_text(text)
    plot(payload, results.DIRECTORY / f"{FLAGS.output}.png")
    return text


def main(_):
    if FLAGS.render:
        print(render(results.load(FLAGS.output)))
        return
    names = list(TASKS) if FLAGS.task == "all" else [FLAGS.task]
    budget = {n: {o: len(g[1]) * len(g[2]) for o, g in TASKS[n].grids.items()} for n in names}
    if FLAGS.quick:
        budget = {n: dict.fromkeys(grids, 2) for n, grids in budget.items()}
    print(f"trials to tune with: {budget}; then {FLAGS.seeds} seeds each, on the {keras.backend.backend()} backend")
    start = time.perf_counter()
    payload = {"backend": keras.backend.backend(), "trials": budget, "seeds": FLAGS.seeds, "tasks": {}}
    with tqdm(total=sum(sum(b.values()) + len(b) * FLAGS.seeds for b in budget.values()), unit="run") as bar:
        for name in names:
            payload["tasks"][name] = measure(name, TASKS[name], bar)
    payload["seconds"] = time.perf_counter() - start
    if FLAGS.quick:
        print(f"\n{table(payload)}\n\n{summary(payload)}")
        return
    path = results.save(FLAGS.output, payload)
    print(f"\n{render(payload)}\nwritten to {path}, .md and .png, after {payload['seconds']:.0f} seconds")


if __name__ == "__main__":
    app.run(main)
