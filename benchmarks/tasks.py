"""How many epochs and seconds each method needs to a target loss, each tuned by the same number of trials.

The first three train on the 1,500 training images of the digits (8x8), on JAX, whose steps are the fastest on networks of this
size; the other two on the first of the drawn images, on TensorFlow, whose convolutions are. (SNGD is left out of the
image tasks, SNGD and HyLo of the autoencoder, where they take longest and end highest of the methods of second order.)
Methods of second order have the intervals of the task there, and KFAC, THOR, SKFAC, SNGD and HyLo their papers' settings.

    cnn           a small convolutional network, cross-entropy; to a loss of 0.01
    mlp           64-128-64-10 with ReLU, cross-entropy; to a loss of 0.01
    autoencoder   64-48-32-16-8-16-32-48-64 with tanh hidden layers, the classical test of second-order methods: binary
                  cross-entropy of the pixels in [0, 1], averaged over pixels
    resnet        a ResNet-8 of 8, 16 and 32 channels on 512 images of ten shapes in any colours (32x32x3), cross-entropy
    unet          a U-Net of 8, 16 and 32 channels on 128 images and masks (64x64), binary cross-entropy averaged over pixels

Three more take long, and run where they are named (`--only='text-*'`). Their data are real, and the optimizers of second order
are as users have them: nothing but what the grid and `ARGUMENTS` name differs from the defaults.

    text          a Transformer of two blocks, 64 wide, on a million characters of the Python standard library: the next character
                  after each of 64; the loss is that of other modules
    vit           a ViT of two blocks, 64 wide, on 10,000 images of Fashion-MNIST; the loss is that of 2,000 of its test images
    deep_autoencoder    784-400-200-100-25-100-200-400-784 with tanh hidden layers on 20,000 images of Fashion-MNIST; binary
                  cross-entropy of the pixels, averaged over pixels

The learning rates of the first two fall along half a cosine, to zero at the end. An epoch of theirs is a tenth of the training:
there are as many losses to compare. The target is where AdamW ends.

In all tasks some methods of second order run once more at their default arguments, with nothing tuned. SOAP is
`EigenAdam(basis="gradient")`; KL-Shampoo, of `benchmarks.kl_shampoo`, is neither one of the first order nor of this package, and
sets no targets.

Where no loss is named, the target is the one that the best of the first-order methods has, in the mean over the seeds, after all
its epochs.

Every optimizer is tuned on a full grid of trials, as many as for any other of the task, each with one seed, or with three where a
loss is named; these are not used again. The best is the one with the fewest epochs to that loss, or else the lowest loss after
the last epoch (a trial stops at that loss, or evaluates only then); it is then run with fresh seeds, in full. The loss is that of
the whole training set, where nothing else is said, after each epoch, not a running mean. All of it runs through plain `fit`, an
epoch in one `steps_per_execution`, since on small networks Python would otherwise be most of the time. A trial reuses the
compiled step: variables start over, learning rates and dampings are variables.

Seconds of cases that were measured at different times are compared by measuring them again, `--times`: all cases of a task at
their best settings in one process, an epoch of each in turn. Where that was not done they are those of the runs.
"""

import itertools
import math
import statistics

from benchmarks.grids import ARGUMENTS, COLOURS, DEFAULTS, FIRST_ORDER, GRIDS, SECOND_ORDER, TASKS

# What follows the name of an optimizer of which no argument is set.
AT_DEFAULTS = ", defaults"


def cases(quick):
    """One for each task and optimizer."""
    found = []
    for task, settings in TASKS.items():
        every = "by_name" in settings
        if quick and not every and task != "cnn":
            continue
        for optimizer in ("SGD", "KFAC", "HyLo-KID") if quick and not every else GRIDS[task]:
            case = {"name": f"{task}-{optimizer}", "task": task, "optimizer": optimizer, "seeds": 5, **settings}
            if "intervals" not in case and optimizer in ARGUMENTS:
                case["arguments"] = ARGUMENTS[optimizer]
            found.append({**case, "grid": grid_of(task, optimizer)})
        for optimizer in DEFAULTS.get(task, ()):
            case = {"name": f"{task}-{optimizer}-defaults", "task": task, "optimizer": f"{optimizer}{AT_DEFAULTS}"}
            case |= {"seeds": 5, **settings, "grid": {}}
            found.append({name: value for name, value in case.items() if name != "intervals"})
    return list(map(shortened, found)) if quick else found


