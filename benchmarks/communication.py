"""What workers receive: counted on 2 and 4 processes of Horovod, and projected to many for ResNet-50.

Counted are two steps of the 3C1F network, both with an update, by each method; beside the bytes stands what
`keras_ngd.analysis.received` says of the layers' shapes. The same function projects ResNet-50 with 80 examples a worker.

    python -m benchmarks.communication
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from absl import app, flags

from benchmarks import results

METHODS = ("kfac", "kfac-mem-opt", "sp-ngd", "thor", "ekfac", "eigen-adam", "skfac", "sngd", "hylo-kid", "hylo-kis")
STAGES = ("gradients", "statistics", "inverses", "preconditioned")
BATCH, RANK, SPLIT, UPDATES = 16, 0.25, 16, 2

FLAGS = flags.FLAGS
# Not when imported for its table: other benchmarks' flags have the same names.
if __name__ == "__main__":
    flags.DEFINE_list("workers", ["2", "4"], "Numbers of processes to count on.")
    flags.DEFINE_string("result", "communication", "Name of the result.")
    flags.DEFINE_string("worker", None, "Count in this process and write JSON here (used by the benchmark itself).")


def make_optimizer(method):
    """An optimizer with an update at every step."""
    import keras_ngd

    paper = keras_ngd.PAPER_SETTINGS
    if method in ("kfac", "kfac-mem-opt", "sp-ngd"):
        fraction, scatter = 1 if method == "kfac" else 0, method == "sp-ngd"
        intervals = {"factor_interval": 1, "inverse_interval": 1}
        return keras_ngd.KFAC(
            1e-3, 0.01, **paper, **intervals, gradient_worker_fraction=fraction, reduce_scatter=scatter
        )
    if method == "thor":
        return keras_ngd.THOR(1e-3, 0.01, **paper, factor_interval=1, inverse_interval=1, split=SPLIT, omega=(0.0, 0.0))
    if method in ("ekfac", "eigen-adam"):
        kind = keras_ngd.EKFAC if method == "ekfac" else keras_ngd.EigenAdam
        return kind(factor_interval=1, inverse_interval=1)
    if method == "skfac":
        return keras_ngd.SKFAC(1e-3, 0.03, **paper, interval=1, batch_size=BATCH)
    if method == "sngd":
        return keras_ngd.SNGD(1e-3, 0.1, **paper, batch_size=BATCH)
    return keras_ngd.HyLo(
        1e-3, 0.1, **paper, interval=1, batch_size=BATCH, rank=RANK, mode=method.removeprefix("hylo-")
    )


def count(folder):
    """Bytes that this process received for one update, by method and stage, and what the formulas say."""
    import horovod.tensorflow as hvd
    import keras
    import numpy as np

    import keras_ngd
    from examples.networks import cnn_3c1f

    hvd.init()
    found = {}
    for method in METHODS:
        model, optimizer = cnn_3c1f((32, 32, 3)), make_optimizer(method)
        shapes = keras_ngd.analysis.layer_shapes(model)
        keras_ngd.capture(model, optimizer)
        model.compile(optimizer=optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        rng = np.random.default_rng(hvd.rank())
        x = rng.normal(size=(UPDATES * BATCH, 32, 32, 3)).astype("float32")
        model.fit(x, rng.integers(0, 10, len(x)), batch_size=BATCH, verbose=0)
        counted = optimizer.received_bytes()
        said = keras_ngd.analysis.received(method, shapes, hvd.size(), BATCH, rank=RANK, split=SPLIT)
        found[method] = {stage: [counted.get(stage, 0) / UPDATES, 4 * said[stage]] for stage in STAGES}
    (pathlib.Path(folder) / f"{hvd.rank()}.json").write_text(json.dumps(found))


def counted(workers):
    """Means over the processes of what `count` finds."""
    launcher = shutil.which("horovodrun", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if launcher is None:
        raise app.UsageError("Horovod is not installed: run horovod_scripts/install_horovod.sh.")
    with tempfile.TemporaryDirectory() as folder:
        command = [launcher, "-np", str(workers), "-H", f"localhost:{workers}", "--gloo", sys.executable]
        command += ["-m", "benchmarks.communication", f"--worker={folder}"]
        environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{workers} workers failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        found = [json.loads(file.read_text()) for file in sorted(pathlib.Path(folder).glob("*.json"))]
    return {
        method: {
            stage: [sum(worker[method][stage][i] for worker in found) / workers for i in range(2)] for stage in STAGES
        }
        for method in METHODS
    }


def projected():
    """MiB received for one update of ResNet-50's layers, statistics and inverses, by method and number of workers."""
    import keras

    import keras_ngd

    model = keras.applications.ResNet50(weights=None, input_shape=(224, 224, 3))
    shapes = keras_ngd.analysis.layer_shapes(model)
    found = {}
    for method in METHODS:
        found[method] = {}
        for workers in (2, 4, 8, 16, 64, 256, 1024):
            numbers = keras_ngd.analysis.received(method, shapes, workers, 80)
            found[method][str(workers)] = 4 * (numbers["statistics"] + numbers["inverses"]) / 2**20
    return found


def table(payload):
    """The counted bytes and the projection as Markdown."""
    lines = ["| workers | method | " + " | ".join(f"{stage}, KiB" for stage in STAGES) + " |", "|---" * 6 + "|"]
    for workers, methods in payload["counted"].items():
        for method, stages in methods.items():
            cells = [
                f"{found / 1024:.1f} ({said / 1024:.1f})" if found or said else "-" for found, said in stages.values()
            ]
            lines.append(f"| {workers} | {method} | {' | '.join(cells)} |")
    workers = list(next(iter(payload["projected"].values())))
    lines += ["", "| ResNet-50, MiB for an update | " + " | ".join(f"{p} workers" for p in workers) + " |"]
    lines.append("|---" * (1 + len(workers)) + "|")
    for method, sizes in payload["projected"].items():
        lines.append(f"| {method} | " + " | ".join(f"{size:,.0f}" for size in sizes.values()) + " |")
    return "\n".join(lines)


def main(_):
    if FLAGS.worker:
        count(FLAGS.worker)
        return
    payload = {"counted": {workers: counted(int(workers)) for workers in FLAGS.workers}, "projected": projected()}
    print(f"\n{table(payload)}\n\nwritten to {results.save(FLAGS.result, payload)}")


if __name__ == "__main__":
    app.run(main)
