"""What each kind of layer of a language model adds to a step: statistics, refreshes and preconditioning.

The network is that of `benchmarks.costs`. A case trains it on one backend with one method, captured whole and once for each kind
of layer with the layers of that kind alone, turn by turn, beside the same network that is not captured. What is not captured
takes the step of that one, SGD's or Adam's. As for step costs, a part is the difference of the medians of two kinds of step;
what does not depend on the number of layers is in the line of each kind.
"""

from benchmarks import costs
from benchmarks.methods import BESIDE

METHODS, BACKENDS, NETWORK = ("kfac", "ekfac", "eigen-adam", "thor"), ("tensorflow", "jax"), "language-model"
KINDS = ("attention", "dense", "embedding", "normalization")
environment = costs.environment


def cases(quick):
    """One for each method and backend."""
    rounds = {"rounds": 3, "seconds": 0 if quick else costs.SECONDS}
    return [
        {"name": f"{method}-{mode}", "method": method, "mode": mode, **rounds}
        for method in (METHODS[:1] if quick else METHODS)
        for mode in BACKENDS
    ]


def kind_of(layer):
    """The kind of a layer, or None."""
    import keras

    from keras_ngd.capturing.walk import path_of

    if "attention" in path_of(layer):
        return "attention"
    if isinstance(layer, keras.layers.Embedding):
        return "embedding"
    if isinstance(layer, keras.layers.Dense):
        return "dense"
    return "normalization" if isinstance(layer, keras.layers.LayerNormalization) else None


def selected(kind):
    """Arguments of `capture` for the layers of one kind."""
    return {"skip": lambda layer: kind_of(layer) != kind, "include": lambda layer: kind_of(layer) == kind}


def measure(case):
    """Medians and ranges in milliseconds of the kinds of step of the network that is not captured, is whole, and by kind."""
    from benchmarks.alone import alone

    of_costs = {"network": NETWORK, "mode": case["mode"]}
    models = {"plain": costs.Timed(of_costs, BESIDE.get(case["method"], "sgd"))}
    models["all"] = costs.Timed(of_costs, case["method"])
    models |= {kind: costs.Timed(of_costs, case["method"], **selected(kind)) for kind in KINDS}
    matrices = {name: len(model.statistics) for name, model in models.items()}
    for model in models.values():
        model.seconds()
    with alone():
        found = costs.timed(models, case["rounds"], case["seconds"])
    return {"matrices": matrices, **{name: found[name] for name in ("milliseconds", "ranges", "device")}}


def table(payload):
    """A Markdown table for each case."""
    parts = costs.PARTS
    columns = ["captured", "matrices", *(f"{part}, ms" for part in parts), "of a step at (10,100)"]
    found = []
    for case in payload["cases"]:
        plain = case["milliseconds"]["plain"]["plain"]
        beside = costs.NAMES[BESIDE.get(case["method"], "sgd")]
        title = f"**{case['method']}, {case['mode']}**: a step of {beside} takes {plain:.1f} ms."
        lines = [title, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for kind in ("all", *KINDS):
            of = case["milliseconds"][kind]
            taken = costs.parts(of, plain)
            share = costs.cost(of, *costs.INTERVALS[-1]) / plain - 1
            cells = [kind, str(case["matrices"][kind]), *(f"{taken[part]:.2f}" for part in parts), f"{share:+.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
        found.append("\n".join(lines))
    return "\n\n".join(found)
