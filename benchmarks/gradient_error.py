"""What HyLo's few rows lose: errors of the preconditioned gradient, ranks of the kernel matrices, and the decomposition.

    python -m benchmarks.gradient_error                       # both networks, some minutes on two cores
    python -m benchmarks.gradient_error --networks 3c1f
    python -m benchmarks.gradient_error --render              # table and plot of the results that are there

Two networks are trained with Adam: the HyLo paper's 3C1F on the digits, and ResNet-32 on the drawn 32x32 images. On one batch,
the same at all times, before training and after some of the epochs:

    error           of KID's and KIS's preconditioned gradient against SNGD's (the paper's Figure 12)
    rank            of each layer's kernel matrix: eigenvalues that make up 90% of their sum (Figure 10)
    decomposition   `|Q - P Q_S| / |Q|` of `linalg.interpolative` over that of scipy's, which is by pivoted QR in float64
"""

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from examples import datasets  # isort: skip  (before keras: it imports TensorFlow without its greetings)
import keras
import numpy as np
from absl import app, flags
from keras import ops

from benchmarks import results
from examples.networks import cnn_3c1f, resnet32
from keras_ngd.analysis import gradient_errors, kernel_ranks
from keras_ngd.analysis.layer_rows import RowProbe
from keras_ngd.linalg import interpolative

NETWORKS = {
    "3c1f": {"make": lambda: cnn_3c1f((8, 8, 1)), "data": ("digits", 16.0), "points": (0, 1, 2, 4, 8, 12)},
    "resnet32": {"make": resnet32, "data": ("shapes32", 255.0), "points": (0, 1, 2, 3, 4, 5)},
}
RANKS, FIGURE_RANK = (0.05, 0.1, 0.2, 0.4), 0.1
SAMPLINGS = ("priority", "paper")
RELATIVE_DAMPINGS = (0.1, 0.01)
BATCH_SIZES = (128, 256, 512)
DECOMPOSITION_RANKS = (0.05, 0.1, 0.2, 0.5)
# Where scipy's error is smaller, ours is float32's rounding.
SMALLEST_ERROR = 1e-5

FLAGS = flags.FLAGS
# Not when imported for its table: other benchmarks' flags have the same names.
if __name__ == "__main__":
    flags.DEFINE_list("networks", list(NETWORKS), "Networks to measure.")
    flags.DEFINE_integer("batch_size", 128, "Examples a step, and in the batch of the errors.", lower_bound=20)
    flags.DEFINE_float("learning_rate", 2e-3, "Adam's.")
    flags.DEFINE_integer("draws", 8, "Samples that KIS's errors are means of.", lower_bound=1)
    flags.DEFINE_integer("seed", 1, "Seed of weights and of the order of examples.")
    flags.DEFINE_boolean("quick", False, "One epoch, and nothing written.")
    flags.DEFINE_boolean(
        "render", False, "Write the table and the plot of the results that are there, and run nothing."
    )
    flags.DEFINE_string("data_dir", None, "Where tensorflow-datasets keeps prepared data. Default: its own choice.")
    flags.DEFINE_string("result", "gradient_error", "Name of the result.")


def decomposition_errors(rows):
    """By rank, `[layers, 3]`: `|Q - P Q_S| / |Q|` of ours and scipy's, and of the best matrix of that rank."""
    from scipy.linalg.interpolative import interp_decomp, reconstruct_interp_matrix

    kernels = np.stack([layer.kernel() for layer in rows])
    kernels = kernels[np.linalg.norm(kernels, axis=(1, 2)) > 0]
    tensors = ops.convert_to_tensor(kernels.astype("float32"))
    found = {}
    for share in DECOMPOSITION_RANKS:
        rank = round(share * kernels.shape[1])
        chosen, combinations, _ = map(ops.convert_to_numpy, interpolative.interpolative_decomposition(tensors, rank))
        found[share] = []
        for q, s, p in zip(kernels, chosen, combinations, strict=True):
            index, projection = interp_decomp(q, rank, rand=False)
            theirs = q - q[:, index[:rank]] @ reconstruct_interp_matrix(index, projection)
            values = np.linalg.eigvalsh(q)
            errors = (
                np.linalg.norm(q - p.astype("float64") @ q[s]),
                np.linalg.norm(theirs),
                np.linalg.norm(values[:-rank]),
            )
            found[share].append([float(f"{error / np.linalg.norm(q):.4g}") for error in errors])
    return found


