"""Whether statistics of labels that the model draws train better than those of the data's own gradients (`fisher=`).

The trainings are those of `benchmarks.tasks`, with its grids, trials and seeds, and `fisher="sampled"`; they are compared with
that benchmark's result. Of the two Transformers the positions, which no example has for itself, are not captured then. On
`vit` and `deep_autoencoder` the defaults alone run: a grid takes an hour there. What takes long runs where it is named
(`--only='text-*'`).
"""

from benchmarks import results, robustness, tasks

OPTIMIZERS = ("EigenAdam", "KFAC", "THOR")
AT_DEFAULTS_ALONE = ("vit", "deep_autoencoder")
# Nothing is timed here, either.
environment = robustness.environment


def cases(quick):
    """Those of `benchmarks.tasks` of these optimizers, with sampled labels."""
    found = []
    for case in tasks.cases(False):
        tuned = not case["optimizer"].endswith(tasks.AT_DEFAULTS)
        chosen = case["optimizer"].removesuffix(tasks.AT_DEFAULTS) in OPTIMIZERS
        if chosen and not (tuned and case["task"] in AT_DEFAULTS_ALONE):
            found.append(with_drawn_labels(case))
    return [tasks.shortened(case) for case in found if case["name"] == "mlp-KFAC"] if quick else found


def with_drawn_labels(case):
    """A case of `benchmarks.tasks`, with labels that the model draws."""
    arguments = {**case.get("arguments", {}), "fisher": "sampled"}
    if "intervals" in case and case["optimizer"] != "EigenAdam":
        # The loss tells how many values there are for each example.
        arguments["losses_per_example"] = "auto"
    # Positions are the same for all examples of a batch.
    skipped = {"skip": "positions"} if case["task"] in ("text", "vit") else {}
    return {**case, "arguments": arguments, **skipped}


def measure(case):
    """Trials, and runs of the best of them."""
    from benchmarks import trials

    return trials.measured(case)


def compared(payload):
    """Pairs of measured cases, the empirical one and the sampled one, and the task's target; none where one is missing."""
    if not results.path_of("tasks").exists():
        return []
    other = results.load("tasks")
    targets, empirical = tasks.targets(other), {case["name"]: case for case in other["cases"]}
    return [
        (empirical[case["name"]], case, targets[case["task"]])
        for case in payload["cases"]
        if case["name"] in empirical and case["task"] in targets
    ]


def table(payload):
    """A Markdown table: ends and epochs to the task's target of both, side by side."""
    columns = [
        "task",
        "optimizer",
        "seeds",
        "final loss, empirical",
        "sampled",
        "epochs to the target, empirical",
        "sampled",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for *both, target in compared(payload):
        ends = [tasks.spread([run["loss"][-1] for run in case["runs"]], 5) for case in both]
        epochs = [tasks.count(tasks.needs(case, target)["epochs"]) for case in both]
        if tasks.end(both[1]) < tasks.end(both[0]):
            ends[1] = f"**{ends[1]}**"
        else:
            ends[0] = f"**{ends[0]}**"
        cells = [both[1]["task"], both[1]["optimizer"], str(len(both[1]["runs"])), *ends, *epochs]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
