"""KFAC beside SGD with momentum and Adam on real digits, each at its best learning rate of a small grid.

    python examples/quickstart.py                          # about a minute on two cores
    KERAS_BACKEND=jax python examples/quickstart.py

Every optimizer gets the same number of trials, all from the same weights; the learning rate with the lowest training
loss at their end then trains from other weights, and that run is what is reported.
"""

import time

import datasets  # isort: skip  (first: it imports TensorFlow without its greetings)
import keras
import networks
import numpy as np
from absl import app, flags
from tqdm import tqdm

import keras_ngd

TARGET = 0.05
GRIDS = {
    "SGD, momentum 0.9": (0.03, 0.1, 0.3),
    "Adam": (0.003, 0.01, 0.03),
    "KFAC": (0.02, 0.05, 0.1),
}

FLAGS = flags.FLAGS
flags.DEFINE_integer("epochs", 12, "Epochs of every run.", lower_bound=1)
flags.DEFINE_integer("batch_size", 250, "Examples a step.", lower_bound=1)
flags.DEFINE_integer("seed", 1, "Seed of the initial weights; those of the trials have the next one.")
flags.DEFINE_string("data_dir", None, "Where tensorflow-datasets keeps prepared data. Default: its own choice.")
flags.DEFINE_string("output", "quickstart.png", "The plot's file; empty for none.")
flags.DEFINE_boolean("jit", False, "Compile steps with XLA; JAX always does. Slow to start on TensorFlow.")


def make_optimizer(name):
    if name == "KFAC":
        return keras_ngd.KFAC()
    return keras.optimizers.Adam() if name == "Adam" else keras.optimizers.SGD(momentum=0.9)


class Clock(keras.callbacks.Callback):
    """Seconds spent training at the end of each epoch; the test after it does not count."""

    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_test_begin(self, logs=None):
        # JAX returns before it has computed; reading a variable waits.
        keras.ops.convert_to_numpy(self.model.optimizer.iterations)
        self.seconds.append(time.perf_counter() - self.start)

    def on_epoch_end(self, epoch, logs=None):
        float(logs["val_loss"])

    def total(self):
        return np.cumsum(self.seconds)


class Training:
    """A compiled model that starts over for every run, so that it is traced once."""

    def __init__(self, make_model, optimizer_name, data):
        self.data = data
        optimizer = make_optimizer(optimizer_name)
        self.model = make_model()
        if isinstance(optimizer, keras_ngd.KFAC):
            keras_ngd.capture(self.model, optimizer)
        self.model.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=FLAGS.jit or keras.backend.backend() == "jax",
        )
        optimizer.build(self.model.trainable_variables)
        self.variables = self.model.variables + optimizer.variables
        self.start = [np.array(keras.ops.convert_to_numpy(v)) for v in self.variables]
        start = time.perf_counter()
        self.model.fit(*self._part("train", FLAGS.batch_size), batch_size=FLAGS.batch_size, verbose=0)
        self.tracing = time.perf_counter() - start

    def _part(self, split, count=None):
        return [array[:count] for array in self.data[split]]

    def run(self, learning_rate, initial):
        """Trains from the weights of the model `initial`; returns the history, with `seconds` since the start."""
        for variable, value in zip(self.variables, self.start, strict=True):
            variable.assign(value)
        for layer, fresh in zip(self.model.layers, initial.layers, strict=True):
            if fresh.weights:
                # Copies: JAX trains in the memory it is given.
                layer.kernel.assign(np.array(keras.ops.convert_to_numpy(fresh.kernel)))
                layer.bias.assign(np.array(keras.ops.convert_to_numpy(fresh.bias)))
        self.model.optimizer.learning_rate = learning_rate
        clock = Clock()
        history = self.model.fit(
            *self._part("train"),
            batch_size=FLAGS.batch_size,
            epochs=FLAGS.epochs,
            validation_data=self._part("test"),
            validation_batch_size=len(self.data["test"][0]),
            callbacks=[clock],
            verbose=0,
        ).history
        return {**history, "seconds": clock.total()}