class Measured:
    """Everything that is measured of a network, at several points of its training."""

    def __init__(self, model, x, y):
        self.probe, self.data, self.points, self.decompositions = RowProbe(model), (x, y), [], []
        self.measurements = {
            damping: gradient_errors.ErrorMeasurement(None, damping, RANKS, SAMPLINGS, None, FLAGS.draws, FLAGS.seed)
            for damping in RELATIVE_DAMPINGS
        }

    def add(self, epoch, logs, sizes):
        """Measures with the weights as they are; ranks for batches of these `sizes`."""
        point = {"epoch": epoch, **logs, "ranks": {}, "errors": {}}
        # The largest batch first: for a larger one than before the model is copied again.
        for size in sorted({*sizes, FLAGS.batch_size}, reverse=True):
            rows = self.probe(*(array[:size] for array in self.data))
            point["ranks"][str(size)] = list(kernel_ranks.ranks_of(rows, 0.9).ranks)
        for damping, measurement in self.measurements.items():
            errors = measurement(rows)
            point["errors"][str(damping)] = {
                "ranks": list(errors.ranks),
                "without": round(errors.total_without, 5),
                "median_without": round(float(np.median(errors.without)), 5),
                "totals": {
                    m: [round(float(e), 5) for e in t] for m, t in zip(errors.methods, errors.totals, strict=True)
                },
                "medians": {
                    m: [round(float(e), 5) for e in np.median(t, axis=1)]
                    for m, t in zip(errors.methods, errors.errors, strict=True)
                },
            }
        self.points.append(point)
        self.decompositions.append(decomposition_errors(rows))


