"""What an update of HyLo's costs for ResNet-50, layer by layer, against one of KFAC's, in one run.

For each shape of layer of ResNet-50 on 224x224 images, random inputs and gradients of one batch. Timed apart, each compiled as a
training step compiles it:

    factors     KFAC's A and G from inputs and gradients            ("factorization" of the HyLo paper's Figure 7)
    cholesky    damped inverses of both, and eigen, on JAX: both eigendecompositions                ("inversion")
    rows        one row per example, from inputs and gradients
    kid, kis    the chosen rows and their weights from all rows                                  ("factorization")
    core        the inverse kernel matrix of the chosen rows                                         ("inversion")

and, as the optimizer does it, the inverse kernel matrices of all layers together.

    python -m benchmarks.row_cost                       # both backends
    python -m benchmarks.row_cost --backend jax --rank 0.2
"""

import json
import os
import statistics
import subprocess
import sys
import time

from absl import app, flags

from benchmarks import results

KINDS = ("factors", "cholesky", "eigen", "rows", "kid", "kis", "core")

FLAGS = flags.FLAGS
# Not when imported for its table: other benchmarks' flags have the same names.
if __name__ == "__main__":
    flags.DEFINE_enum("backend", "all", ["all", "tensorflow", "jax"], "Backend to measure.")
    flags.DEFINE_integer("batch_size", 128, "Examples a batch.", lower_bound=1)
    flags.DEFINE_integer("image_size", 224, "Height and width of the images.", lower_bound=32)
    flags.DEFINE_float("rank", 0.1, "Share of the rows that is chosen.")
    flags.DEFINE_integer("rounds", 5, "Timed runs of each kind; three of those that take more than a second.")
    flags.DEFINE_string("result", "row_cost", "Name of the result.")
    flags.DEFINE_boolean("worker", False, "Measure in this process and print JSON (used by the benchmark itself).")


def layers(size):
    """`(kernel, stride, input size, channels, filters)` of ResNet-50's convolutions, with how many there are of each."""
    counts = {(7, 2, size, 3, 64): 1}
    size, channels = size // 4, 64
    for filters, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(blocks):
            stride = 2 if i == 0 and filters > 64 else 1
            within = size // stride
            shapes = [(1, stride, size, channels, filters), (3, 1, within, filters, filters)]
            shapes.append((1, 1, within, filters, 4 * filters))
            if i == 0:
                shapes.append((1, stride, size, channels, 4 * filters))
            for shape in shapes:
                counts[shape] = counts.get(shape, 0) + 1
            size, channels = within, 4 * filters
    return counts