def compare(make_model, data, bar):
    """The reported run of each optimizer, by its name."""

    def initial(seed):
        # Never between runs: a new seed makes TensorFlow prepare its functions again, on the clock.
        keras.utils.set_random_seed(seed)
        return make_model()

    final, trial = initial(FLAGS.seed), initial(FLAGS.seed + 1)
    results = {}
    for name, grid in GRIDS.items():
        bar.set_description(f"{final.name}, {name}")
        training = Training(make_model, name, data)
        ends = []
        for learning_rate in grid:
            loss = training.run(learning_rate, trial)["loss"][-1]
            ends.append(loss if np.isfinite(loss) else np.inf)
            bar.update()
        best = grid[int(np.argmin(ends))]
        results[name] = {
            **training.run(best, final),
            "learning_rate": best,
            "tracing": training.tracing,
        }
        bar.update()
    return results


def print_table(results):
    header = f"{'':5}{'optimizer':19}{'best lr':>8}{f'epochs to {TARGET}':>16}{'final loss':>12}{'test accuracy':>15}"
    print(f"\n{header}{'seconds':>9}{'+ tracing':>11}")
    for model, runs in results.items():
        for name, run in runs.items():
            reached = np.flatnonzero(np.array(run["loss"]) <= TARGET)
            epochs = str(reached[0] + 1) if reached.size else f"> {len(run['loss'])}"
            print(
                f"{model:5}{name:19}{run['learning_rate']:>8g}{epochs:>16}{run['loss'][-1]:>12.5f}"
                f"{run['val_accuracy'][-1]:>15.3f}{run['seconds'][-1]:>9.2f}{run['tracing']:>11.1f}"
            )
    print(
        f"\nLoss: mean over an epoch's batches of {FLAGS.batch_size}. Seconds: training alone, after tracing.\n"
        f"Learning rates: best of {len(GRIDS['KFAC'])} after {FLAGS.epochs} epochs, from "
        + "; ".join(f"{name} {grid}" for name, grid in GRIDS.items())
        + "."
    )


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    colours = dict(zip(GRIDS, ("tab:gray", "tab:orange", "tab:blue"), strict=True))
    figure, axes = plt.subplots(len(results), 3, figsize=(12, 3.2 * len(results)), layout="constrained", squeeze=False)
    for row, (model, runs) in zip(axes, results.items(), strict=True):
        for name, run in runs.items():
            epochs = np.arange(1, len(run["loss"]) + 1)
            label = f"{name} (lr {run['learning_rate']:g})"
            style = {"color": colours[name], "label": label, "linewidth": 2}
            row[0].semilogy(epochs, run["loss"], **style)
            row[1].semilogy(run["seconds"], run["loss"], **style)
            row[2].plot(epochs, run["val_accuracy"], **style)
        for axis in row[:2]:
            axis.axhline(TARGET, color="black", linestyle=":", linewidth=1)
        row[0].set(ylabel=f"{model}: training loss", xlabel="epoch")
        row[1].set(ylabel="training loss", xlabel="seconds of training, after tracing")
        row[2].set(ylabel="test accuracy", xlabel="epoch", ylim=(0.8, 0.98))
        row[2].legend(loc="lower right", fontsize="small")
        for axis in (row[0], row[2]):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in row:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Digits, each optimizer at its best learning rate")
    figure.savefig(path, dpi=110)
    print(f"plot: {path}")


def main(_):
    data = {split: datasets.arrays("digits", split, FLAGS.data_dir) for split in ("train", "test")}
    results = {}
    total = 2 * sum(len(grid) + 1 for grid in GRIDS.values())
    with tqdm(total=total, unit="run") as bar:
        for make_model in (networks.digits_cnn, networks.digits_mlp):
            results[make_model().name] = compare(make_model, data, bar)
    print_table(results)
    if FLAGS.output:
        plot(results, FLAGS.output)


if __name__ == "__main__":
    app.run(main)
