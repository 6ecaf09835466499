"""What the scripts that compare methods share: flags, optimizers, the clock, the Dice score, the table and the curves."""

import json
import pathlib
import time

import keras
import numpy as np
from absl import flags
from keras import ops
from tqdm import tqdm

import keras_ngd

SECOND_ORDER = ("kfac", "skfac", "hylo")
METHODS = ("sgd", "adam", *SECOND_ORDER)
NATURAL_GRADIENTS = ("kfac", "ekfac", "eigen_adam", "thor", "skfac", "sngd", "hylo")
# Where none is asked for.
LEARNING_RATE, EIGEN_ADAM_LEARNING_RATE = 0.03, 0.01
HYLO_MODES = ("switch", "kid", "kis", "random")

FLAGS = flags.FLAGS


def define_flags(learning_rates, dampings, epochs, batch_size, interval, output, skfac_history=1, hylo_rank=0.1):
    """Defines the flags that `train_all` and `finish` read, with these defaults.

    Args:
        learning_rates: by method.
        dampings: by second-order method.
        epochs, batch_size, interval, output: of all methods.
        skfac_history, hylo_rank: of these methods.
    """
    flags.DEFINE_multi_enum("method", METHODS, METHODS, "Methods to train with; repeat for several. Default: all.")
    for method in METHODS:
        flags.DEFINE_float(f"{method}_learning_rate", learning_rates[method], "Learning rate, before it falls.")
    for method in SECOND_ORDER:
        flags.DEFINE_float(f"{method}_damping", dampings[method], "What is added to the curvature.")
    flags.DEFINE_integer("interval", interval, "Steps between updates of the curvature.", lower_bound=1)
    flags.DEFINE_integer("skfac_history", skfac_history, "Batches whose rows SKFAC keeps.", lower_bound=1)
    flags.DEFINE_float("hylo_rank", hylo_rank, "HyLo's rank, as a share of the batch.")
    flags.DEFINE_enum("hylo_mode", "switch", HYLO_MODES, "How HyLo reduces a batch.")
    flags.DEFINE_integer("epochs", epochs, "Epochs of every method.", lower_bound=1)
    flags.DEFINE_integer("batch_size", batch_size, "Examples a step.", lower_bound=1)
    flags.DEFINE_string("data_dir", None, "Where tensorflow-datasets keeps prepared data. Default: its own choice.")
    flags.DEFINE_integer("seed", 1, "Seed of weights and of the order of examples.")
    flags.DEFINE_boolean("jit", False, "Compile steps with XLA; JAX always does. Slow to start on TensorFlow.")
    flags.DEFINE_string("output", output, "The plot's file; empty for none.")
    flags.DEFINE_string("history", None, "A JSON file for all epochs' figures. Default: none.")


def make_optimizer(method, steps_per_epoch):
    """The optimizer of this name; see the flags. All learning rates fall to zero along half a cosine."""
    steps = FLAGS.epochs * steps_per_epoch
    learning_rate = keras.optimizers.schedules.CosineDecay(FLAGS[f"{method}_learning_rate"].value, steps)
    if method == "sgd":
        return keras.optimizers.SGD(learning_rate, momentum=0.9)
    if method == "adam":
        return keras.optimizers.Adam(learning_rate)
    shared = {"learning_rate": learning_rate, "damping": FLAGS[f"{method}_damping"].value}
    if method == "skfac":
        shared["history"] = FLAGS.skfac_history
    elif method == "hylo":
        shared |= {"rank": FLAGS.hylo_rank, "mode": FLAGS.hylo_mode}
    return natural_gradient(method, FLAGS.interval, FLAGS.batch_size, steps_per_epoch, **shared)