def grid_of(task, optimizer):
    """For each argument the values that are tried."""
    grid = GRIDS[task][optimizer]
    if not isinstance(grid, dict):
        grid = dict(zip(("momentum", "learning_rate", "damping"), grid, strict=False))
    return {name: list(values) for name, values in grid.items()}


def shortened(case):
    """A case that takes a moment."""
    case = case | {"epochs": 3, "grid": first_points(case["grid"]), "trial_seeds": 1, "seeds": 2}
    # A part of the steps between two losses, which must divide a pass through the data.
    return case | ({"steps": 2, "epochs": 2} if "by_name" in case else {})


def first_points(grid):
    """The first value of each argument of a grid."""
    return {name: values[:1] for name, values in grid.items()}


def environment(case):
    """Of the process that measures a case."""
    return {"KERAS_BACKEND": case["backend"]}


def measure(case):
    """Trials, and runs of the best of them; of what `timings` gives, seconds by epoch of each case."""
    from benchmarks import trials

    if "timed" in case:
        return {"epoch_seconds": trials.epoch_seconds(case["timed"])}
    return trials.measured(case)


def timings(cases):
    """What measures the seconds of measured cases, those of a task beside each other: a case for each task."""
    found = []
    for task, of in by_task(cases).items():
        kept = [
            {name: value for name, value in case.items() if name not in ("trials", "runs", "epoch_seconds")}
            for case in of
        ]
        found.append({"name": f"{task}, seconds", "task": task, "backend": of[0]["backend"], "timed": kept})
    return found


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


def named_loss(case):
    """The loss that a case is to reach, or None where it is one that another optimizer ends with."""
    return None if isinstance(case["target"], str) else case["target"]


def end(case):
    """The mean loss over the seeds after the last epoch."""
    return sum(run["loss"][-1] for run in case["runs"]) / len(case["runs"])


def targets(payload):
    """For each task the loss to reach, where it is known."""
    found = {}
    for case in payload["cases"]:
        if named_loss(case) is not None:
            found[case["task"]] = case["target"]
        elif case["optimizer"] == case["target"]:
            found[case["task"]] = end(case)
        elif case["target"] is None and case["optimizer"] in FIRST_ORDER:
            found[case["task"]] = min(found.get(case["task"], float("inf")), end(case))
    return found


def needs(case, target):
    """Epochs and seconds to a target, medians over the seeds; infinite where most do not get there."""
    if case["optimizer"] == case["target"] or (case["optimizer"] in FIRST_ORDER and end(case) == target):
        # By definition; half of its runs end above their mean.
        ends = [(case["epochs"], elapsed(case, run)) for run in case["runs"]]
    else:
        ends = [(epochs_to(run["loss"], target), elapsed(case, run)) for run in case["runs"]]
    return {
        "epochs": statistics.median(epoch or math.inf for epoch, _ in ends),
        "seconds": statistics.median(seconds[epoch - 1] if epoch else math.inf for epoch, seconds in ends),
    }


def comparison(cases, target):
    """The least epochs and seconds of first and of second order in a task: `{unit: ((name, count), (name, count))}`.

    Methods of second order count at their defaults, too. It is empty where methods of one of the two are not measured.
    """
    found = {case["optimizer"]: needs(case, target) for case in cases}
    second = [name + suffix for name in SECOND_ORDER for suffix in ("", AT_DEFAULTS)]
    kinds = [[name for name in kind if name in found] for kind in (FIRST_ORDER, second)]
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
        asked = goals_of_rivals if isinstance(cases[task][0]["target"], str) else goals_of_orders
        found += asked(task, cases[task], target)
        found += goals_of_eigen_adam(task, cases[task])
    return found