def measure(batch_size, image_size, rank, rounds):
    """Milliseconds of each kind for each shape of layer."""
    import keras
    import numpy as np
    from keras import ops

    from keras_ngd import backend
    from keras_ngd.curvature import KernelCurvature
    from keras_ngd.layers.convolution import ConvolutionGeometry
    from keras_ngd.layers.dense import DenseGeometry
    from keras_ngd.linalg import inverse, kernel
    from keras_ngd.statistics import LowRankStatistics

    rng = np.random.default_rng(0)
    chosen = max(round(rank * batch_size), 1)
    low_rank = LowRankStatistics(chosen, batch_size)

    def tensor(*shape):
        return ops.convert_to_tensor(rng.standard_normal(shape, dtype="float32"))

    def timed(function, *arguments):
        function, times = backend.traced_once(function), []
        while len(times) < 1 + (rounds if not times or times[-1] < 1 else 3):
            start = time.perf_counter()
            found = function(*arguments)
            for leaf in keras.tree.flatten(found):
                ops.convert_to_numpy(ops.ravel(leaf)[:1])
            times.append(time.perf_counter() - start)
        return found, statistics.median(times[1:]) * 1e3

    def compare(geometry, x, ds):
        ms = {}
        (a, g), ms["factors"] = timed(
            lambda x, ds: (geometry.input_second_moment(x), geometry.gradient_second_moment(ds)), x, ds
        )
        damping = ops.ones((1,))

        def both(a, g, function):
            return function(a), function(g)

        ms["cholesky"] = timed(lambda a, g: both(a, g, lambda m: inverse.damped_inverse(m, damping)), a, g)[1]
        if keras.backend.backend() == "jax":
            # TensorFlow's takes many minutes at the size of the largest factors, 4609.
            ms["eigen"] = timed(lambda a, g: both(a, g, ops.linalg.eigh), a, g)[1]
        (a, g), ms["rows"] = timed(lambda x, ds: (geometry.input_means(x), geometry.gradient_sums(ds)), x, ds)
        (a_kid, g_kid, weights), ms["kid"] = timed(lambda a, g: low_rank.interpolated(a, g, damping), a, g)
        draw = ops.convert_to_tensor([0.0, 0.0])
        ms["kis"] = timed(lambda a, g: low_rank.sampled(a, g, draw), a, g)[1]
        ms["core"] = timed(
            lambda a, g, w: kernel.interpolated_core(kernel.kernel_matrix(a, g), w, damping), a_kid, g_kid, weights
        )[1]
        kept.append([a_kid, g_kid, weights, damping])
        return ms

    kept, measured = [], []
    for (k, stride, size, channels, filters), count in layers(image_size).items():
        geometry = ConvolutionGeometry(
            (k, k, channels, filters), 1, True, (stride, stride), (1, 1), "same", "channels_last"
        )
        x, ds = tensor(batch_size, size, size, channels), tensor(batch_size, size // stride, size // stride, filters)
        name = f"{k}x{k}/{stride} {channels}-{filters} @{size}"
        measured.append({"layer": name, "count": count, "milliseconds": compare(geometry, x, ds)})
        print(measured[-1], file=sys.stderr, flush=True)
    dense = compare(DenseGeometry(2048, 1000, True), tensor(batch_size, 2048), tensor(batch_size, 1000))
    measured.append({"layer": "dense 2048-1000", "count": 1, "milliseconds": dense})
    inputs = [tensors for tensors, layer in zip(kept, measured, strict=True) for _ in range(layer["count"])]
    curvatures = [KernelCurvature(1, chosen, "float32") for _ in inputs]
    together = timed(lambda *inputs: KernelCurvature.refresh_all(curvatures, inputs, 1.0, None), *inputs)[1]
    return {"layers": measured, "together": together, "rank": chosen, "device": keras.distribution.list_devices()[0]}


def totals(result):
    """Milliseconds of each kind for all layers."""
    kinds = [kind for kind in KINDS if kind in result["layers"][0]["milliseconds"]]
    return {k: sum(la["count"] * la["milliseconds"][k] for la in result["layers"]) for k in kinds}


def table(payload):
    """A Markdown table of sums over all layers."""
    lines = [
        "| backend | " + " | ".join(f"{kind}, ms" for kind in KINDS) + " | cores together, ms | factors / kid | "
        "factors / kis | cholesky / core | cholesky / cores together |",
        "|---" * (len(KINDS) + 6) + "|",
    ]
    for result in payload["results"]:
        ms = {**totals(result), "together": result["together"]}
        pairs = (("factors", "kid"), ("factors", "kis"), ("cholesky", "core"), ("cholesky", "together"))
        cells = [result["backend"], *(f"{ms[kind]:.0f}" if kind in ms else "-" for kind in KINDS)]
        cells += [f"{ms['together']:.1f}", *(f"{ms[a] / ms[b]:.0f}x" for a, b in pairs)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(_):
    arguments = {name: getattr(FLAGS, name) for name in ("batch_size", "image_size", "rank", "rounds")}
    if FLAGS.worker:
        print(json.dumps(measure(**arguments)))
        return
    from tqdm import tqdm

    measured = []
    for backend in tqdm(["tensorflow", "jax"] if FLAGS.backend == "all" else [FLAGS.backend], unit="backend"):
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", **results.KEEP_MEMORY}
        command = [sys.executable, "-m", "benchmarks.row_cost", "--worker"]
        command += [f"--{name}={value}" for name, value in arguments.items()]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if process.returncode:
            raise RuntimeError(f"{backend} failed:\n{process.stderr[-3000:]}")
        measured.append({"backend": backend, **json.loads(process.stdout.splitlines()[-1])})
    payload = {"arguments": arguments, "results": measured}
    path = results.save(FLAGS.result, payload)
    print(f"\n{table(payload)}\n\nwritten to {path}")


if __name__ == "__main__":
    app.run(main)
