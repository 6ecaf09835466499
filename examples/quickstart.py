"""EigenAdam at its default arguments beside Adam and Muon at their best learning rates of three, on images of MNIST.

    python examples/quickstart.py                               # less than a minute on two cores
    python examples/quickstart.py --method=EigenAdam --method=KFAC
    python examples/quickstart.py --dataset=fashion_mnist       # 5,000 of its images, from Debian's package or a download
    KERAS_BACKEND=jax python examples/quickstart.py             # minutes, most of them of tracing

LeNet-5 and a small Transformer are trained, all optimizers from the same weights for as many epochs, while their
learning rates fall to zero along half a cosine. The rivals, Keras's own, are trained once for each rate of a grid, and the run
with the lowest training loss counts; methods of this package are trained once, with nothing set. The table has how soon each
optimizer is where the rivals end.
"""

import time

import datasets  # isort: skip  (first: it imports TensorFlow without its greetings)
import keras
import networks
import numpy as np
import training
from absl import app, flags
from tqdm import tqdm

import keras_ngd

# As users are told, Muon is not for the last layer, which takes Adam's step in it, as do kernels of convolutions and biases.
RIVALS = {
    "Adam": keras.optimizers.Adam,
    "Muon": lambda: keras.optimizers.Muon(exclude_layers=["logits"]),
}
METHODS = ("EigenAdam", "KFAC", "EKFAC", "THOR", "SKFAC", "SNGD", "HyLo")
# The networks, with the learning rates that the rivals are tried at.
NETWORKS = {
    "LeNet-5": (networks.lenet5, (0.003, 0.01, 0.03)),
    "Transformer": (lambda: networks.vision_transformer(patch=7, width=32), (0.001, 0.003, 0.01)),
}

FLAGS = flags.FLAGS
flags.DEFINE_multi_enum("method", ["EigenAdam"], METHODS, "Methods of keras_ngd to train with; repeat for several.")
flags.DEFINE_multi_enum(
    "network", list(NETWORKS), list(NETWORKS), "Networks to train; repeat for several. Default: all."
)
flags.DEFINE_enum("dataset", "mnist5k", ["mnist5k", "fashion_mnist"], "The images, of which 5,000 are taken.")
flags.DEFINE_integer("epochs", 5, "Epochs of every run.", lower_bound=1)
flags.DEFINE_integer("batch_size", 125, "Examples a step.", lower_bound=1)
flags.DEFINE_integer("seed", 1, "Seed of the initial weights.")
flags.DEFINE_string("data_dir", None, "Where tensorflow-datasets keeps prepared data. Default: its own choice.")
flags.DEFINE_string("output", "quickstart.png", "The plot's file; empty for none.")
flags.DEFINE_boolean("jit", False, "Compile steps with XLA; JAX always does. Slow to start on TensorFlow.")


class Training:
    """A compiled model that starts over for every run, so that it is traced once."""

    def __init__(self, make_model, weights, optimizer, data):
        self.data, self.rate = data, float(optimizer.learning_rate)
        self.model = make_model()
        self.model.set_weights(weights)
        if isinstance(optimizer, keras_ngd.optimizers.NaturalGradient):
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
        # Of two batches: the second step begins with what the first has left, for which JAX may compile once more.
        self._fit([array[: 2 * FLAGS.batch_size] for array in data["train"]], self.rate, epochs=1)
        self.tracing = time.perf_counter() - start

    def _fit(self, train, rate, callbacks=(), **arguments):
        for variable, value in zip(self.variables, self.start, strict=True):
            # A copy: JAX trains in the memory it is given.
            variable.assign(np.array(value))
        falling = keras.callbacks.LearningRateScheduler(lambda e: rate * (1 + np.cos(np.pi * e / FLAGS.epochs)) / 2)
        callbacks = [*callbacks, falling]
        return self.model.fit(*train, batch_size=FLAGS.batch_size, callbacks=callbacks, verbose=0, **arguments).history

    def run(self, rate, bar):
        """Trains with a learning rate that falls from `rate` to zero; returns the history, with `seconds` of training."""
        clock = training.Clock()
        history = self._fit(
            self.data["train"],
            rate,
            callbacks=[clock, training.Progress(bar, ["loss", "val_loss"])],
            epochs=FLAGS.epochs,
            validation_data=self.data["test"],
            validation_batch_size=len(self.data["test"][0]),
        )
        return {**history, "seconds": clock.seconds, "rate": rate, "tracing": self.tracing}


def end(run):
    """The training loss after the last epoch; infinite where training has failed."""
    return run["loss"][-1] if np.isfinite(run["loss"][-1]) else np.inf


