"""How many epochs and seconds each method needs to a target loss, each tuned by the same number of trials.

The first three train on the 1,500 training images of the digits (8x8), on JAX, whose steps are the fastest on networks of this
size; the other two on the first of the drawn images, on TensorFlow, whose convolutions are. (SNGD is left out of the
image tasks, SNGD and HyLo of the autoencoder, where they take longest and end highest of the methods of second order.)

    cnn           a small convolutional network, cross-entropy; to a loss of 0.01
    mlp           64-128-64-10 with ReLU, cross-entropy; to a loss of 0.01
    autoencoder   64-48-32-16-8-16-32-48-64 with tanh hidden layers, the classical test of second-order methods: binary
                  cross-entropy of the pixels in [0, 1], averaged over pixels
    resnet        a ResNet-8 of 8, 16 and 32 channels on 512 images of ten shapes in any colours (32x32x3), cross-entropy
    unet          a U-Net of 8, 16 and 32 channels on 128 images and masks (64x64), binary cross-entropy averaged over pixels

Where no loss is named, the target is the one that the best of the first-order methods has, in the mean over the seeds, after all
its epochs.

Every optimizer is tuned on a full grid of trials, as many as for any other of the task, each with one seed, or with three where a
loss is named; these are not used again. The best is the one with the fewest epochs to that loss, or else the lowest loss after
the last epoch (a trial stops at that loss, or evaluates only then); it is then run with fresh seeds, in full. The loss is that of
the whole training set after each epoch, not a running mean. All of it runs through plain `fit`, an epoch in one
`steps_per_execution`, since on small networks Python would otherwise be most of the time. A trial reuses the compiled step:
variables start over, learning rates are variables, and dampings follow a schedule that reads the number of the trial off the step
counter.
"""

import itertools
import math
import statistics

FIRST_ORDER = ("SGD", "Adam", "Muon")
SECOND_ORDER = ("KFAC", "THOR", "SKFAC", "SNGD", "HyLo-KID")
COLOURS = {
    "SGD": "tab:gray",
    "Adam": "tab:orange",
    "Muon": "tab:brown",
    "KFAC": "tab:blue",
    "THOR": "tab:green",
    "SKFAC": "tab:purple",
    "SNGD": "tab:red",
    "HyLo-KID": "tab:cyan",
}

# For each task and optimizer momenta (Adam's `beta_1`), learning rates and dampings: as many trials for each optimizer of a task.
_CLASSIFIER = {
    "SGD": ((0.8, 0.9), (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)),
    "Adam": ((0.8, 0.9), (0.005, 0.01, 0.015, 0.02, 0.03, 0.05)),
    "Muon": ((0.9, 0.95), (0.01, 0.02, 0.03, 0.04, 0.05, 0.07)),
    "KFAC": ((0.8, 0.9), (0.03, 0.1), (0.0003, 0.001, 0.003)),
    "THOR": ((0.8, 0.9), (0.03, 0.1), (0.0003, 0.001, 0.003)),
    "SKFAC": ((0.8, 0.9), (0.03, 0.1), (0.003, 0.01, 0.03)),
    "SNGD": ((0.8, 0.9), (0.03, 0.1), (0.1, 1.0, 10.0)),
    "HyLo-KID": ((0.8, 0.9), (0.1, 0.3), (0.1, 0.3, 1.0)),
}
_DIGITS = {"backend": "jax", "batch_size": 250, "losses_per_example": 1, "steps": 6}
_LABELS = {**_DIGITS, "epochs": 20, "target": 0.01, "intervals": [3, 3], "trial_seeds": 3}
_IMAGES = {"backend": "tensorflow", "steps": 8, "target": None, "intervals": [4, 8], "trial_seeds": 1}
TASKS = {
    "cnn": _LABELS,
    "mlp": _LABELS,
    "autoencoder": {
        **_DIGITS,
        "losses_per_example": 64,
        "epochs": 150,
        "target": None,
        "intervals": [1, 3],
        "trial_seeds": 1,
    },
    "resnet": {**_IMAGES, "batch_size": 64, "losses_per_example": 1, "epochs": 16},
    "unet": {**_IMAGES, "batch_size": 16, "losses_per_example": 64 * 64, "epochs": 16},
}
_RATES = (0.03, 0.1, 0.3)
GRIDS = {
    "cnn": _CLASSIFIER,
    "mlp": _CLASSIFIER,
    "autoencoder": {
        "SGD": ((0.9, 0.95), (0.5, 1.0, 2.0, 3.0)),
        "Adam": ((0.5, 0.9), (0.003, 0.005, 0.01, 0.015)),
        "Muon": ((0.9, 0.95), (0.01, 0.015, 0.02, 0.03)),
        "KFAC": ((0.8, 0.9), (0.01, 0.02), (0.0001, 0.0003)),
        "THOR": ((0.8, 0.9), (0.01, 0.02), (0.0001, 0.0003)),
        "SKFAC": ((0.8, 0.9), (0.01, 0.02), (0.0001, 0.0003)),
    },
    "resnet": {
        "SGD": ((0.9,), (0.01, 0.02, 0.03, 0.05, 0.1, 0.2)),
        "Adam": ((0.9,), (0.001, 0.002, 0.003, 0.004, 0.006, 0.01)),
        "Muon": ((0.95,), (0.001, 0.002, 0.003, 0.004, 0.006, 0.01)),
        "KFAC": ((0.9,), _RATES, (0.01, 0.03)),
        "THOR": ((0.9,), _RATES, (0.01, 0.03)),
        "SKFAC": ((0.9,), _RATES, (0.01, 0.03)),
        "HyLo-KID": ((0.9,), _RATES, (0.1, 0.3)),
    },
    "unet": {
        "SGD": ((0.9,), (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)),
        "Adam": ((0.9,), (0.003, 0.005, 0.0075, 0.01, 0.015, 0.02)),
        "Muon": ((0.95,), (0.003, 0.005, 0.0075, 0.01, 0.015, 0.02)),
        "KFAC": ((0.9,), _RATES, (0.001, 0.01)),
        "THOR": ((0.9,), _RATES, (0.001, 0.01)),
        "SKFAC": ((0.9,), _RATES, (0.003, 0.01)),
        "HyLo-KID": ((0.9,), _RATES, (0.1, 1.0)),
    },
}


