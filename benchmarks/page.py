"""Makes `docs/benchmarks.md` of the results that are there."""

import pathlib

from benchmarks import harness, results

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "benchmarks.md"
# Asked of all that runs without being named.
MINUTES = 60
SECTIONS = {
    "costs": (
        "Step cost",
        "What a step costs in steps of SGD with momentum, on the same network, backend and batch, all in one run, turn by turn. "
        "`(f,i)` are the steps between updates of the statistics and between refreshes of the inverses; a cost is the average "
        "over a whole cycle. SKFAC, SNGD and HyLo have one interval, the second. THOR renews all layers at every refresh here, "
        "EKFAC and EigenAdam all bases (`inverses`); `captured` is SGD on a model captured for KFAC that never records. "
        "EigenAdam's preconditioning is what its step has beyond Adam's.",
    ),
    "startup": (
        "The first step",
        "What the first step takes in plain `fit`, in seconds of the processor, each in a process of its own: tracing, what the "
        "backend makes of the program, and a step on which everything is due. Nodes are those of TensorFlow's graph with its "
        "functions, or operations of JAX's StableHLO; beside them those of each package of `keras_ngd`.",
    ),
    "kinds": (
        "A language model's step by kind of layer",
        "What the layers of each kind add to a step of the language model above when they alone are captured, in one run, turn "
        "by turn, beside the network that is not captured, whose step is SGD's, or of EigenAdam Adam's. What a captured network "
        "takes whatever the number of its layers is in each line.",
    ),
    "stagger": (
        "Refreshes spread over steps",
        "The longest step of an `inverse_interval` of 20 with `stagger=True`, which refreshes a share of the layers in a step, "
        "and without, of KFAC on a ResNet-32 of twice the channels with batches of 8. Statistics are recorded in the first step "
        "alone. Processor milliseconds; of each step of a round the median over four.",
    ),
    "tasks": (
        "Convergence",
        "Epochs and seconds to a target loss, each optimizer tuned on a grid of as many trials with seeds of their own, then run "
        "with three or five fresh seeds. The loss is that of the whole training set after each epoch, for `text` and `vit` that "
        "of data not trained on; seconds are of training alone, after compiling, an epoch in one `steps_per_execution`. Where "
        "they were measured anew (`--times`), all optimizers of a task trained an epoch each in turn, in one process; a * marks "
        "lines of such a task that were not, whose seconds are those of their runs. Adam's "
        "momentum is its `beta_1`. Means over the seeds that reach the target. Which ranges the grids cover was explored before, "
        "on the seeds of the trials. Lines with `defaults` are not tuned: no argument is set. SOAP is "
        '`EigenAdam(basis="gradient")`; KL-Shampoo, written for this benchmark, is counted to neither order. The tasks are '
        "described in `benchmarks/tasks.py`; `text`, `vit` and `deep_autoencoder` are on real data and run where they are named "
        "(`--only='text-*'`).",
    ),
    "fisher": (
        "Labels that the model draws",
        'Trainings of the tasks above with `fisher="sampled"`, tuned on the same grids and run with the same seeds, beside those '
        "with the empirical Fisher matrix; the lower loss in bold. Epochs are medians over the seeds to the task's target.",
    ),
    "fisher_cost": (
        "What drawn labels cost",
        "Steps with the statistics of a quarter of the batch, of labels that the model draws and of the data's, in one run, turn "
        "by turn. The table of positions is not captured.",
    ),
    "defaults": (
        "At defaults",
        "Every optimizer at its default arguments, nothing tuned: the loss of the training data after the last epoch, in "
        "brackets the test accuracy (where there are no classes, the test loss) and the share of steps that a clip shortened; "
        "the lowest loss in bold. One seed. Tables are scikit-learn's, as they are and standardized.",
    ),
    "robustness": (
        "Learning rates",
        "The loss of tasks above after the last epoch, with learning rates from a tenth of the default to ten times as much and "
        "all other arguments at their defaults; one seed. The last column is the quotient of the largest and the smallest rate "
        "around an optimizer's best whose loss is at most 1.05 times its best, interpolated between rates; losses below the one "
        "that a task names (0.01) count as that. Where it ends with the rates that were tried it is a lower bound (`>=`).",
    ),
    "ablations": (
        "The papers' ideas one by one",
        "The digits CNN with each variant to a loss of 0.05, tuned over four learning rates with one seed, then run with five "
        "fresh ones; otherwise as above. THOR's blocks have 16 rows and columns here; without its trace rule all layers renew "
        "their inverses at every refresh.",
    ),
    "peers": (
        "Beside kfac-jax",
        "KFAC of this package and of kfac-jax 0.0.8 on the same Keras model, data, batch and jax, in one run, turn by turn, in "
        "an environment of their own (`.venv-peers`, made by the benchmark). Of kfac-jax its `Optimizer` is used, with its "
        "automatic registration of layers and without its adaptive damping and rates. Each is tuned on a grid of as many trials, "
        "with one seed, in ranges explored for each before; then run with five fresh seeds.",
    ),
    "gpu": (
        "On a GPU",
        "As step costs above, with JAX on a GPU (`benchmarks/on_gpu.sh` on a machine without a network).",
    ),
    "eigenvectors": (
        "Renewing an eigenbasis",
        "What EKFAC and EigenAdam take to renew the bases of matrices of one size, on a machine that others used, too (its load "
        "is the last column). A QR factorization would be the plain way to take a step of orthogonal iteration; "
        "`keras_ngd/linalg/gram_schmidt.py` has the one that is taken.",
    ),
    "update_cost": (
        "A refresh of ResNet-50's inverses",
        "One refresh of all inverses at the sizes of its layers (224x224, 1000 classes): KFAC's whole factors, THOR's blocks.",
    ),
    "row_cost": (
        "An update of HyLo for ResNet-50",
        "One update for ResNet-50's layers against one of KFAC's, batches of 128.",
    ),
    "communication": (
        "Communication",
        "What a worker receives of the others for one step with an update, counted (and, in brackets, by the formulas of "
        "`keras_ngd.analysis.received`), on the 3C1F network with 16 examples a worker; and projected for ResNet-50 with 80. "
        "`python -m keras_ngd.analysis cost_model` projects times as well, from what the machine computes in a second.",
    ),
    "replicas": (
        "Replicas of a strategy",
        "What a refresh adds to a step of KFAC on ResNet-32 (batch 32), on replicas that are parts of one CPU, where each "
        "inverts its share of the layers and gets the others', and where each inverts all.",
    ),
    "thor_convergence": (
        "THOR, KFAC and Momentum on images",
        "`examples/cifar_resnet.py` with its defaults and 7 epochs, on 4,096 drawn 32x32 images in ten classes. KFAC and THOR "
        "have the paper's learning rate and damping, untuned; Momentum has the best of three learning rates. All fall tenfold "
        "after each third of the epochs, as in the paper, which leaves Momentum little time: this is about the start of a "
        "training. Seconds are without the first step, whose tracing takes up to two and a half epochs.",
    ),
    "row_convergence": (
        "HyLo, SKFAC and KFAC on images",
        "`examples/fashion_3c1f.py` and `examples/unet_segmentation.py` with their defaults, three seeds. Settings are the best "
        "of three to fifteen trials for each method. The targets are what KFAC can be counted on to reach: the lowest of its "
        "best scores.",
    ),
}


