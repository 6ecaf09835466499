"""Trainings that start over again and again: trials of settings, and runs of the best."""

import itertools
import math
import random
import statistics
import time

from examples import datasets  # isort: skip  (before keras: it imports TensorFlow without its greetings)
import keras
import numpy as np
from keras import ops

import keras_ngd
from benchmarks.alone import alone
from benchmarks.networks import autoencoder
from benchmarks.tasks import FIRST_ORDER, epochs_to
from examples.networks import digits_cnn, digits_mlp, residual_network, unet

TRIAL_SEED, FIRST_SEED = 1000, 101
_TRIAL_STEPS = 1_000_000
MODELS = {
    "cnn": digits_cnn,
    "mlp": digits_mlp,
    "autoencoder": autoencoder,
    "resnet": lambda: residual_network("resnet8", 32, 10, [8, 16, 32], 1),
    "unet": lambda: unet(64, 3, width=8, depth=2),
}


def data_and_loss(task):
    """The inputs, targets and loss of a task."""
    labels_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    pixels_loss = keras.losses.BinaryCrossentropy(from_logits=True)
    if task == "resnet":
        images, labels = datasets.arrays("shapes32", "train", scale=64.0)
        return (images[:512] - 2, labels[:512]), labels_loss
    if task == "unet":
        images, masks = datasets.arrays("masks64", "train", scale=64.0, keys=("image", "segmentation_mask"))
        return (images[:128] - 2, masks[:128].astype("float32")), pixels_loss
    images, labels = datasets.arrays("digits", "train")
    if task == "autoencoder":
        flat = images.reshape(len(images), -1)
        return (flat, flat), pixels_loss
    return (images, labels), labels_loss


@keras.saving.register_keras_serializable("benchmarks")
class OfTrial(keras.optimizers.schedules.LearningRateSchedule):
    """The value of the trial that the step counter started in: trial k counts its steps from `k * _TRIAL_STEPS`."""

    def __init__(self, values):
        self.values = list(values)

    def __call__(self, step):
        trial = ops.floor_divide(ops.cast(step, "int32"), _TRIAL_STEPS)
        return ops.take(ops.convert_to_tensor(np.array(self.values, "float32")), trial)

    def get_config(self):
        return {"values": self.values}


class Clock(keras.callbacks.Callback):
    """Seconds of training in each epoch; the evaluation after it does not count. Ends the training at a loss."""

    def __init__(self, until):
        super().__init__()
        self.until = until

    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_test_begin(self, logs=None):
        # JAX returns before it has computed; reading a variable waits.
        ops.convert_to_numpy(self.model.optimizer.iterations)
        self.seconds.append(time.perf_counter() - self.start)

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = float(logs.get("val_loss", math.inf)) <= self.until


class Training:
    """A compiled model that starts over for every run."""

    def __init__(self, make_model, data, loss, batch_size, optimizer):
        self.make_model, self.data, self.batch_size, self.optimizer = make_model, data, batch_size, optimizer
        self.model = make_model()
        if isinstance(optimizer, keras_ngd.optimizers.NaturalGradient):
            keras_ngd.capture(self.model, optimizer)
        self.model.compile(
            optimizer=optimizer,
            loss=loss,
            steps_per_execution=len(data[0]) // batch_size,
            jit_compile=keras.backend.backend() == "jax",
        )
        optimizer.build(self.model.trainable_variables)
        keras.utils.set_random_seed(TRIAL_SEED)
        self.variables = self.model.variables + optimizer.variables
        self.start = [np.array(v) for v in self.variables]

    def run(self, learning_rate, seed, epochs, number=0, until=-math.inf, every=1):
        """Losses and seconds by epoch, from scratch.

        Args:
            learning_rate: of the optimizer.
            seed: of weights and batches.
            epochs: int.
            number: of the trial.
            until: a loss at which to stop.
            every: epochs from one loss to the next.
        """
        for variable, value in zip(self.variables, self.start, strict=True):
            variable.assign(value)
        self.optimizer.iterations.assign(number * _TRIAL_STEPS)
        # What Keras draws weights and JAX's batches from. TensorFlow goes on with its own seed, of which it draws batches:
        # a new one would have it prepare all of its functions anew.
        random.seed(seed)
        np.random.seed(seed)
        # All else starts at the same values with every seed.
        for layer, fresh in zip(self.model.layers, self.make_model().layers, strict=True):
            if hasattr(fresh, "kernel"):
                layer.kernel.assign(fresh.kernel)
        self.optimizer.learning_rate = learning_rate
        clock = Clock(until)
        history = self.model.fit(
            *self.data,
            batch_size=self.batch_size,
            epochs=epochs,
            validation_data=self.data,
            validation_batch_size=self.batch_size,
            validation_freq=every,
            callbacks=[clock],
            verbose=0,
        ).history
        # The figures are what JSON can hold: divergence is a very large loss.
        losses = np.nan_to_num(np.array(history["val_loss"]), nan=1e30, posinf=1e30)
        return {"loss": [float(f"{x:.6g}") for x in losses], "seconds": [round(s, 6) for s in clock.seconds]}


