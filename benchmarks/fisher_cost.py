"""What an update costs whose labels the model draws, beside one of the data's labels with as many examples.

A case trains one network on one backend with a method and both kinds of Fisher matrix, turn by turn, beside SGD. Statistics are
those of a quarter of the batch in both. The table of positions, which no example has for itself, is not captured.
"""

from benchmarks import costs

NETWORKS, BACKENDS, METHODS = ("resnet32", "unet", "language-model"), ("tensorflow", "jax"), ("kfac", "thor")
FRACTION = 0.25
KINDS = {
    "empirical": {"statistics_fraction": FRACTION},
    "sampled": {"statistics_fraction": FRACTION, "fisher": "sampled", "losses_per_example": "auto"},
}
# Steps, and the most that one of a sampled matrix may take, of one of the empirical matrix.
STEPS, MOST = {"plain": "nothing due", "statistics": "statistics", "inverses": "all due"}, 1.05
# Differences of a few percent are looked for.
SECONDS = 40
environment = costs.environment


def cases(quick):
    """One for each network and backend."""
    settings = {"rounds": 3, "seconds": 0 if quick else SECONDS}
    networks = costs.QUICK[0][:1] if quick else NETWORKS
    return [
        {"name": f"{network}-{mode}", "network": network, "mode": mode, "methods": list(METHODS), **settings}
        for network in networks
        for mode in BACKENDS
    ]


def measure(case):
    """Medians and ranges in milliseconds of each kind of step of SGD, and of each method with each kind of matrix."""
    from benchmarks.alone import alone
    from keras_ngd.capturing.walk import path_of

    models = {"sgd": costs.Timed(case, "sgd")}
    for method in case["methods"]:
        for kind, arguments in KINDS.items():
            models[f"{method}, {kind}"] = costs.Timed(
                case, method, arguments, skip=lambda layer: path_of(layer).startswith("positions")
            )
    for model in models.values():
        model.seconds()
    with alone():
        found = costs.timed(models, case["rounds"], case["seconds"])
    return {name: found[name] for name in ("milliseconds", "ranges", "device")}


def _both(case):
    """Yields methods, kinds of step, and what one takes with either matrix."""
    for method in case["methods"]:
        empirical, sampled = (case["milliseconds"][f"{method}, {kind}"] for kind in KINDS)
        for step in STEPS:
            if step in empirical:
                yield method, step, empirical[step], sampled[step]


def table(payload):
    """A Markdown table for each case."""
    columns = ["method", "step", "empirical, ms", "sampled, ms", "of the empirical"]
    found = []
    for case in payload["cases"]:
        sgd = case["milliseconds"]["sgd"]["plain"]
        title = f"**{case['network']}, {case['mode']}**: a step of SGD takes {sgd:.1f} ms."
        lines = [title, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for method, step, empirical, sampled in _both(case):
            cells = [method, STEPS[step], f"{empirical:.1f}", f"{sampled:.1f}", f"{sampled / empirical:.3f}x"]
            lines.append(f"| {' | '.join(cells)} |")
        found.append("\n".join(lines))
    return "\n\n".join(found)


def goals(payload):
    """That drawn labels cost next to nothing: see `costs.goals`."""
    found = []
    for case in payload["cases"]:
        for method, step, empirical, sampled in _both(case):
            name = f"a sampled step of {method}, {STEPS[step]}, {case['network']}, {case['mode']}"
            share = sampled / empirical
            why = "" if share <= MOST else f"{sampled - empirical:+.1f} ms"
            found.append((name, f"<= {MOST:.2f}x of the empirical", f"{share:.3f}x", share <= MOST, why))
    return found
