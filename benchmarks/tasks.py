"""How many epochs and seconds each method needs to a target loss, each tuned by the same number of trials.

All tasks train on the 1,500 training images of the digits (8x8):

    cnn           a small convolutional network, cross-entropy; to a loss of 0.05
    mlp           64-128-64-10 with ReLU, cross-entropy; to a loss of 0.05
    autoencoder   64-48-32-16-8-16-32-48-64 with tanh hidden layers, the classical test of second-order methods: binary
                  cross-entropy of the pixels in [0, 1], averaged over pixels; to the loss that the best of the first-order
                  methods has, in the mean over the seeds, after all its epochs

Every optimizer is tuned on a full grid of 16 trials, with one seed that is not used again; what is best there by the loss after
the last epoch is then run with fresh seeds. The loss is that of the whole training set after each epoch, not a running
mean. All of it runs through plain `fit`, an epoch in one `steps_per_execution`, since on networks of this size Python would
otherwise be most of the time, and on JAX, whose steps are the fastest here. A trial reuses the compiled step: variables start
over, learning rates are variables, and dampings follow a schedule that reads the number of the trial off the step counter.
"""

FIRST_ORDER = ("SGD", "Adam", "Muon")
SECOND_ORDER = ("KFAC", "THOR", "SKFAC", "SNGD", "HyLo-KID", "HyLo-KIS")
COLOURS = {
    "SGD": "tab:gray",
    "Adam": "tab:orange",
    "Muon": "tab:brown",
    "KFAC": "tab:blue",
    "THOR": "tab:green",
    "SKFAC": "tab:purple",
    "SNGD": "tab:red",
    "HyLo-KID": "tab:cyan",
    "HyLo-KIS": "tab:pink",
}

# For each task and optimizer the values of one argument, and learning rates: together 16 trials.
_ROWS = {
    "SNGD": ("damping", (0.01, 0.1, 1.0, 10.0), (0.01, 0.03, 0.1, 0.3)),
    "HyLo-KID": ("damping", (0.01, 0.1, 1.0, 10.0), (0.01, 0.03, 0.1, 0.3)),
    "HyLo-KIS": ("damping", (0.01, 0.1, 1.0, 10.0), (0.01, 0.03, 0.1, 0.3)),
}
_FACTORS = {
    name: ("damping", (0.0003, 0.001, 0.003, 0.01), (0.01, 0.03, 0.1, 0.3)) for name in ("KFAC", "THOR", "SKFAC")
}
_CLASSIFIER = {
    "SGD": ("momentum", (0.9, 0.99), (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)),
    "Adam": ("beta_1", (0.9, 0.5), (0.001, 0.002, 0.003, 0.005, 0.01, 0.015, 0.02, 0.03)),
    "Muon": ("momentum", (0.9, 0.95), (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1)),
    **_FACTORS,
    **_ROWS,
}
TASKS = {
    "cnn": {"batch_size": 250, "epochs": 20, "target": 0.05, "losses_per_example": 1, "intervals": (1, 1)},
    "mlp": {"batch_size": 250, "epochs": 20, "target": 0.05, "losses_per_example": 1, "intervals": (1, 1)},
    "autoencoder": {"batch_size": 250, "epochs": 150, "target": None, "losses_per_example": 64, "intervals": (1, 3)},
}
GRIDS = {
    "cnn": _CLASSIFIER,
    "mlp": _CLASSIFIER,
    "autoencoder": {
        "SGD": ("momentum", (0.9, 0.99), (0.1, 0.3, 0.5, 1.0, 2.0, 3.0, 4.0, 8.0)),
        "Adam": ("beta_1", (0.9, 0.5), (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02)),
        "Muon": ("momentum", (0.9, 0.95), (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1)),
        **{name: ("damping", (1e-5, 1e-4, 1e-3, 1e-2), (0.003, 0.01, 0.03, 0.1)) for name in ("KFAC", "THOR", "SKFAC")},
        **{
            name: ("damping", (1e-4, 1e-3, 1e-2, 1e-1), (0.003, 0.01, 0.03, 0.1))
            for name in ("SNGD", "HyLo-KID", "HyLo-KIS")
        },
    },
}