def natural_gradient(method, interval, batch_size, steps_per_epoch=None, **arguments):
    """The `keras_ngd` optimizer of this name as its paper has it, with updates of the curvature every `interval` steps.

    Args:
        method: one of `NATURAL_GRADIENTS`. `"eigen_adam"` has no use for a `damping`.
        interval: steps.
        batch_size: of the methods that keep rows.
        steps_per_epoch: of HyLo.
        **arguments: of all.
    """
    if method == "eigen_adam":
        arguments.pop("damping", None)
        return keras_ngd.EigenAdam(factor_interval=interval, inverse_interval=interval, **arguments)
    arguments = keras_ngd.PAPER_SETTINGS | arguments
    if method in ("kfac", "ekfac", "thor"):
        factors = {"kfac": keras_ngd.KFAC, "ekfac": keras_ngd.EKFAC, "thor": keras_ngd.THOR}[method]
        return factors(factor_interval=interval, inverse_interval=interval, **arguments)
    arguments |= {"interval": interval, "batch_size": batch_size}
    if method == "hylo":
        return keras_ngd.HyLo(steps_per_epoch=steps_per_epoch, **arguments)
    return {"skfac": keras_ngd.SKFAC, "sngd": keras_ngd.SNGD}[method](**arguments)


def learning_rate_of(method, asked):
    """The learning rate that was asked for, or if that is None a method's."""
    if asked is not None:
        return asked
    return EIGEN_ADAM_LEARNING_RATE if method == "eigen_adam" else LEARNING_RATE


class Clock(keras.callbacks.Callback):
    """Seconds of training at the end of each epoch, tests left out; `first` is the first step with its tracing."""

    def on_train_begin(self, logs=None):
        self.seconds, self.spent, self.first = [], 0.0, None

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if self.first is None:
            self.first = time.perf_counter() - self.start

    def on_test_begin(self, logs=None):
        # JAX returns before it has computed; reading a variable waits.
        keras.ops.convert_to_numpy(self.model.optimizer.iterations)
        self.spent += time.perf_counter() - self.start
        self.seconds.append(self.spent)


class Progress(keras.callbacks.Callback):
    """Moves a bar by one at each epoch's end, with figures of the epoch beside it.

    Args:
        bar: a `tqdm`.
        shown: names of the figures. Default None: all.
    """

    def __init__(self, bar, shown=None):
        super().__init__()
        self.bar, self.shown = bar, shown

    def on_epoch_end(self, epoch, logs=None):
        shown = logs if self.shown is None else self.shown
        self.bar.set_postfix({key: f"{logs[key]:.4f}" for key in shown}, refresh=False)
        self.bar.update()


@keras.saving.register_keras_serializable("examples")
class Dice(keras.metrics.Metric):
    """The Dice score of binary masks, `2 |truth and prediction| / (|truth| + |prediction|)`, over all pixels seen.

    Predictions are logits and count where they are positive. Without a pixel in either, the score is 1.
    """

    def __init__(self, name="dice", **kwargs):
        super().__init__(name=name, **kwargs)
        self.shared = self.add_weight(shape=(), initializer="zeros", name="shared")
        self.sizes = self.add_weight(shape=(), initializer="zeros", name="sizes")

    def update_state(self, y_true, y_pred, sample_weight=None):
        truth = ops.cast(y_true, self.dtype)
        prediction = ops.cast(y_pred > 0, self.dtype)
        weight = 1.0
        if sample_weight is not None:
            # One weight for each example, or for each pixel.
            weight = ops.cast(sample_weight, self.dtype)
            weight = ops.reshape(weight, (*weight.shape, *[1] * (len(truth.shape) - len(weight.shape))))
        self.shared.assign_add(ops.sum(weight * truth * prediction))
        self.sizes.assign_add(ops.sum(weight * (truth + prediction)))

    def result(self):
        sizes = ops.convert_to_tensor(self.sizes)
        return ops.where(sizes > 0, 2 * self.shared / ops.where(sizes > 0, sizes, 1.0), 1.0)


