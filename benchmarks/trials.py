"""Trainings that start over again and again: trials of settings, and runs of the best."""

import inspect
import itertools
import math
import random
import statistics
import time

from benchmarks import task_data  # isort: skip  (before keras: it imports TensorFlow without its greetings)
import keras
import numpy as np
from keras import ops

import keras_ngd
from benchmarks.alone import alone
from benchmarks.kl_shampoo import KLShampoo
from benchmarks.tasks import AT_DEFAULTS, FIRST_ORDER, epochs_to, named_loss
from keras_ngd.capturing.walk import path_of

TRIAL_SEED, FIRST_SEED = 1000, 101
# Of the times of epochs: passes over the whole training at most, and when no other is begun.
PASSES, SECONDS = 5, 300


@keras.saving.register_keras_serializable("benchmarks")
class Held(keras.optimizers.schedules.LearningRateSchedule):
    """A value that an optimizer holds in a variable, so that it may change from trial to trial and nothing is compiled anew.

    Args:
        steps: int: the value falls to zero over so many, along half a cosine. Default None: it stays.
    """

    def __init__(self, steps=None):
        self.steps, self.variable = steps, None

    def held_by(self, optimizer, name):
        """Makes the variable, and returns it."""
        self.variable = optimizer.add_variable((), dtype="float32", name=f"held_{name}")
        return self.variable

    def __call__(self, step):
        value = ops.convert_to_tensor(self.variable)
        if self.steps is None:
            return value
        done = ops.minimum(ops.cast(step, "float32") / self.steps, 1.0)
        return value * 0.5 * (1 + ops.cos(math.pi * done))

    def get_config(self):
        return {"steps": self.steps}


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
        self._stop()

    def on_epoch_end(self, epoch, logs=None):
        self._stop()
        self.model.stop_training = float(logs.get("val_loss", math.inf)) <= self.until

    def _stop(self):
        """Notes an epoch's seconds, when it is first called after its training."""
        if self.start is not None:
            # JAX returns before it has computed; reading a variable waits.
            ops.convert_to_numpy(self.model.optimizer.iterations)
            self.seconds.append(time.perf_counter() - self.start)
            self.start = None


class Training:
    """A compiled model that starts over for every run.

    Args:
        case: of `benchmarks.tasks`.
        problem: of `benchmarks.task_data`.
        arguments: of the optimizer, but for those that are held.
    """

    def __init__(self, case, problem, arguments):
        self.make_model, self.case, self.problem = task_data.MODELS[case["task"]], case, problem
        self.model = self.make_model()
        # Before statistics are among them.
        self.weights = list(self.model.weights)
        self.optimizer, self.held = make(case, arguments)
        # Bases of gradients need no captured layers.
        bases = getattr(self.optimizer, "basis", None)
        if isinstance(self.optimizer, keras_ngd.optimizers.NaturalGradient) and bases != "gradient":
            skipped = case.get("skip")
            skip = None if skipped is None else lambda layer: path_of(layer).startswith(skipped)
            keras_ngd.capture(self.model, self.optimizer, skip=skip)
        self.model.compile(
            optimizer=self.optimizer,
            loss=problem.loss,
            metrics=[keras.metrics.SparseCategoricalAccuracy("accuracy")] if problem.accuracy else [],
            steps_per_execution=case["steps"],
            jit_compile=keras.backend.backend() == "jax",
        )
        self.optimizer.build(self.model.trainable_variables)
        keras.utils.set_random_seed(TRIAL_SEED)
        self.variables = self.model.variables + self.optimizer.variables
        self.start = [np.array(v) for v in self.variables]

    def run(self, settings, seed, epochs, until=-math.inf, every=1):
        """Losses and seconds by epoch, from scratch; of classes the share of right answers, too.

        Args:
            settings: the values that are held.
            seed: of weights and batches.
            epochs: int.
            until: a loss at which to stop.
            every: epochs from one loss to the next.
        """
        self.start_over(settings, seed)
        clock, (x, y) = Clock(until), self.problem.training
        history = self.fit(
            clock,
            epochs=epochs,
            validation_data=self.problem.validation or (x, y),
            validation_batch_size=self.case["batch_size"],
            validation_freq=every,
        ).history
        # The figures are what JSON can hold: divergence is a very large loss.
        losses = np.nan_to_num(np.array(history["val_loss"]), nan=1e30, posinf=1e30)
        found = {"loss": [float(f"{x:.6g}") for x in losses], "seconds": [round(s, 6) for s in clock.seconds]}
        if self.problem.accuracy:
            found["accuracy"] = [float(f"{x:.6g}") for x in history["val_accuracy"]]
        return found

    def start_over(self, settings, seed):
        """Makes all variables what they are before a run, of which `settings` and `seed` are."""
        for variable, value in zip(self.variables, self.start, strict=True):
            variable.assign(value)
        for name, variable in self.held.items():
            variable.assign(settings[name])
        # What Keras draws weights and JAX's batches from. TensorFlow goes on with its own seed, of which it draws batches:
        # a new one would have it prepare all of its functions anew.
        random.seed(seed)
        np.random.seed(seed)
        for variable, fresh in zip(self.weights, self.make_model().weights, strict=True):
            variable.assign(fresh)

    def fit(self, clock, **arguments):
        """Keras's `fit` on the data of the task."""
        (x, y), steps = self.problem.training, self.case["steps"]
        return self.model.fit(
            x,
            y,
            batch_size=self.case["batch_size"],
            # Fewer than the data are worth: fit goes on with the next ones.
            steps_per_epoch=steps if steps < len(x) // self.case["batch_size"] else None,
            callbacks=[clock],
            verbose=0,
            **arguments,
        )

    def seconds_of_epoch(self, epoch):
        """Trains one epoch more, the `epoch`-th since it started over, from 0; how long that took."""
        clock = Clock(-math.inf)
        self.fit(clock, initial_epoch=epoch, epochs=epoch + 1)
        return clock.seconds[0]