def goals_of_orders(task, cases, target):
    """The best of second order beside the best of first order, in epochs and in seconds to a target."""
    found, compared = [], comparison(cases, target)
    for unit, most in (("epochs", 0.5), ("seconds", 1.0)) if compared else ():
        (first, of_first), (second, of_second) = compared[unit]
        share = of_second / of_first
        measured = f"{share:.2f} ({second}, {count(of_second)}, of {first}'s {count(of_first)})"
        if of_second == math.inf:
            measured = f"not reached ({first}: {count(of_first)})"
        met = share <= most
        why = "" if met else profile(cases, target, first, second)
        found.append((f"{unit} to the target, {task}", f"<= {most:.2f} of first order's", measured, met, why))
    return found


def goals_of_rivals(task, cases, target):
    """The best of second order, tuned and at defaults: epochs to where the target's optimizer ends, and its end beside Muon's."""
    found, of, first = [], {case["optimizer"]: case for case in cases}, cases[0]["target"]
    whole = needs(of[first], target)["epochs"]
    for suffix in ("", AT_DEFAULTS):
        methods = [name + suffix for name in SECOND_ORDER if name + suffix in of]
        if not methods:
            continue
        needed = {name: needs(of[name], target)["epochs"] for name in methods}
        second, lowest = min(methods, key=needed.get), min(methods, key=lambda name: end(of[name]))
        share, numbers = needed[second] / whole, f"({second}: {count(needed[second])}, {first}: {count(whole)})"
        measured = "not reached" if share == math.inf else f"{share:.2f} {numbers}"
        why = "" if share <= 0.5 else f"{lowest} ends at {end(of[lowest]):.4g}, {first} at {target:.4g}"
        name = f"epochs to {first}'s end, {task}{suffix}"
        found.append((name, f"<= 0.50 of {first}'s", measured, share <= 0.5, why))
        if "Muon" in of:
            ends = end(of[lowest]), end(of["Muon"])
            measured = f"{ends[0]:.4g} ({lowest}), {ends[1]:.4g} (Muon)"
            found.append((f"loss at the end, {task}{suffix}", "< Muon's", measured, ends[0] < ends[1], ""))
    return found


def goals_of_eigen_adam(task, cases):
    """Epochs of EigenAdam's default arguments to where tuned Adam ends, and of tuned EigenAdam to where tuned Muon does."""
    found, of = [], {case["optimizer"]: case for case in cases}
    for name, rival, most in ((f"EigenAdam{AT_DEFAULTS}", "Adam", 0.5), ("EigenAdam", "Muon", 2 / 3)):
        if name not in of or rival not in of:
            continue
        target, whole = end(of[rival]), of[rival]["epochs"]
        needed = needs(of[name], target)["epochs"]
        never = needed == math.inf
        measured = "not reached" if never else f"{needed / whole:.2f} ({count(needed)} of {whole})"
        why = f"{name} ends at {end(of[name]):.4g}, {rival} at {target:.4g}" if never else ""
        goal = f"epochs of {name}, to {rival}'s end, {task}"
        found.append((goal, f"<= {most:.2f} of {rival}'s", measured, needed <= most * whole, why))
    return found


def profile(cases, target, first, second):
    """What a method of second order takes beside one of first order; how near any comes where none gets there."""
    cases = {case["optimizer"]: case for case in cases}
    needed = {name: needs(cases[name], target)["epochs"] for name in (second, first)}
    if needed[second] == math.inf:
        ends = {name: statistics.median(run["loss"][-1] for run in case["runs"]) for name, case in cases.items()}
        nearest = min((name for name in ends if name.removesuffix(AT_DEFAULTS) in SECOND_ORDER), key=ends.get)
        return f"{nearest} ends at {ends[nearest]:.4g}, the target is {target:.4g}"
    each = [f"{count(e)} epochs of {1e3 * epoch_seconds(cases[name]):.3g} ms" for name, e in needed.items()]
    return f"{second} takes {each[0]}, {first} {each[1]}"


def elapsed(case, run):
    """Seconds of training after each epoch: those measured beside the other cases of the task, or else the run's own."""
    return list(itertools.accumulate(case.get("epoch_seconds", run["seconds"])))


def epoch_seconds(case):
    """Median seconds of an epoch."""
    times = [case["epoch_seconds"]] if "epoch_seconds" in case else [run["seconds"] for run in case["runs"]]
    return statistics.median(seconds for of_run in times for seconds in of_run)


