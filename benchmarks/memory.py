"""Second-order state of KFAC and of HyLo on ResNet-50 and on a U-Net: as reported, as stored, and as it shows in the process.

Each network is trained for two steps by each method in a process of its own. Reported is what `capture` says; stored, the
variables that the plain model and plain SGD do not have; resident, the process's largest resident memory less SGD's.

    python -m benchmarks.memory
"""

import json
import os
import resource
import subprocess
import sys

from absl import app, flags

from benchmarks import results

METHODS = ("sgd", "kfac", "thor", "hylo", "hylo-kid")

FLAGS = flags.FLAGS
# Not when imported for its table: other benchmarks' flags have the same names.
if __name__ == "__main__":
    flags.DEFINE_list("networks", ["resnet50", "unet"], "Networks to measure.")
    flags.DEFINE_list("methods", list(METHODS), "Methods to measure.")
    flags.DEFINE_integer("batch_size", 16, "Examples a batch.", lower_bound=1)
    flags.DEFINE_integer("rank", 0, "HyLo's rank; 0 for a tenth of a batch of 128.")
    flags.DEFINE_string("result", "memory", "Name of the result.")
    flags.DEFINE_string(
        "worker", None, "Measure this method in this process and print JSON (used by the benchmark itself)."
    )


def measure(network, method, batch_size, rank):
    """Sizes in bytes."""
    import keras
    import numpy as np

    import keras_ngd
    from examples.networks import resnet50, unet

    shape = (64, 64, 3)
    model = resnet50(64, 10) if network == "resnet50" else unet(64, 3, width=64, depth=4)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch_size, *shape)).astype("float32")
    y = rng.integers(0, 2, (batch_size, *model.output_shape[1:])).astype("float32")
    plain = sum(np.prod(v.shape) * 4 for v in model.trainable_variables)
    if method == "sgd":
        optimizer, reported = keras.optimizers.SGD(1e-3, 0.9), 0
    else:
        shared = {**keras_ngd.PAPER_SETTINGS, "learning_rate": 1e-3, "damping": 0.1}
        if method.startswith("hylo"):
            mode = "kid" if method == "hylo-kid" else "switch"
            # Room for more rows than the batch has: rows that are not there cost what others do.
            shared |= {"batch_size": 128, "rank": rank or 13, "mode": mode, "steps_per_epoch": 10}
            optimizer = keras_ngd.HyLo(**shared)
        else:
            optimizer = {"kfac": keras_ngd.KFAC, "thor": keras_ngd.THOR}[method](**shared)
        reported = keras_ngd.capture(model, optimizer).bytes
    model.compile(optimizer=optimizer, loss="mse", jit_compile=keras.backend.backend() == "jax")
    for _ in range(2):
        model.train_on_batch(x, y)
    variables = model.trainable_variables + optimizer.variables
    stored = sum(np.prod(v.shape) * 4 for v in variables) - 2 * plain
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"reported": int(reported), "stored": int(stored), "peak": int(peak), "parameters": int(plain)}


def table(payload):
    """A Markdown table, in MiB."""
    lines = [
        "| network | method | reported | stored | of KFAC's | resident, beyond SGD's | of KFAC's |",
        "|---" * 7 + "|",
    ]
    for network, methods in payload["networks"].items():
        kfac, sgd = methods["kfac"], methods["sgd"]
        for method, found in methods.items():
            if method == "sgd":
                continue
            beyond = found["peak"] - sgd["peak"]
            cells = [network, method, *(f"{found[kind] / 2**20:.1f}" for kind in ("reported", "stored"))]
            cells += [f"{found['stored'] / kfac['stored']:.3f}x", f"{beyond / 2**20:.0f}"]
            cells.append(f"{beyond / (kfac['peak'] - sgd['peak']):.3f}x")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(_):
    arguments = {"batch_size": FLAGS.batch_size, "rank": FLAGS.rank}
    if FLAGS.worker:
        print(json.dumps(measure(FLAGS.networks[0], FLAGS.worker, **arguments)))
        return
    from tqdm import tqdm

    networks = {network: {} for network in FLAGS.networks}
    for network, method in tqdm([(n, m) for n in FLAGS.networks for m in FLAGS.methods], unit="run"):
        command = [sys.executable, "-m", "benchmarks.memory", f"--worker={method}", f"--networks={network}"]
        command += [f"--{name}={value}" for name, value in arguments.items()]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{network}, {method} failed:\n{done.stderr[-3000:]}")
        networks[network][method] = json.loads(done.stdout.splitlines()[-1])
    payload = {"arguments": arguments, "networks": networks}
    path = results.save(FLAGS.result, payload)
    print(f"\n{table(payload)}\n\nwritten to {path}")


if __name__ == "__main__":
    app.run(main)