def section(name):
    """A benchmark's part of the page."""
    title, text = SECTIONS[name]
    path = results.path_of(name)
    command = (
        f"python -m benchmarks {name}" if hasattr(harness.module_of(name), "cases") else f"python -m benchmarks.{name}"
    )
    parts = [f"## {title}", text, f"`{command}`"]
    if not path.exists():
        return "\n\n".join([*parts, "Not measured."])
    payload = results.load(name)
    parts.append(harness.module_of(name).table(payload))
    if path.with_suffix(".png").exists():
        parts.append(f"![{title}](../benchmarks/results/{name}.png)")
    return "\n\n".join([*parts, results.source(name, payload)])


def took():
    """A line on how long all that runs without being named took, as a list; an empty one where it is not known."""
    found = {name: results.load(name).get("minutes") for name in harness.USUAL if results.path_of(name).exists()}
    if len(found) < len(harness.USUAL) or None in found.values():
        return []
    total, parts = sum(found.values()), ", ".join(f"{name} {minutes:.0f}" for name, minutes in found.items())
    met, why = ("yes", "") if total < MINUTES else ("no", parts)
    return [f"| minutes of all of {', '.join(found)} | < {MINUTES} on two cores | {total:.0f} | {met} | {why} |"]


def goals():
    """The goals of all that is measured, beside what is."""
    lines = [
        "| goal | asked | measured | met | where it goes, of the step that it is compared with |",
        "|---|---|---|---|---|",
        *took(),
    ]
    for name in SECTIONS:
        module = harness.module_of(name)
        if results.path_of(name).exists() and hasattr(module, "goals"):
            for goal, asked, measured, met, why in module.goals(results.load(name)):
                lines.append(f"| {goal} | {asked} | {measured} | {'yes' if met else 'no'} | {why} |")
    return "\n".join(["## Goals", "", *lines])


def write():
    """Writes the page."""
    head = "# Benchmarks\n\nMade by `python -m benchmarks` (`--render` makes the page alone): no figure here is typed."
    PAGE.write_text("\n\n".join([head, goals(), *map(section, SECTIONS)]) + "\n")