def make(case, momentum):
    """The optimizer of a case; one of second order has the dampings of all trials."""
    name = case["optimizer"]
    if name in FIRST_ORDER:
        return getattr(keras.optimizers, name)(0.1, **{"beta_1" if name == "Adam" else "momentum": momentum})
    shared = {
        **keras_ngd.PAPER_SETTINGS,
        "damping": OfTrial(case["grid"]["damping"]),
        "losses_per_example": case["losses_per_example"],
    }
    factors, inverses = case["intervals"]
    if name in ("KFAC", "THOR"):
        shared |= {"factor_interval": factors, "inverse_interval": inverses}
    else:
        shared |= {"interval": inverses, "batch_size": case["batch_size"]}
    kind, _, mode = name.partition("-")
    if kind == "HyLo":
        shared |= {"steps_per_epoch": case["steps"], **({"mode": mode.lower()} if mode else {})}
    return getattr(keras_ngd, kind)(0.1, momentum=momentum, **(shared | case.get("arguments", {})))


def runs_of(case):
    """A function that trains with a point of the case's grid, a seed and further arguments of `Training.run`."""
    trainings, (data, loss) = {}, data_and_loss(case["task"])

    def run(settings, seed, **shortened):
        rate, momentum = settings["learning_rate"], settings["momentum"]
        number = case["grid"]["damping"].index(settings["damping"]) if "damping" in settings else 0
        if momentum not in trainings:
            trainings[momentum] = Training(MODELS[case["task"]], data, loss, case["batch_size"], make(case, momentum))
            trainings[momentum].run(rate, seed, 1)
        return trainings[momentum].run(rate, seed, case["epochs"], number, **shortened)

    return run


def measured(case, run=None):
    """Runs of each point of the grid, and runs of the best with fresh seeds.

    Args:
        case: of `benchmarks.tasks`.
        run: what trains, called with settings and a seed, and in trials with `until` or `every` as `Training.run` has them.
            Default None: `runs_of(case)`.
    """
    run, trials = run or runs_of(case), []
    # No further than is needed to compare trials.
    shortened = {"every": case["epochs"]} if case["target"] is None else {"until": case["target"]}
    for point in itertools.product(*case["grid"].values()):
        settings = dict(zip(case["grid"], point, strict=True))
        losses = [run(settings, TRIAL_SEED + i, **shortened)["loss"] for i in range(case["trial_seeds"])]
        target = -math.inf if case["target"] is None else case["target"]
        epochs = statistics.median(epochs_to(one, target) or math.inf for one in losses)
        # The figures are what JSON can hold.
        epochs = None if epochs == math.inf else epochs
        trials.append({**settings, "epochs": epochs, "final_loss": statistics.median(one[-1] for one in losses)})
    best = min(trials, key=lambda trial: (trial["epochs"] or math.inf, trial["final_loss"]))
    settings = {name: best[name] for name in case["grid"]}
    with alone():
        runs = [{"seed": FIRST_SEED + i, **run(settings, FIRST_SEED + i)} for i in range(case["seeds"])]
    return {"trials": trials, "best": best, "runs": runs}
