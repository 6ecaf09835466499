"""Every optimizer at its default arguments, on networks, losses and tables: what a user gets who tunes nothing.

    networks   the five of `benchmarks.tasks`; `characters`, a Transformer that predicts the next character of the Python standard
               library's source; `files`, a Transformer that tells which file 64 characters are from
    losses     twenty of Keras's losses, each on a network of two hidden layers on the digits
    tables     scikit-learn's, as they are and standardized, on a network of two hidden layers

All train on the first four fifths of the data and are scored on the rest: by accuracy where there are classes, else by the
loss. The loss is that of all training data after the last epoch.
"""

import math
import statistics

OPTIMIZERS = ("SGD", "Adam", "EigenAdam", "KFAC", "EKFAC", "THOR", "SKFAC", "SNGD", "HyLo")
SECOND_ORDER = OPTIMIZERS[2:]
NETWORKS = {"cnn": 10, "mlp": 10, "autoencoder": 40, "resnet": 8, "unet": 8, "characters": 3, "files": 8}
LOSSES = (
    "mean_squared_error",
    "mean_absolute_error",
    "mean_absolute_percentage_error",
    "mean_squared_logarithmic_error",
    "huber",
    "log_cosh",
    "cosine_similarity",
    "poisson",
    "kl_divergence",
    "categorical_crossentropy",
    "sparse_categorical_crossentropy",
    "categorical_focal_crossentropy",
    "binary_crossentropy",
    "binary_focal_crossentropy",
    "hinge",
    "squared_hinge",
    "categorical_hinge",
    "tversky",
    "dice",
    "circle",
)
TABLES = ("diabetes", "linnerud", "iris", "wine", "breast_cancer", "digits")


def cases(quick):
    """One for each problem, with all optimizers."""
    problems = [("networks", name, epochs) for name, epochs in NETWORKS.items()]
    problems += [("losses", name, 10) for name in LOSSES]
    problems += [("tables", name + kind, 30) for name in TABLES for kind in ("", " standardized")]
    found = [
        {"name": f"{kind}: {name}", "kind": kind, "problem": name, "epochs": epochs, "optimizers": list(OPTIMIZERS)}
        for kind, name, epochs in problems
    ]
    if not quick:
        return found
    return [
        case | {"epochs": 2, "optimizers": ["SGD", "KFAC"]} for case in found if case["problem"] in ("iris", "huber")
    ]


def environment(case):
    """Of the process that measures a case."""
    return {"KERAS_BACKEND": "tensorflow"}


def measure(case):
    """Final losses, scores and clipped shares by optimizer."""
    from benchmarks.problems import run

    return {"found": {name: run(case["kind"], case["problem"], name, case["epochs"]) for name in case["optimizers"]}}


def merged(before, case):
    """A case with what was measured of other optimizers before."""
    found = {**before["found"], **case["found"]}
    names = [name for name in OPTIMIZERS if name in found]
    return {**case, "optimizers": names, "found": {name: found[name] for name in names}}


def measured(payload, names):
    """Those of some optimizers that any problem was measured with."""
    return [name for name in names if any(name in case["found"] for case in payload["cases"])]


def _failed(found):
    return found["loss"] is None


def worse_than_sgd(case, name):
    """Whether a method ends above SGD's loss by more than a fiftieth of it, or nowhere."""
    loss, sgd = case["found"][name]["loss"], case["found"]["SGD"]["loss"]
    if loss is None or sgd is None:
        return loss is None
    return loss > sgd + 0.02 * abs(sgd)


def at_chance(case, name):
    """Whether a classifier scores no better than one that always names the most frequent class."""
    score, chance = case["found"][name]["accuracy"], case["found"][name]["chance"]
    return score is not None and score <= chance + 0.02 and case["found"][name]["loss"] is not None


def goals(payload):
    """Goals of defaults: name, what is asked, what is measured, whether it is met, where it fails."""
    found = []
    for name in measured(payload, ("KFAC", "EKFAC", "THOR", "HyLo")):
        bad = [c["problem"] for c in payload["cases"] if name in c["found"] and worse_than_sgd(c, name)]
        found.append(
            (f"defaults, {name}: not above SGD's loss", "all", _of(payload, name, bad), not bad, ", ".join(bad))
        )
        lost = [c["problem"] for c in payload["cases"] if name in c["found"] and at_chance(c, name)]
        found.append((f"defaults, {name}: not at chance", "all", _of(payload, name, lost), not lost, ", ".join(lost)))
    for name in measured(payload, SECOND_ORDER):
        above = [c["problem"] for c in payload["cases"] if name in c["found"] and behind_adam(c, name)]
        found.append((f"defaults, {name}: below Adam's loss", "most", _of(payload, name, above), True, ""))
    return found


def behind_adam(case, name):
    """Whether a method ends above Adam's loss, both at defaults."""
    loss, adam = case["found"][name]["loss"], case["found"].get("Adam", {"loss": None})["loss"]
    return loss is None or (adam is not None and loss > adam)


def median_share(cases, name):
    """The median over the problems of a method's final loss in Adam's, where both are above 0."""
    pairs = [(case["found"][name]["loss"], case["found"]["Adam"]["loss"]) for case in cases]
    return statistics.median(own / adam for own, adam in pairs if own is not None and adam and own > 0 and adam > 0)


def _of(payload, name, bad):
    count = sum(name in case["found"] for case in payload["cases"])
    return f"{count - len(bad)} of {count}"


def _cell(found):
    if _failed(found):
        return "not finite"
    score = f"{found['accuracy']:.3f}" if found["accuracy"] is not None else f"{found['test_loss']:.3g}"
    clipped = "" if found["clipped"] is None else f"; {found['clipped']:.0%}"
    return f"{found['loss']:.3g} ({score}{clipped})"


def table(payload):
    """A Markdown table for each kind of problem: loss (test score; share of steps that a clip shortened)."""
    parts = []
    for kind in ("networks", "losses", "tables"):
        chosen = [case for case in payload["cases"] if case["kind"] == kind]
        if not chosen:
            continue
        names = measured({"cases": chosen}, OPTIMIZERS)
        lines = [f"| {kind} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for case in chosen:
            best = min(
                (f["loss"] for f in case["found"].values() if not _failed(f) and not math.isnan(f["loss"])),
                default=None,
            )
            cells = []
            for found in (case["found"].get(name) for name in names):
                cell = "-" if found is None else _cell(found)
                cells.append(f"**{cell}**" if found is not None and found["loss"] == best else cell)
            lines.append(f"| {case['problem']}, {case['epochs']} epochs | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