def compare(name, data, bar):
    """The run that counts of each optimizer, by its name, on the network of this name."""
    make_model, rates = NETWORKS[name]
    weights, found = make_model().get_weights(), {}
    for optimizer in (*RIVALS, *FLAGS.method):
        bar.set_postfix_str("", refresh=False)
        bar.set_description(f"{name}, {optimizer}: tracing")
        make = RIVALS[optimizer] if optimizer in RIVALS else getattr(keras_ngd, optimizer)
        trained, runs = Training(make_model, weights, make(), data), []
        for rate in rates if optimizer in RIVALS else [trained.rate]:
            bar.set_description(f"{name}, {optimizer} at {rate:g}")
            runs.append(trained.run(rate, bar))
        found[optimizer] = min(runs, key=end)
    return found


def needs(run, target):
    """Epochs and seconds to a training loss, as text."""
    reached = next((i for i, loss in enumerate(run["loss"]) if loss <= target), None)
    return "-" if reached is None else f"{reached + 1} / {run['seconds'][reached]:.1f}"


def print_table(name, runs):
    columns = "{:12}{:>14}{:>10}{:>10}" + "{:>18}" * len(RIVALS) + "{:>10}{:>9}"
    units = ["epochs / seconds"] * len(RIVALS)
    ends = [f"to {rival}'s end" for rival in RIVALS]
    print()
    print(columns.format("", "", "training", "test", *units, "seconds", "seconds"))
    print(columns.format(name, "learning rate", "loss", "accuracy", *ends, "an epoch", "tracing"))
    for optimizer, run in runs.items():
        rate = f"{run['rate']:g}, {'best' if optimizer in RIVALS else 'default'}"
        figures = f"{run['loss'][-1]:.2g}", f"{run['val_accuracy'][-1]:.3f}"
        needed = [needs(run, end(runs[rival])) for rival in RIVALS]
        seconds = f"{run['seconds'][-1] / FLAGS.epochs:.2f}", f"{run['tracing']:.1f}"
        print(columns.format(optimizer, rate, *figures, *needed, *seconds))


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(len(results), 3, figsize=(12, 3.2 * len(results)), layout="constrained", squeeze=False)
    for row, (name, runs) in zip(axes, results.items(), strict=True):
        epochs = np.arange(1, FLAGS.epochs + 1)
        for i, (optimizer, run) in enumerate(runs.items()):
            label = f"{optimizer}, {'best of its rates' if optimizer in RIVALS else 'default'}: {run['rate']:g}"
            style = {"color": f"C{i}", "label": label, "linewidth": 2, "marker": "o", "markersize": 4}
            row[0].semilogy(epochs, run["loss"], **style)
            row[1].semilogy(run["seconds"], run["loss"], **style)
            row[2].plot(epochs, run["val_accuracy"], **style)
            for axis in row[:2] if optimizer in RIVALS else ():
                axis.axhline(run["loss"][-1], color=f"C{i}", linestyle=":", linewidth=1)
        row[0].set(ylabel=f"{name}: training loss", xlabel="epoch")
        row[1].set(ylabel="training loss", xlabel="seconds of training, after tracing", xlim=(0, None))
        row[2].set(ylabel="test accuracy", xlabel="epoch")
        row[2].legend(loc="lower right", fontsize="small")
        for axis in (row[0], row[2]):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in row:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{FLAGS.dataset}; dotted: where the rivals end")
    figure.savefig(path, dpi=110)
    print(f"plot: {path}")


def main(_):
    parts = {"train": "train[:4000]", "test": "test[:1000]"}
    data = {name: datasets.arrays(FLAGS.dataset, part, FLAGS.data_dir, 255.0) for name, part in parts.items()}
    keras.utils.set_random_seed(FLAGS.seed)
    runs = sum(len(RIVALS) * len(rates) + len(FLAGS.method) for _, rates in map(NETWORKS.get, FLAGS.network))
    with tqdm(total=runs * FLAGS.epochs, unit="epoch") as bar:
        results = {name: compare(name, data, bar) for name in FLAGS.network}
    for name, runs in results.items():
        print_table(name, runs)
    print(
        f"\n{FLAGS.dataset}: {len(data['train'][1])} images for training, {len(data['test'][1])} for testing, in batches of "
        f"{FLAGS.batch_size}. All runs of a network start from the\nsame weights, and their learning rates fall to zero. "
        f"{' and '.join(RIVALS)} were tried at three rates, of which the best is shown;\n{', '.join(FLAGS.method)} ran once, "
        "with nothing set. Keras's Muon leaves convolutions and the last layer to Adam.\n"
        "Seconds are of training alone, after tracing; the rivals' other trials do not count."
    )
    if FLAGS.output:
        plot(results, FLAGS.output)


if __name__ == "__main__":
    app.run(main)
