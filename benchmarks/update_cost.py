"""What one refresh of all inverses costs for ResNet-50: THOR's blocks against KFAC's whole factors, in one run.

The factors have the shapes of all 54 layers of ResNet-50 (224x224, 1000 classes) and are random, positive definite and
the same for both. Both refreshes are compiled as a training step compiles them, and alternate; the figures are medians.

    python -m benchmarks.update_cost                       # both backends
    python -m benchmarks.update_cost --backend jax --split 64
"""

import json
import os
import statistics
import subprocess
import sys
import time

from absl import app, flags

from benchmarks import results

FLAGS = flags.FLAGS
# Not when imported for its table: other benchmarks' flags have the same names.
if __name__ == "__main__":
    flags.DEFINE_enum("backend", "all", ["all", "tensorflow", "jax"], "Backend to measure.")
    flags.DEFINE_integer("split", 128, "Size of THOR's blocks.")
    flags.DEFINE_integer("rounds", 5, "Timed refreshes of each kind.")
    flags.DEFINE_string("result", "update_cost", "Name of the result.")
    flags.DEFINE_boolean("worker", False, "Measure in this process and print JSON (used by the benchmark itself).")


def shapes():
    """`(input_dim without bias, whether there is a bias, output_dim)` of ResNet-50's layers."""
    result, channels = [(7 * 7 * 3, True, 64)], 64
    for filters, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(blocks):
            if i == 0:
                result.append((channels, True, 4 * filters))
            result += [(channels, True, filters), (9 * filters, True, filters), (filters, True, 4 * filters)]
            channels = 4 * filters
    return [*result, (2048, True, 1000)]


def measure(split, rounds):
    """Medians and spreads in milliseconds of both refreshes, and the sizes of their state."""
    import keras
    import numpy as np
    from keras import ops

    from keras_ngd import backend
    from keras_ngd.curvature import KroneckerCurvature, SplitCurvature
    from keras_ngd.linalg import diagonal

    rng = np.random.default_rng(0)
    counts = {}
    for shape in shapes():
        counts[shape] = counts.get(shape, 0) + 1

    def factor(count, size):
        # Of full rank by its diagonal; as many rows as make it cheap.
        rows = rng.normal(size=(count, 64, size)).astype("float32") / 8
        return ops.convert_to_tensor(np.swapaxes(rows, 1, 2) @ rows + np.eye(size, dtype="float32"))

    whole, kfac, blocks, thor = [], [], [], []
    for (width, use_bias, outputs), count in counts.items():
        parts = diagonal.partition(width, use_bias, split), diagonal.partition(outputs, False, split)
        sides = factor(count, width + int(use_bias)), factor(count, outputs)
        whole.append(sides)
        kfac.append(KroneckerCurvature(count, width + int(use_bias), outputs, "float32", "auto", "pi"))
        blocks.append([b for side, p in zip(sides, parts, strict=True) for b in diagonal.blocks_of(side, p)])
        thor.append(SplitCurvature(count, *parts, "float32", "auto", "pi"))

    def refresh_kfac(factors, states):
        return [c.refresh(f, 0.01, list(s)) for c, f, s in zip(kfac, factors, states, strict=True)]

    def refresh_thor(factors, states):
        return SplitCurvature.refresh_all(thor, factors, 0.01, states)

    cases = {
        "kfac": (backend.traced_once(refresh_kfac), whole, [[ops.zeros_like(f) for f in sides] for sides in whole]),
        "thor": (backend.traced_once(refresh_thor), blocks, [[ops.zeros_like(b) for b in of] for of in blocks]),
    }
    times = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, (refresh, factors, states) in cases.items():
            start = time.perf_counter()
            new = refresh(factors, states)
            for leaf in keras.tree.flatten(new):
                ops.convert_to_numpy(leaf[:1, :1])
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {
        "milliseconds": {name: statistics.median(values) for name, values in times.items()},
        "spread": {name: [min(values), max(values)] for name, values in times.items()},
        "bytes": {"kfac": sum(c.bytes for c in kfac), "thor": sum(c.bytes for c in thor)},
        "layers": len(shapes()),
        "device": keras.distribution.list_devices()[0],
    }


def table(payload):
    """A Markdown table of all results."""
    split = payload["arguments"]["split"]
    lines = [
        f"| backend | KFAC, ms | THOR, split {split}, ms | ratio | inverses of KFAC, MiB | of THOR, MiB | ratio |",
        "|---" * 7 + "|",
    ]
    for result in payload["results"]:
        ms, size = result["milliseconds"], result["bytes"]
        lines.append(
            f"| {result['backend']} | {ms['kfac']:.0f} | {ms['thor']:.1f} | {ms['kfac'] / ms['thor']:.0f}x | "
            f"{size['kfac'] / 2**20:.0f} | {size['thor'] / 2**20:.0f} | {size['kfac'] / size['thor']:.1f}x |"
        )
    return "\n".join(lines)


def main(_):
    if FLAGS.worker:
        print(json.dumps(measure(FLAGS.split, FLAGS.rounds)))
        return
    from tqdm import tqdm

    measured = []
    for backend in tqdm(["tensorflow", "jax"] if FLAGS.backend == "all" else [FLAGS.backend], unit="backend"):
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", **results.KEEP_MEMORY}
        command = [sys.executable, "-m", "benchmarks.update_cost", "--worker"]
        command += [f"--split={FLAGS.split}", f"--rounds={FLAGS.rounds}"]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if process.returncode:
            raise RuntimeError(f"{backend} failed:\n{process.stderr[-3000:]}")
        measured.append({"backend": backend, **json.loads(process.stdout.splitlines()[-1])})
    payload = {"arguments": {"split": FLAGS.split, "rounds": FLAGS.rounds}, "results": measured}
    path = results.save(FLAGS.result, payload)
    print(f"\n{table(payload)}\n\nwritten to {path}")


if __name__ == "__main__":
    app.run(main)
