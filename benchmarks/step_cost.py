"""What a natural-gradient step costs, in steps of SGD on the same network, backend and batch, all in one run.

Three kinds of step are timed apart, turn by turn with SGD's and with those of a captured model whose gates are closed:
one on which nothing is due, one that updates the factors, and one that updates the factors and refreshes the inverses. What
a pair of intervals costs is their average over a whole refresh cycle. Methods with one interval have no second kind.

    python -m benchmarks.step_cost                                  # all networks and modes
    python -m benchmarks.step_cost --network resnet32 --mode jax    # one
    python -m benchmarks.step_cost --method thor --split 16 --result step_cost_thor
    python -m benchmarks.step_cost --method hylo-kid --result step_cost_rows --append
"""

import json
import os
import statistics
import subprocess
import sys
import time

from absl import app, flags

from benchmarks import results

MODES = ("tensorflow", "tensorflow-jit", "jax")
INTERVALS = ((1, 1), (1, 10), (10, 100))
ROW_METHODS = ("skfac", "sngd", "hylo-kid", "hylo-kis", "hylo-switch")
ROW_INTERVALS = (1, 10)

FLAGS = flags.FLAGS
flags.DEFINE_enum(
    "network",
    "all",
    ["all", "resnet18", "resnet32", "resnet50", "resnet50-224"],
    "Network to measure; all means resnet32 and resnet50.",
)
flags.DEFINE_enum("method", "kfac", ["kfac", "thor", *ROW_METHODS], "Optimizer to measure.")
flags.DEFINE_float("rank", 0.1, "HyLo's argument of this name.")
flags.DEFINE_integer("split", None, "THOR's argument of this name. Default: one for each network.")
flags.DEFINE_enum("mode", "all", ["all", *MODES], "Backend, and whether TensorFlow compiles the step with XLA.")
flags.DEFINE_integer("rounds", 7, "Timed steps of each kind.")
flags.DEFINE_float("statistics_fraction", 1.0, "The optimizer's argument of this name.")
flags.DEFINE_string("inverse", "auto", "The optimizer's argument of this name.")
flags.DEFINE_string("result", "step_cost", "Name of the result.")
flags.DEFINE_boolean("append", False, "Keep what the result has of other networks and modes.")
flags.DEFINE_boolean("worker", False, "Measure in this process and print JSON (used by the benchmark itself).")


def measure(network, mode):
    """Medians and spreads in milliseconds of each kind of step."""
    import keras
    import numpy as np

    import keras_ngd
    from benchmarks.networks import NETWORKS

    settings = NETWORKS[network]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(settings["batch"], *settings["shape"])).astype("float32")
    y = rng.integers(0, 10, settings["batch"])

    def compiled(optimizer, captured):
        keras.utils.set_random_seed(0)
        model = settings["make"]()
        if captured is not None:
            reports[captured] = keras_ngd.capture(model, captured)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=optimizer, loss=loss, jit_compile=mode != "tensorflow")
        return model

    def natural_gradient():
        shared = {"learning_rate": 1e-3, "damping": 0.1}
        if FLAGS.method in ROW_METHODS:
            shared |= {"interval": 10, "batch_size": settings["batch"]}
            if FLAGS.method in ("skfac", "sngd"):
                return {"skfac": keras_ngd.SKFAC, "sngd": keras_ngd.SNGD}[FLAGS.method](**shared)
            return keras_ngd.HyLo(**shared, rank=FLAGS.rank, mode=FLAGS.method.split("-")[1], steps_per_epoch=10)
        arguments = {
            **shared,
            "factor_interval": 1,
            "inverse_interval": 10,
            "inverse": FLAGS.inverse,
            "statistics_fraction": FLAGS.statistics_fraction,
        }
        if FLAGS.method == "kfac":
            return keras_ngd.KFAC(**arguments)
        # Every layer renews its inverses at every refresh: the whole price.
        return keras_ngd.THOR(**arguments, split=FLAGS.split or settings["split"], omega=(0, 0))

    optimizer, reports = natural_gradient(), {}
    models = {
        "sgd": compiled(keras.optimizers.SGD(1e-3, 0.9), None),
        "closed": compiled(keras.optimizers.SGD(1e-3, 0.9), natural_gradient()),
        FLAGS.method: compiled(optimizer, optimizer),
    }
    statistics_of = {
        name: [la.statistics for la in model._flatten_layers() if getattr(la, "statistics", None) is not None]
        for name, model in models.items()
    }

    rows = FLAGS.method in ROW_METHODS
    # Averages take a batch with a small weight; a gate of HyLo's says which rows are taken.
    opened = (2.0 if FLAGS.method in ("hylo-kid", "hylo-switch") else 1.0) if rows else 0.05

    def prepare(name, factors, inverses):
        for s in statistics_of[name]:
            s.gate.assign(float(factors) * opened)
        if name == FLAGS.method and optimizer.built:
            optimizer._next_inverses.assign(0 if inverses else 2**30)

    kinds = {
        "sgd": ("sgd", False, False),
        "closed": ("closed", False, False),
        "plain": (FLAGS.method, False, False),
        "factors": (FLAGS.method, True, False),
        "inverses": (FLAGS.method, True, True),
    }
    if rows:
        del kinds["factors"]
    times = {kind: [] for kind in kinds}
    first = {}
    for turn in range(FLAGS.rounds + 2):
        for kind, (name, *due) in kinds.items():
            if turn or name != FLAGS.method:
                prepare(name, *due)
            start = time.perf_counter()
            models[name].train_on_batch(x, y)
            seconds = time.perf_counter() - start
            first.setdefault(name, seconds)
            if turn > 1:
                times[kind].append(seconds * 1e3)
    return {
        "milliseconds": {kind: statistics.median(values) for kind, values in times.items()},
        "spread": {kind: [min(values), max(values)] for kind, values in times.items()},
        "first_step_seconds": first,
        "refreshes": optimizer.inverse_updates,
        "device": keras.distribution.list_devices()[0],
        "second_order_bytes": reports[optimizer].bytes,
        "split": getattr(optimizer, "split", None),
    }