def measure(name):
    """Trains a network; its points, and the decompositions of all of them."""
    network = NETWORKS[name]
    data_set, scale = network["data"]
    keras.utils.set_random_seed(FLAGS.seed)
    x, y = datasets.arrays(data_set, "train", FLAGS.data_dir, scale)
    model = network["make"]()
    model.compile(
        keras.optimizers.Adam(FLAGS.learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=keras.backend.backend() == "jax",
    )
    measured, start = Measured(model, x, y), time.perf_counter()
    points = (0, 1) if FLAGS.quick else network["points"]
    for previous, epoch in zip((None, *points), points, strict=False):
        logs = {}
        if previous is not None:
            history = model.fit(x, y, FLAGS.batch_size, epoch - previous, verbose=0).history
            logs = {key: round(values[-1], 5) for key, values in history.items()}
        measured.add(epoch, logs, BATCH_SIZES if epoch in (points[0], points[-1]) else ())
        print(f"{name}, epoch {epoch}: {time.perf_counter() - start:.0f} s", flush=True)
    return measured.points, measured.decompositions


def compared(decompositions):
    """By rank, from `[layers, 3]` of all networks and points: ratios of our errors to scipy's, and medians."""
    summary = {}
    for share in DECOMPOSITION_RANKS:
        ours, theirs, best = np.concatenate([d[share] for d in decompositions]).T
        counted = theirs >= SMALLEST_ERROR
        ratios = ours[counted] / theirs[counted]
        summary[str(share)] = {
            "matrices": int(counted.size),
            "compared": int(counted.sum()),
            "worst_ratio": round(float(ratios.max()), 3),
            "median_ratio": round(float(np.median(ratios)), 3),
            "median_error": float(f"{np.median(ours):.3g}"),
            "median_error_scipy": float(f"{np.median(theirs):.3g}"),
            "median_error_best": float(f"{np.median(best):.3g}"),
            "largest_error_not_compared": float(f"{ours[~counted].max() if (~counted).any() else 0.0:.3g}"),
        }
    return summary


def _markdown(header, lines):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def table(payload):
    """A Markdown table of the errors and ranks, before and after training."""
    header = ["network", "epoch", "accuracy", "median rank", "damping", "KID"]
    header += [*(f"KIS {sampling}" for sampling in SAMPLINGS), "no rows"]
    lines = []
    for name, points in payload["networks"].items():
        for point in (points[0], points[-1]):
            ranks = ", ".join(
                f"{np.median(r):g} of {size}" for size, r in sorted(point["ranks"].items(), key=lambda i: int(i[0]))
            )
            for damping, found in point["errors"].items():
                at = RANKS.index(FIGURE_RANK)
                errors = [f"{totals[at]:.3f}" for totals in found["totals"].values()]
                accuracy = f"{point['accuracy']:.3f}" if "accuracy" in point else "-"
                lines.append([name, str(point["epoch"]), accuracy, ranks, damping, *errors, f"{found['without']:.3f}"])
    return _markdown(header, lines)


def decomposition_table(payload):
    """A Markdown table of our decomposition against scipy's."""
    header = ["rank", "matrices", "compared", "worst ratio", "median ratio", "median error", "scipy's", "the best"]
    lines = []
    for share, entry in payload["decomposition"].items():
        numbers = [entry[key] for key in ("worst_ratio", "median_ratio")]
        errors = [f"{entry[key]:.2g}" for key in ("median_error", "median_error_scipy", "median_error_best")]
        lines.append(
            [f"{float(share):.0%}", str(entry["matrices"]), str(entry["compared"]), *map(str, numbers), *errors]
        )
    return _markdown(header, lines)


def _draw_errors(axis, points, damping):
    found, at = [point["errors"][str(damping)] for point in points], RANKS.index(FIGURE_RANK)
    epochs = [point["epoch"] for point in points]
    for method, marker in zip(found[0]["totals"], "os^v", strict=False):
        axis.plot(epochs, [f["totals"][method][at] for f in found], f"{marker}-", label=method, markersize=5)
    axis.plot(epochs, [f["without"] for f in found], ":", color="0.4", label="no rows")
    axis.set_title(f"rank {FIGURE_RANK:.0%}, damping {damping:g} of the largest eigenvalue", fontsize=10)
    axis.set_xlabel("epoch")
    gradient_errors.scale_errors(axis)


def _draw_ranks(axis, points):
    results_of, sizes = [], []
    for point in points:
        for size, ranks in sorted(((int(size), ranks) for size, ranks in point["ranks"].items())):
            results_of.append(kernel_ranks.KernelRanks(tuple(map(str, range(len(ranks)))), tuple(ranks), size, 0.9))
            sizes.append(size)
    kernel_ranks.draw_kernel_ranks(axis, results_of, sizes)
    each = len(sizes) // len(points)
    axis.axvline(each + 0.5, color="0.8", linewidth=1)
    below = axis.secondary_xaxis(-0.1)
    labels = [f"batch size, epoch {point['epoch']}" for point in points]
    below.set_xticks([(each + 1) / 2 + i * each for i in range(len(points))], labels)
    below.tick_params(length=0)
    below.spines["bottom"].set_visible(False)
    axis.set_title("ranks of the layers; medians, and their share of the batch", fontsize=10)


def plot(payload, path):
    """Errors by epoch at each damping, and the distributions of ranks, one row for each network."""
    from matplotlib.figure import Figure

    networks = payload["networks"]
    figure = Figure(figsize=(13, 4 * len(networks)), layout="constrained")
    rows = np.atleast_1d(figure.subfigures(len(networks), 1))
    for row, (name, points) in zip(rows, networks.items(), strict=True):
        row.suptitle(name, fontweight="bold")
        *errors, ranks = row.subplots(1, len(RELATIVE_DAMPINGS) + 1, width_ratios=[1] * len(RELATIVE_DAMPINGS) + [1.2])
        for axis, damping in zip(errors, RELATIVE_DAMPINGS, strict=True):
            axis.sharey(errors[0])
            _draw_errors(axis, points, damping)
        errors[0].set_ylabel("error of the preconditioned gradient")
        errors[-1].legend(fontsize=8, loc="lower left")
        _draw_ranks(ranks, (points[0], points[-1]))
    figure.savefig(path, dpi=110)


def main(_):
    if FLAGS.render:
        payload = results.load(FLAGS.result)
    else:
        start, networks, decompositions = time.perf_counter(), {}, []
        for name in FLAGS.networks:
            networks[name], found = measure(name)
            decompositions += found
        payload = {
            "backend": keras.backend.backend(),
            "batch_size": FLAGS.batch_size,
            "ranks": list(RANKS),
            "draws": FLAGS.draws,
            "learning_rate": FLAGS.learning_rate,
            "seconds": round(time.perf_counter() - start, 1),
            "networks": networks,
            "decomposition": compared(decompositions),
        }
    print(f"\n{table(payload)}\n\n{decomposition_table(payload)}")
    if not FLAGS.quick:
        path = results.DIRECTORY / f"{FLAGS.result}.json" if FLAGS.render else results.save(FLAGS.result, payload)
        plot(payload, path.with_suffix(".png"))
        print(f"\nwritten to {path}")


if __name__ == "__main__":
    app.run(main)