# Optimizers that neither Keras nor the package has by these names.
OTHERS = {"SOAP": keras_ngd.EigenAdam, "KL-Shampoo": KLShampoo}


def kind_of(case):
    """The class of a case's optimizer."""
    name = case["optimizer"].removesuffix(AT_DEFAULTS)
    if name in OTHERS:
        return OTHERS[name]
    name = name.partition("-")[0]
    return getattr(keras.optimizers if name in FIRST_ORDER else keras_ngd, name)


def make(case, arguments):
    """The optimizer of a case, and the variables of the values that it holds, by name.

    Args:
        case: of `benchmarks.tasks`.
        arguments: of the optimizer, but for those that are held.
    """
    name, arguments = case["optimizer"], {**arguments, **case.get("arguments", {})}
    cosine = case.get("schedule") == "cosine"
    held = {"learning_rate": Held(case["steps"] * case["epochs"] if cosine else None)}
    if "damping" in case["grid"]:
        held["damping"] = Held()
    if name in ("Adam", "EigenAdam", "SOAP") and "momentum" in arguments:
        arguments["beta_1"] = arguments.pop("momentum")
    if name == "SOAP":
        arguments["basis"] = "gradient"
    if name == "Muon" and "weight_decay" in arguments:
        # It has another for what Adam's rule moves.
        arguments["adam_weight_decay"] = arguments["weight_decay"]
    if name not in FIRST_ORDER and "intervals" in case:
        arguments = {**interval_arguments(case), **arguments}
    optimizer = kind_of(case)(**held, **arguments)
    return optimizer, {name: value.held_by(optimizer, name) for name, value in held.items()}


def interval_arguments(case):
    """What a method of second order is given where its intervals are the task's: also, if it has one, its paper's settings."""
    factors, inverses = case["intervals"]
    if case["optimizer"] == "KL-Shampoo":
        return {"interval": inverses}
    if case["optimizer"] in ("EigenAdam", "SOAP"):
        return {"factor_interval": factors, "inverse_interval": inverses, "interval_growth": None}
    found = {**keras_ngd.PAPER_SETTINGS, "losses_per_example": case["losses_per_example"]}
    kind, _, mode = case["optimizer"].partition("-")
    if kind in ("KFAC", "THOR"):
        return found | {"factor_interval": factors, "inverse_interval": inverses}
    found |= {"interval": inverses, "batch_size": case["batch_size"]}
    if kind == "HyLo":
        found |= {"steps_per_epoch": case["steps"], **({"mode": mode.lower()} if mode else {})}
    return found