def ratios(result):
    """Costs in SGD steps: gates closed, and KFAC at each pair of intervals."""
    ms = result["milliseconds"]
    costs = {"gates closed": ms["closed"] / ms["sgd"]}
    if "factors" not in ms:
        for interval in ROW_INTERVALS:
            costs[f"({interval})"] = (ms["inverses"] + (interval - 1) * ms["plain"]) / interval / ms["sgd"]
        return costs
    for factors, inverses in INTERVALS:
        updates = inverses // factors
        total = ms["inverses"] + (updates - 1) * ms["factors"] + (inverses - updates) * ms["plain"]
        costs[f"({factors},{inverses})"] = total / inverses / ms["sgd"]
    return costs


def table(results):
    """A Markdown table of all results."""
    columns = list(ratios(results[0]))
    shares = (
        "factors, inverses, preconditioning" if "factors" in results[0]["milliseconds"] else "update, preconditioning"
    )
    lines = [
        f"| network | mode | SGD step, ms | {' | '.join(columns)} | ms for {shares} | second-order state, MiB |",
        "|---" * (len(columns) + 5) + "|",
    ]
    for result in results:
        ms, costs = result["milliseconds"], ratios(result)
        size = result["second_order_bytes"] / 2**20
        times = [ms["plain"] - ms["closed"]]
        if "factors" in ms:
            times = [ms["factors"] - ms["plain"], ms["inverses"] - ms["factors"], *times]
        else:
            times = [ms["inverses"] - ms["plain"], *times]
        name = result["network"] + (f", split {result['split']}" if result.get("split") else "")
        name += f", {result['method']}" if "factors" not in ms else ""
        cells = [name, result["mode"], f"{ms['sgd']:.0f}", *(f"{costs[c]:.2f}x" for c in columns)]
        lines.append("| " + " | ".join(cells) + " | " + ", ".join(f"{t:.0f}" for t in times) + f" | {size:.0f} |")
    return "\n".join(lines)


def arguments():
    """The flags that say what is measured."""
    names = ["method", "statistics_fraction", "inverse", "rank"] + (["split"] if FLAGS.split else [])
    return {name: getattr(FLAGS, name) for name in names}


def run_worker(network, mode):
    """Measures in a process of its own: a backend cannot be changed after Keras is imported."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": mode.split("-")[0],
        "TF_CPP_MIN_LOG_LEVEL": "3",
        **results.KEEP_MEMORY,
    }
    command = [sys.executable, "-m", "benchmarks.step_cost"]
    command += ["--worker", f"--network={network}", f"--mode={mode}", f"--rounds={FLAGS.rounds}"]
    command += [f"--{name}={value}" for name, value in arguments().items()]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{network} on {mode} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def main(_):
    if FLAGS.worker:
        print(json.dumps(measure(FLAGS.network, FLAGS.mode)))
        return
    from tqdm import tqdm

    networks = ["resnet32", "resnet50"] if FLAGS.network == "all" else [FLAGS.network]
    modes = MODES if FLAGS.mode == "all" else [FLAGS.mode]
    cases = [(n, m, FLAGS.method) for n in networks for m in modes]
    kept = results.load(FLAGS.result)["results"] if FLAGS.append else []
    measured = [row for row in kept if (row["network"], row["mode"], row["method"]) not in cases]
    for network, mode, method in tqdm(cases, unit="mode"):
        result = run_worker(network, mode)
        row = {
            "network": network,
            "mode": mode,
            "method": method,
            "rounds": FLAGS.rounds,
            **result,
            "ratios": ratios(result),
        }
        measured.append(row)
        measured.sort(key=lambda row: (row["network"], row["method"], MODES.index(row["mode"])))
        tqdm.write(table([row]))
        path = results.save(FLAGS.result, {"arguments": arguments(), "results": measured})
    print(f"\n{table(measured)}\n\nwritten to {path}")


if __name__ == "__main__":
    app.run(main)