def header(first, accuracy=False):
    """The first two lines of a Markdown table of `row`s."""
    columns = [first, "best of its trials", "trials", "epochs to target", "seeds that reach it", "seconds to it"]
    columns += ["ms per epoch", "final loss", *(["accuracy"] if accuracy else [])]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def row(name, case, target, mark=""):
    """What a case needs to reach a target, as a line of a Markdown table; `mark` follows its milliseconds."""
    runs = case["runs"]
    epochs = [epochs_to(run["loss"], target) for run in runs]
    reached = [(e, elapsed(case, run)[e - 1]) for e, run in zip(epochs, runs, strict=True) if e]
    best = ", ".join(f"{argument} {case['best'][argument]:g}" for argument in case["grid"])
    cells = [name, best or "-", str(len(case["trials"]))]
    cells += [spread([e for e, _ in reached], 1) if reached else f"> {case['epochs']}"]
    cells += [f"{len(reached)} of {len(runs)}", spread([t for _, t in reached], 2) if reached else "-"]
    cells += [f"{1e3 * epoch_seconds(case):.1f}{mark}", spread([run["loss"][-1] for run in runs], 5)]
    if "accuracy" in runs[0]:
        cells.append(spread([run["accuracy"][-1] for run in runs], 4))
    return f"| {' | '.join(cells)} |"


def task_table(cases, target):
    """A Markdown table of the cases of one task."""
    one = cases[0]
    title = f"**{one['task']}**: to a loss of {target:.4g}; batches of {one['batch_size']}, {one['epochs']} epochs"
    if "by_name" in one:
        title += f" of {one['steps']} steps"
    if "schedule" in one:
        title += f", at rates that fall along a {one['schedule']}"
    lines = header("optimizer", "accuracy" in one["runs"][0])
    timed = any("epoch_seconds" in case for case in cases)
    for case in cases:
        lines.append(row(case["optimizer"], case, target, "*" if timed and "epoch_seconds" not in case else ""))
    return "\n".join([f"{title}.", "", *lines])


def table(payload):
    """A Markdown table for each task."""
    cases = by_task(payload["cases"])
    return "\n\n".join(task_table(cases[task], target) for task, target in targets(payload).items())


def plot(payload, path):
    """Median and range over the seeds of the loss, by epoch and by second."""
    import numpy as np
    from matplotlib.figure import Figure

    goals, cases = targets(payload), by_task(payload["cases"])
    if not goals:
        return
    figure = Figure(figsize=(10, 3.4 * len(goals)), layout="constrained")
    for row, (task, target) in zip(figure.subplots(len(goals), 2, squeeze=False), goals.items(), strict=True):
        for case in cases[task]:
            losses = np.array([run["loss"] for run in case["runs"]])
            seconds = np.median([elapsed(case, run) for run in case["runs"]], axis=0)
            name = case["optimizer"]
            line = {"color": COLOURS[name.removesuffix(AT_DEFAULTS)], "ls": "--" if name.endswith(AT_DEFAULTS) else "-"}
            for axis, x in zip(row, (np.arange(1, losses.shape[1] + 1), seconds), strict=True):
                axis.plot(x, np.median(losses, axis=0), linewidth=1.5, label=name, **line)
                axis.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=line["color"], alpha=0.12, lw=0)
        rivals = isinstance(cases[task][0]["target"], str)
        for axis, label in zip(row, ("epoch", "seconds of training, after compiling"), strict=True):
            axis.axhline(target, color="black", linestyle=":", linewidth=1)
            axis.set(yscale="log", xlabel=label, ylabel=f"{task}: {'validation' if rivals else 'training'} loss")
            lowest = min(run["loss"][-1] for case in cases[task] for run in case["runs"])
            axis.set_ylim(bottom=max(1e-6, 0.8 * lowest))
            if task.endswith("autoencoder"):
                axis.set(yscale="linear", ylim=(0.97 * lowest, 0.45))
            elif rivals:
                axis.set(yscale="linear", ylim=(0.97 * lowest, 1.5 * target))
            axis.grid(alpha=0.3)
        row[0].legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=90)
