"""Where trainings end with learning rates from a tenth of the default to ten times as much, all else at its default.

The tasks are those of `benchmarks.tasks`, with their batches, epochs and schedules; `text` runs where it is named
(`--only='text-*'`). One seed for each rate, that of the trials there.

Of each optimizer the width is the quotient of the largest and the smallest rate around its best that end within a twentieth above
the loss of its best; between rates the logarithm of the loss is interpolated along that of the rate. Losses below the one that a
task names (0.01) count as that: what is below is as good, and its quotients say nothing. Where the width ends with the rates
that were tried it is a lower bound, as where the best of an optimizer is the first or the last of its rates.
"""

import math

from benchmarks import results, tasks
from benchmarks.grids import ARGUMENTS, COLOURS, TASKS

NAMES, OPTIMIZERS = ("mlp", "autoencoder", "cnn", "text"), ("EigenAdam", "Adam", "Muon", "KFAC")
# Of the default rate.
FACTORS = tuple(round(10 ** (power / 3), 4) for power in range(-3, 4))
WITHIN = 1.05
# What the width of EigenAdam's rates is to be, at least.
GOAL = 10


def cases(quick):
    """One for each task and optimizer."""
    found = []
    for task in NAMES:
        # At their defaults methods of second order have intervals of their own.
        settings = {name: value for name, value in TASKS[task].items() if name != "intervals"}
        for optimizer in OPTIMIZERS:
            case = {"name": f"{task}-{optimizer}", "task": task, "optimizer": optimizer, **settings}
            if optimizer == "Muon" and "by_name" in settings:
                case["arguments"] = ARGUMENTS["Muon"]
            found.append({**case, "grid": {"learning_rate": []}, "factors": list(FACTORS)})
    if not quick:
        return found
    return [{**case, "epochs": 2, "factors": [0.5, 1, 2]} for case in found if case["name"] in ("mlp-Adam", "mlp-KFAC")]


def environment(case):
    """Of the process that measures a case."""
    # Nothing is timed here, and all cases may run beside other work.
    return {"KERAS_BACKEND": case["backend"], results.THREADS: "1"}


def measure(case):
    """The default rate, and the losses after the last epoch with multiples of it."""
    from benchmarks import trials

    run, default = trials.runs_of(case), trials.default_rate(case)
    rates = [default * factor for factor in case["factors"]]
    ends = [run({"learning_rate": rate}, trials.TRIAL_SEED, every=case["epochs"])["loss"][-1] for rate in rates]
    return {"default": default, "rates": [float(f"{rate:.4g}") for rate in rates], "final_loss": ends}


def width(case):
    """The quotient of the largest and the smallest rate that end near the best, and whether it is a lower bound."""
    losses, logs = [max(loss, 1e-30) for loss in case["final_loss"]], [math.log(rate) for rate in case["rates"]]
    best = min(range(len(losses)), key=losses.__getitem__)
    most, ends, bounded = WITHIN * max(losses[best], tasks.named_loss(case) or 0.0), [], True
    for step, last in ((-1, 0), (1, len(losses) - 1)):
        i = best
        while i != last and losses[i + step] <= most:
            i += step
        bounded = bounded and i != last
        # The way to the next rate at which the loss is passed.
        share = 0.0 if i == last else math.log(most / losses[i]) / math.log(losses[i + step] / losses[i])
        ends.append(logs[i] + share * (logs[i + step] - logs[i]) if share else logs[i])
    return math.exp(ends[1] - ends[0]), not bounded


def by_task(cases):
    """For each task its cases."""
    return {task: of for task in NAMES if (of := [case for case in cases if case["task"] == task])}


def _width_as_text(case):
    ratio, least = width(case)
    return f"{'>= ' if least else ''}{ratio:.1f}x"


def _loss_as_text(loss):
    return "diverged" if loss >= 1e6 else f"{loss:.4g}"


def table(payload):
    """A Markdown table for each task."""
    found = []
    for task, cases in by_task(payload["cases"]).items():
        factors = [f"{factor:.2g}x" for factor in cases[0]["factors"]]
        columns = ["optimizer", "default rate", *factors, "rates within 5% of the best"]
        lines = [f"**{task}**: loss after {cases[0]['epochs']} epochs, by the rate in default rates.", ""]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for case in cases:
            cells = [case["optimizer"], f"{case['default']:g}", *map(_loss_as_text, case["final_loss"])]
            lines.append(f"| {' | '.join([*cells, _width_as_text(case)])} |")
        found.append("\n".join(lines))
    return "\n\n".join(found)


def goals(payload):
    """Goals of EigenAdam's rates: name, what is asked, what is measured, whether it is met, how the others do."""
    found = []
    for task, cases in by_task(payload["cases"]).items():
        widths = {case["optimizer"]: _width_as_text(case) for case in cases}
        for case in cases:
            if case["optimizer"] == "EigenAdam":
                met = width(case)[0] >= GOAL
                others = ", ".join(f"{name}: {text}" for name, text in widths.items() if name != "EigenAdam")
                name = f"EigenAdam's rates within 5% of the best, {task}"
                found.append((name, f">= {GOAL}x", widths["EigenAdam"], met, "" if met else others))
    return found


def plot(payload, path):
    """The loss after the last epoch by learning rate; the default rates are marked."""
    from matplotlib.figure import Figure

    found = by_task(payload["cases"])
    if not found:
        return
    figure = Figure(figsize=(4 * len(found) + 1, 3.6), layout="constrained")
    for axis, (task, cases) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        lowest = min(min(case["final_loss"]) for case in cases)
        for case in cases:
            colour = COLOURS[case["optimizer"]]
            axis.plot(
                case["rates"], case["final_loss"], color=colour, marker=".", linewidth=1.5, label=case["optimizer"]
            )
            axis.axvline(case["default"], color=colour, linestyle=":", linewidth=0.8)
        axis.set(xscale="log", xlabel="learning rate", ylabel="final loss", title=task)
        if (named := tasks.named_loss(cases[0])) is not None:
            axis.axhline(named, color="black", linestyle=":", linewidth=1)
            axis.set(yscale="log", ylim=(max(1e-6, 0.5 * lowest), 5))
        else:
            axis.set_ylim(0.97 * lowest, 2 * lowest)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=90)