def default_rate(case):
    """The learning rate that the optimizer of a case has by default."""
    return inspect.signature(kind_of(case)).parameters["learning_rate"].default


def divided(case, settings):
    """All settings of a run, and those of them that are not held, but compiled into the steps."""
    settings = {"learning_rate": default_rate(case), **settings}
    return settings, {name: value for name, value in settings.items() if name not in ("learning_rate", "damping")}


def runs_of(case):
    """A function that trains with a point of the case's grid, a seed and further arguments of `Training.run`."""
    trainings, problem = {}, task_data.problem(case["task"])

    def run(settings, seed, **shortened):
        settings, fixed = divided(case, settings)
        key = tuple(fixed.items())
        if key not in trainings:
            trainings[key] = Training(case, problem, fixed)
            trainings[key].run(settings, seed, 1)
        return trainings[key].run(settings, seed, case["epochs"], **shortened)

    return run


def measured(case, run=None):
    """Runs of each point of the grid, and runs of the best with fresh seeds; without a grid, runs of the defaults.

    Args:
        case: of `benchmarks.tasks`.
        run: what trains, called with settings and a seed, and in trials with `until` or `every` as `Training.run` has them.
            Default None: `runs_of(case)`.
    """
    run, trials, target = run or runs_of(case), [], named_loss(case)
    # No further than is needed to compare trials.
    shortened = {"every": case["epochs"]} if target is None else {"until": target}
    target = -math.inf if target is None else target
    for point in itertools.product(*case["grid"].values()) if case["grid"] else ():
        settings = dict(zip(case["grid"], point, strict=True))
        losses = [run(settings, TRIAL_SEED + i, **shortened)["loss"] for i in range(case["trial_seeds"])]
        epochs = statistics.median(epochs_to(one, target) or math.inf for one in losses)
        # The figures are what JSON can hold.
        epochs = None if epochs == math.inf else epochs
        trials.append({**settings, "epochs": epochs, "final_loss": statistics.median(one[-1] for one in losses)})
    best = min(trials, key=lambda trial: (trial["epochs"] or math.inf, trial["final_loss"]), default={})
    settings = {name: best[name] for name in case["grid"]}
    with alone():
        runs = [{"seed": FIRST_SEED + i, **run(settings, FIRST_SEED + i)} for i in range(case["seeds"])]
    return {"trials": trials, "best": best, "runs": runs}


def epoch_seconds(cases, passes=PASSES, most_seconds=SECONDS):
    """Seconds of each epoch of measured cases of one task at their best settings, by name: a list for each.

    They train beside each other, an epoch of each in turn, from the first to the last, so that whatever else the machine does is
    shared; medians over several such passes, but over no more than fit into some time.

    Args:
        cases: of `benchmarks.tasks`, with "best".
        passes: int: how many at most.
        most_seconds: after which no other pass is begun.
    """
    problem, trainings = task_data.problem(cases[0]["task"]), {}
    for case in cases:
        settings, fixed = divided(case, {name: case["best"][name] for name in case["grid"]})
        trainings[case["name"]] = training, settings = Training(case, problem, fixed), settings
        training.start_over(settings, FIRST_SEED)
        training.seconds_of_epoch(0)
    found, start = {name: [] for name in trainings}, time.perf_counter()
    with alone():
        while len(found[cases[0]["name"]]) < passes:
            if found[cases[0]["name"]] and time.perf_counter() - start > most_seconds:
                break
            for name, (training, settings) in trainings.items():
                training.start_over(settings, FIRST_SEED)
                found[name].append([])
            for epoch in range(cases[0]["epochs"]):
                for name, (training, _) in trainings.items():
                    found[name][-1].append(training.seconds_of_epoch(epoch))
    medians = {name: [statistics.median(each) for each in zip(*times, strict=True)] for name, times in found.items()}
    return {name: [round(s, 6) for s in seconds] for name, seconds in medians.items()}
