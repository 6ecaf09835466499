"""Whether replicas of a strategy should share out the inversions: what a refresh takes with and without.

Two parts of a CPU (or more) train ResNet-32 under MirroredStrategy, with SGD, and with KFAC that refreshes all inverses at
every step or at none: each replica either inverts its share of the layers and gets the others', or inverts all. Steps of
all kinds take turns.

    python -m benchmarks.replicas
"""

import json
import os
import statistics
import subprocess
import sys
import time

from absl import app, flags

from benchmarks import results

KINDS = ("sgd", "no refresh", "shared out", "each all")
BATCH = 32

FLAGS = flags.FLAGS
# Not when imported for its table: other benchmarks' flags have the same names.
if __name__ == "__main__":
    flags.DEFINE_list("replicas", ["2"], "Numbers of replicas to measure.")
    flags.DEFINE_integer("rounds", 7, "Timed steps of each kind.")
    flags.DEFINE_string("result", "replicas", "Name of the result.")
    flags.DEFINE_integer(
        "worker", 0, "Measure so many replicas in this process and print JSON (used by the benchmark)."
    )


def measure(count, rounds):
    """Medians and spreads, in milliseconds, of each kind of step on `count` replicas."""
    import tensorflow as tf

    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    import keras
    import numpy as np

    import keras_ngd
    from examples.networks import resnet32
    from keras_ngd.distributed import strategies

    class Undivided(strategies.Replicas):
        """As for TPUs: no replica knows its number, so each does all inversions."""

        @property
        def rank(self):
            return None

    def trained(kind):
        make, strategies.make = strategies.make, Undivided if kind == "each all" else strategies.make
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])
        with strategy.scope():
            model = resnet32()
            if kind == "sgd":
                optimizer = keras.optimizers.SGD(1e-3, momentum=0.9)
            else:
                interval = 10**6 if kind == "no refresh" else 1
                optimizer = keras_ngd.KFAC(
                    1e-3, 0.01, **keras_ngd.PAPER_SETTINGS, factor_interval=10**6, inverse_interval=interval
                )
                keras_ngd.capture(model, optimizer)
            model.compile(optimizer=optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        data = tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(BATCH, drop_remainder=True)
        data = iter(strategy.experimental_distribute_dataset(data))
        model._maybe_symbolic_build(data_batch=(x[:BATCH], y[:BATCH]))
        model.make_train_function()
        step = model.train_function

        def run():
            started = time.perf_counter()
            step(data)
            return 1e3 * (time.perf_counter() - started)

        # The first step records, the second has nothing due but a refresh.
        for _ in range(3):
            run()
        strategies.make = make
        return run

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCH, 32, 32, 3)).astype("float32"), rng.integers(0, 10, BATCH)
    runs = {kind: trained(kind) for kind in KINDS}
    times = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, run in runs.items():
            times[kind].append(run())
    return {
        kind: {"median": statistics.median(found), "spread": max(found) - min(found)} for kind, found in times.items()
    }


def table(payload):
    """Milliseconds as Markdown."""
    lines = [
        "| replicas | SGD step, ms | KFAC, no refresh | refresh, shared out | refresh, each all |",
        "|---" * 5 + "|",
    ]
    for count, found in payload["results"].items():
        shared, alone = (found[kind]["median"] - found["no refresh"]["median"] for kind in KINDS[2:])
        cells = [f"{found[kind]['median']:.0f}" for kind in KINDS[:2]] + [f"+{shared:.0f}", f"+{alone:.0f}"]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(_):
    if FLAGS.worker:
        print(json.dumps(measure(FLAGS.worker, FLAGS.rounds)))
        return
    found = {}
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", **results.KEEP_MEMORY}
    for count in FLAGS.replicas:
        command = [sys.executable, "-m", "benchmarks.replicas", f"--worker={count}", f"--rounds={FLAGS.rounds}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{count} replicas failed:\n{done.stderr[-3000:]}")
        found[count] = json.loads(done.stdout.splitlines()[-1])
    payload = {"results": found}
    print(f"\n{table(payload)}\n\nwritten to {results.save(FLAGS.result, payload)}")


if __name__ == "__main__":
    app.run(main)