def cases(quick):
    """One for each task and optimizer."""
    tasks, optimizers = (("cnn",), ("SGD", "KFAC", "HyLo-KID")) if quick else (TASKS, FIRST_ORDER + SECOND_ORDER)
    found = []
    for task in tasks:
        for optimizer in optimizers:
            argument, values, rates = GRIDS[task][optimizer]
            case = {"name": f"{task}-{optimizer}", "task": task, "optimizer": optimizer, **TASKS[task]}
            case |= {"intervals": list(TASKS[task]["intervals"]), "argument": argument, "values": list(values)}
            case |= {"rates": list(rates), "seeds": 5}
            if quick:
                case |= {"epochs": 3, "values": list(values[1:2]), "rates": list(rates[1:3]), "seeds": 2}
            found.append(case)
    return found


def environment(case):
    """Of the process that measures a case."""
    return {"KERAS_BACKEND": "jax"}


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


def header(first):
    """The first two lines of a Markdown table of `row`s."""
    columns = [first, "best of its trials", "trials", "epochs to target", "seeds that reach it", "seconds to it"]
    columns += ["ms per epoch", "final loss"]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def row(name, case, target):
    """What a case needs to reach a target, as a line of a Markdown table."""
    import numpy as np

    runs = case["runs"]
    epochs = [epochs_to(run["loss"], target) for run in runs]
    reached = [(e, sum(run["seconds"][:e])) for e, run in zip(epochs, runs, strict=True) if e]
    best = f"{case['argument']} {case['best'][case['argument']]:g}, learning_rate {case['best']['learning_rate']:g}"
    cells = [name, best, str(len(case["trials"]))]
    cells += [spread([e for e, _ in reached], 1) if reached else f"> {case['epochs']}"]
    cells += [f"{len(reached)} of {len(runs)}", spread([t for _, t in reached], 2) if reached else "-"]
    cells += [f"{np.median([t for run in runs for t in run['seconds'][1:]]) * 1e3:.1f}"]
    return f"| {' | '.join([*cells, spread([run['loss'][-1] for run in runs], 5)])} |"


def table(payload):
    """A Markdown table for each task, and what the best of each kind of method need."""
    parts = []
    for task, target in targets(payload).items():
        found = [case for case in payload["cases"] if case["task"] == task]
        most = found[0]["epochs"]
        title = f"**{task}**: to a loss of {target:.4g}; batches of {found[0]['batch_size']}, {most} epochs."
        lines, means = [title, "", *header("optimizer")], {}
        for case in found:
            lines.append(row(case["optimizer"], case, target))
            # A seed that does not get there counts with all its epochs.
            epochs = [epochs_to(run["loss"], target) or most for run in case["runs"]]
            means[case["optimizer"]] = sum(epochs) / len(epochs)
        kinds = [[name for name in kind if name in means] for kind in (FIRST_ORDER, SECOND_ORDER)]
        if all(kinds) and min(means.values()) < most:
            first, second = (min(kind, key=means.get) for kind in kinds)
            share = means[second] / means[first]
            lines += ["", f"{second} needs {share:.2f} of the epochs of {first} (the goal is 0.50)."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def plot(payload, path):
    """Median and range over the seeds of the loss, by epoch and by second."""
    import numpy as np
    from matplotlib.figure import Figure

    goals = targets(payload)
    figure = Figure(figsize=(10, 3.4 * len(goals)), layout="constrained")
    for row, (task, target) in zip(figure.subplots(len(goals), 2, squeeze=False), goals.items(), strict=True):
        for case in payload["cases"]:
            if case["task"] != task:
                continue
            losses = np.array([run["loss"] for run in case["runs"]])
            seconds = np.median([np.cumsum(run["seconds"]) for run in case["runs"]], axis=0)
            colour = COLOURS[case["optimizer"]]
            for axis, x in zip(row, (np.arange(1, losses.shape[1] + 1), seconds), strict=True):
                axis.plot(x, np.median(losses, axis=0), color=colour, linewidth=1.5, label=case["optimizer"])
                axis.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.12, lw=0)
        for axis, label in zip(row, ("epoch", "seconds of training, after compiling"), strict=True):
            axis.axhline(target, color="black", linestyle=":", linewidth=1)
            axis.set(yscale="log", xlabel=label, ylabel=f"{task}: training loss")
            axis.set_ylim(bottom=1e-6) if task != "autoencoder" else axis.set(yscale="linear", ylim=(None, 0.45))
            axis.grid(alpha=0.3)
        row[0].legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=90)