def cases(quick):
    """One for each task and optimizer."""
    found = []
    for task in ("cnn",) if quick else TASKS:
        for optimizer in ("SGD", "KFAC", "HyLo-KID") if quick else GRIDS[task]:
            grid = dict(zip(("momentum", "learning_rate", "damping"), map(list, GRIDS[task][optimizer]), strict=False))
            case = {"name": f"{task}-{optimizer}", "task": task, "optimizer": optimizer, **TASKS[task]}
            case |= {"grid": grid, "seeds": 5}
            if quick:
                case |= {"epochs": 3, "grid": first_points(grid), "trial_seeds": 1, "seeds": 2}
            found.append(case)
    return found


def first_points(grid):
    """The first value of each argument of a grid."""
    return {name: values[:1] for name, values in grid.items()}


def environment(case):
    """Of the process that measures a case."""
    return {"KERAS_BACKEND": case["backend"]}


def measure(case):
    """Trials, and runs of the best of them."""
    from benchmarks.trials import measured

    return measured(case)


def epochs_to(losses, target):
    """The first epoch after which the loss is at most `target`, or None."""
    return next((i + 1 for i, loss in enumerate(losses) if loss <= target), None)


def spread(values, digits):
    """`mean ± standard deviation`."""
    import numpy as np

    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def by_task(cases):
    """For each task its cases."""
    found = {}
    for case in cases:
        found.setdefault(case["task"], []).append(case)
    return found


def targets(payload):
    """For each task the loss to reach."""
    found = {}
    for case in payload["cases"]:
        last = [run["loss"][-1] for run in case["runs"]]
        if case["target"] is not None:
            found[case["task"]] = case["target"]
        elif case["optimizer"] in FIRST_ORDER:
            found[case["task"]] = min(found.get(case["task"], float("inf")), sum(last) / len(last))
    return found


def needs(case, target):
    """Epochs and seconds to a target, medians over the seeds; infinite where most do not get there."""
    ends = [(epochs_to(run["loss"], target), elapsed(run)) for run in case["runs"]]
    return {
        "epochs": statistics.median(epoch or math.inf for epoch, _ in ends),
        "seconds": statistics.median(seconds[epoch - 1] if epoch else math.inf for epoch, seconds in ends),
    }


def comparison(cases, target):
    """The least epochs and seconds of first and of second order in a task: `{unit: ((name, count), (name, count))}`."""
    found = {case["optimizer"]: needs(case, target) for case in cases}
    kinds = [[name for name in kind if name in found] for kind in (FIRST_ORDER, SECOND_ORDER)]
    return {
        unit: tuple(min(((name, found[name][unit]) for name in kind), key=lambda pair: pair[1]) for kind in kinds)
        for unit in ("epochs", "seconds")
        if all(kinds)
    }


def count(number):
    """A number of epochs or seconds, as text."""
    return "not reached" if number == math.inf else f"{number:.3g}"