def train_all(make_model, batches, test_data, loss, metric, after=None):
    """Trains a model by every method that the flags name, all from the same weights and in the same order of examples.

    Args:
        make_model: returns the model.
        batches: returns the training data.
        test_data: as for `fit`.
        loss, metric: as for `compile`; the metric makes a new one.
        after: called with each method and its trained model. Default: nothing.

    Returns:
        Each method's history, with `seconds` of training and what its `first` step took.
    """
    results = {}
    with tqdm(total=len(FLAGS.method) * FLAGS.epochs, unit="epoch", dynamic_ncols=True) as bar:
        for method in FLAGS.method:
            keras.utils.set_random_seed(FLAGS.seed)
            model, train_data, clock = make_model(), batches(), Clock()
            optimizer = make_optimizer(method, len(train_data))
            bar.set_description(method)
            if method in SECOND_ORDER:
                report = keras_ngd.capture(model, optimizer, data=train_data)
                size = report.bytes / 2**20
                bar.write(f"{method}: {len(report.captured)} layers captured, {size:.1f} MiB of second-order state")
            model.compile(
                optimizer=optimizer,
                loss=loss,
                metrics=[metric()],
                jit_compile=FLAGS.jit or keras.backend.backend() == "jax",
            )
            history = model.fit(
                train_data,
                validation_data=test_data,
                epochs=FLAGS.epochs,
                shuffle=False,  # The data come shuffled.
                callbacks=[clock, Progress(bar)],
                verbose=0,
            ).history
            results[method] = {**history, "seconds": np.array(clock.seconds), "first": clock.first}
            if after is not None:
                after(method, model)
    return results


def print_table(results, metric="accuracy"):
    """One line for each method's history; `metric` is what the tests measure, the more the better."""
    test = f"test {metric}"
    print(f"\n{'method':12}{'loss':>9}{test:>15}{'best':>8}{'seconds':>9}{'an epoch':>10}{'first step':>12}")
    for method, run in results.items():
        seconds = np.diff(run["seconds"]) if len(run["seconds"]) > 1 else run["seconds"]
        values = run[f"val_{metric}"]
        print(
            f"{method:12}{run['loss'][-1]:>9.4f}{values[-1]:>15.4f}{max(values):>8.4f}"
            f"{run['seconds'][-1]:>9.1f}{np.median(seconds):>10.1f}{run['first']:>12.1f}"
        )
    print(
        "Seconds: training alone, the first step with its tracing included; an epoch: the median of those after the first."
    )


def draw_curves(figure, results, metric="accuracy", lowest=None):
    """Loss and test results of all methods by epoch and by second, on an empty figure.

    Args:
        lowest: where the axes of the test results begin, if all methods end above it. Default None: at the lowest result.
    """
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots(2, 2)
    for method, run in results.items():
        epochs = np.arange(1, len(run["loss"]) + 1)
        for row, key in zip(axes, ("loss", f"val_{metric}"), strict=True):
            row[0].plot(epochs, run[key], label=method, linewidth=2)
            row[1].plot(run["seconds"], run[key], label=method, linewidth=2)
    for row, label in zip(axes, ("training loss", f"test {metric}"), strict=True):
        row[0].set(ylabel=label, xlabel="epoch")
        row[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        row[1].set(ylabel=label, xlabel="seconds of training")
        for axis in row:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yscale("log")
    axes[0][1].set_yscale("log")
    if lowest is not None and all(run[f"val_{metric}"][-1] > lowest for run in results.values()):
        for axis in axes[1]:
            axis.set_ylim(bottom=lowest)
    axes[1][1].legend(loc="lower right")


def plot(results, title, path, metric="accuracy"):
    """Writes the curves to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    draw_curves(figure, results, metric)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    print(f"plot: {path}")


def save_history(results, path):
    """Writes all epochs' figures as JSON."""
    values = {method: {key: np.asarray(v).tolist() for key, v in run.items()} for method, run in results.items()}
    pathlib.Path(path).write_text(json.dumps(values))