def goals(payload):
    """Goals of convergence: name, what is asked, what is measured, whether it is met, where it goes."""
    found, cases = [], by_task(payload["cases"])
    for task, target in targets(payload).items():
        compared = comparison(cases[task], target)
        for unit, most in (("epochs", 0.5), ("seconds", 1.0)):
            (first, of_first), (second, of_second) = compared[unit]
            share = of_second / of_first
            measured = f"{share:.2f} ({second}, {count(of_second)}, of {first}'s {count(of_first)})"
            if of_second == math.inf:
                measured = f"not reached ({first}: {count(of_first)})"
            met = share <= most
            why = "" if met else profile(cases[task], target, first, second)
            found.append((f"{unit} to the target, {task}", f"<= {most:.2f} of first order's", measured, met, why))
    return found


def profile(cases, target, first, second):
    """What a method of second order takes beside one of first order; how near any comes where none gets there."""
    cases = {case["optimizer"]: case for case in cases}
    needed = {name: needs(cases[name], target)["epochs"] for name in (second, first)}
    if needed[second] == math.inf:
        ends = {name: statistics.median(run["loss"][-1] for run in case["runs"]) for name, case in cases.items()}
        nearest = min((name for name in SECOND_ORDER if name in ends), key=ends.get)
        return f"{nearest} ends at {ends[nearest]:.4g}, the target is {target:.4g}"
    each = [f"{count(e)} epochs of {1e3 * epoch_seconds(cases[name]):.3g} ms" for name, e in needed.items()]
    return f"{second} takes {each[0]}, {first} {each[1]}"


def elapsed(run):
    """Seconds of a run's training after each epoch."""
    return list(itertools.accumulate(run["seconds"]))


def epoch_seconds(case):
    """Median seconds of an epoch."""
    return statistics.median(seconds for run in case["runs"] for seconds in run["seconds"])


def header(first):
    """The first two lines of a Markdown table of `row`s."""
    columns = [first, "best of its trials", "trials", "epochs to target", "seeds that reach it", "seconds to it"]
    columns += ["ms per epoch", "final loss"]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def row(name, case, target):
    """What a case needs to reach a target, as a line of a Markdown table."""
    runs = case["runs"]
    epochs = [epochs_to(run["loss"], target) for run in runs]
    reached = [(e, elapsed(run)[e - 1]) for e, run in zip(epochs, runs, strict=True) if e]
    best = ", ".join(f"{argument} {case['best'][argument]:g}" for argument in case["grid"])
    cells = [name, best, str(len(case["trials"]))]
    cells += [spread([e for e, _ in reached], 1) if reached else f"> {case['epochs']}"]
    cells += [f"{len(reached)} of {len(runs)}", spread([t for _, t in reached], 2) if reached else "-"]
    cells += [f"{1e3 * epoch_seconds(case):.1f}"]
    return f"| {' | '.join([*cells, spread([run['loss'][-1] for run in runs], 5)])} |"


def task_table(cases, target):
    """A Markdown table of the cases of one task."""
    one = cases[0]
    title = f"**{one['task']}**: to a loss of {target:.4g}; batches of {one['batch_size']}, {one['epochs']} epochs."
    return "\n".join([title, "", *header("optimizer"), *(row(case["optimizer"], case, target) for case in cases)])


def table(payload):
    """A Markdown table for each task."""
    cases = by_task(payload["cases"])
    return "\n\n".join(task_table(cases[task], target) for task, target in targets(payload).items())


def plot(payload, path):
    """Median and range over the seeds of the loss, by epoch and by second."""
    import numpy as np
    from matplotlib.figure import Figure

    goals, cases = targets(payload), by_task(payload["cases"])
    figure = Figure(figsize=(10, 3.4 * len(goals)), layout="constrained")
    for row, (task, target) in zip(figure.subplots(len(goals), 2, squeeze=False), goals.items(), strict=True):
        for case in cases[task]:
            losses = np.array([run["loss"] for run in case["runs"]])
            seconds = np.median([elapsed(run) for run in case["runs"]], axis=0)
            colour = COLOURS[case["optimizer"]]
            for axis, x in zip(row, (np.arange(1, losses.shape[1] + 1), seconds), strict=True):
                axis.plot(x, np.median(losses, axis=0), color=colour, linewidth=1.5, label=case["optimizer"])
                axis.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.12, lw=0)
        for axis, label in zip(row, ("epoch", "seconds of training, after compiling"), strict=True):
            axis.axhline(target, color="black", linestyle=":", linewidth=1)
            axis.set(yscale="log", xlabel=label, ylabel=f"{task}: training loss")
            lowest = min(run["loss"][-1] for case in cases[task] for run in case["runs"])
            axis.set_ylim(bottom=max(1e-6, 0.8 * lowest))
            if task == "autoencoder":
                axis.set(yscale="linear", ylim=(0.97 * lowest, 0.45))
            axis.grid(alpha=0.3)
        row[0].legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=90)
