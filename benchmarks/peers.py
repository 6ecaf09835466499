"""KFAC of this package and of kfac-jax on the same Keras model, data, batch and jax, in one run.

kfac-jax does not run on the jax of this project, so both run in an environment of their own, which the benchmark makes
(`.venv-peers`). Of kfac-jax, `kfac_jax.Optimizer` is used, with Keras's
`stateless_call` as its loss function, its estimator for the gradients of the targets (`"fisher_empirical"`, what this package
records), and neither adaptive damping nor adaptive rates. It registers all layers by itself.

Costs are of steps taken turn by turn, in steps of Keras's SGD. (On ResNet-32 XLA had not compiled kfac-jax's steps after ten
minutes.) For convergence each is tuned on a grid of as many trials, this package's KFAC on that of `benchmarks.tasks`, kfac-jax
on one in ranges of its own, at the same intervals and with the same bound on the length of a step; kfac-jax takes its steps from
a loop in Python, as its `Optimizer.step` is made for, and this package's are Keras's `fit`. Where no loss is named, the target is
what the worse of the two ends with.
"""

import functools
import math
import os
import pathlib
import subprocess
import sys
import threading
import time

from benchmarks import results, tasks
from benchmarks.alone import alone
from benchmarks.costs import INTERVALS, Timed, cost, summary

FOLDER = pathlib.Path(__file__).parent.parent / ".venv-peers"
PACKAGES = ("kfac-jax==0.0.8", "jax==0.7.2", "jaxlib==0.7.2", "keras", "tqdm")
# What the data come from; beside TensorFlow, kfac-jax's own dependencies look for tf_keras, which asks for all of TensorFlow.
PACKAGES += ("tensorflow-cpu", "tensorflow-datasets", "importlib_resources", "scikit-learn")
ALONE = ("tf_keras",)
# Momenta, learning rates and dampings of kfac-jax's trials.
_CLASSIFIER = ((0.8, 0.9), (0.1, 0.3), (0.01, 0.03, 0.1))
GRIDS = {"cnn": _CLASSIFIER, "mlp": _CLASSIFIER, "autoencoder": ((0.8, 0.9), (0.3, 1.0), (0.01, 0.03))}
_making = threading.Lock()


def cases(quick):
    """One for each network, and one for each task and optimizer."""
    networks = ("3c1f",) if quick else ("3c1f", "resnet8")
    found = [{"name": network, "network": network, "mode": "jax", "rounds": 3} for network in networks]
    for task in ("mlp",) if quick else GRIDS:
        ours = next(case for case in tasks.cases(False) if case["name"] == f"{task}-KFAC") | {"trial_seeds": 1}
        grid = dict(zip(ours["grid"], map(list, GRIDS[task]), strict=True))
        for case in (ours, {**ours, "name": f"{task}-kfac-jax", "optimizer": "kfac-jax", "grid": grid}):
            short = {"epochs": 3, "grid": tasks.first_points(case["grid"]), "seeds": 2} if quick else {}
            found.append(case | short)
    return found


def environment(case):
    """Of the process that measures a case."""
    return {"KERAS_BACKEND": "jax", **results.KEEP_MEMORY}


def python(case):
    """The interpreter of the peers' environment, which is made where it is missing.

    Raises:
        RuntimeError: where it cannot be made.
    """
    found, stamp, packages = FOLDER / "bin" / "python", FOLDER / "installed", " ".join(PACKAGES + ALONE)
    with _making:
        if not stamp.exists() or stamp.read_text() != packages:
            for command in (
                [sys.executable, "-m", "venv", str(FOLDER)],
                [str(found), "-m", "pip", "install", "-q", *PACKAGES],
                [str(found), "-m", "pip", "install", "-q", "--no-deps", *ALONE],
            ):
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
            stamp.write_text(packages)
    return os.fspath(found)


def peer_optimizer(model, losses, **settings):
    """kfac-jax's optimizer of a Keras model's weights.

    Args:
        model: a Keras model that ends in logits.
        losses: loss values an example has: above 1, targets are between 0 and 1 and the loss is a mean over them.
        settings: of `kfac_jax.Optimizer`.
    """
    import jax
    import kfac_jax
    from jax import numpy as jnp

    others = [v.value for v in model.non_trainable_variables]

    def loss(parameters, batch):
        x, y = batch
        logits, _ = model.stateless_call(parameters, others, x, training=True)
        if losses > 1:
            kfac_jax.register_sigmoid_cross_entropy_loss(logits, y, weight=1 / losses)
            return jnp.mean(jax.nn.softplus(logits) - y * logits)
        kfac_jax.register_softmax_cross_entropy_loss(logits, y)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1))

    return loss, kfac_jax.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=0.0,
        num_burnin_steps=0,
        estimation_mode="fisher_empirical",
        # It finds Keras's normalizations twice and stops; without, it gives their weights blocks of their own.
        patterns_to_skip=tuple(f"normalization_haiku_broadcast_{axes}" for axes in range(3)),
        **settings,
    )


class Peer:
    """kfac-jax's optimizer on a network; `seconds` is how long a step takes."""

    # A number of a step on which this is due, at the longest intervals.
    KINDS = {"inverses": 0, "statistics": INTERVALS[-1][0], "plain": 1}

    def __init__(self, case):
        import jax
        from jax import numpy as jnp

        from benchmarks.methods import DAMPING
        from benchmarks.networks import NETWORKS, batch

        x, y, _ = batch(case["network"])
        model = NETWORKS[case["network"]]["make"]()
        # Steps give their buffers away.
        self.parameters = [jnp.array(v.value) for v in model.trainable_variables]
        factor_interval, inverse_interval = INTERVALS[-1]
        _, self.optimizer = peer_optimizer(
            model,
            1,
            learning_rate_schedule=lambda step: 1e-3,
            momentum_schedule=lambda step: 0.9,
            damping_schedule=lambda step: DAMPING,
            curvature_update_period=factor_interval,
            inverse_update_period=inverse_interval,
        )
        self.key, self.batch = jax.random.PRNGKey(0), (jnp.asarray(x), jnp.asarray(y))
        self.state = self.optimizer.init(self.parameters, self.key, self.batch)
        self.blocks = [type(block).__name__ for block in self.optimizer._estimator.blocks]

    def seconds(self, kind):
        """How long a step takes on which something is due."""
        import jax

        start = time.perf_counter()
        self.parameters, self.state, _ = self.optimizer.step(
            self.parameters, self.state, self.key, batch=self.batch, global_step_int=self.KINDS[kind]
        )
        jax.block_until_ready((self.parameters, self.state))
        return time.perf_counter() - start


class PeerTraining:
    """A training by kfac-jax that starts over for every run, with the weights that Keras draws for a seed."""

    def __init__(self, case):
        import jax
        from jax import numpy as jnp

        from benchmarks.task_data import MODELS, problem

        self.make_model, self.batch_size = MODELS[case["task"]], case["batch_size"]
        x, y = problem(case["task"]).training
        self.data = jnp.asarray(x), jnp.asarray(y)
        factors, inverses = case["intervals"]
        loss, self.optimizer = peer_optimizer(
            self.make_model(),
            case["losses_per_example"],
            # As this package's default.
            norm_constraint=1e-3,
            curvature_update_period=factors,
            inverse_update_period=inverses,
        )
        self.loss = jax.jit(loss)

    def run(self, settings, seed, epochs, until=-math.inf, every=1):
        """As `benchmarks.trials.Training.run`."""
        import jax
        import keras
        import numpy as np
        from jax import numpy as jnp

        keras.utils.set_random_seed(seed)
        parameters = [jnp.array(v.value) for v in self.make_model().trainable_variables]
        key, rng, count = jax.random.PRNGKey(seed), np.random.default_rng(seed), len(self.data[0])
        state = self.optimizer.init(parameters, key, tuple(a[: self.batch_size] for a in self.data))
        settings = {name: jnp.asarray(value) for name, value in settings.items()}
        losses, seconds, step = [], [], 0
        for epoch in range(1, epochs + 1):
            order, start = rng.permutation(count), time.perf_counter()
            for first in range(0, count - self.batch_size + 1, self.batch_size):
                batch = tuple(a[order[first : first + self.batch_size]] for a in self.data)
                parameters, state, _ = self.optimizer.step(
                    parameters, state, key, batch=batch, global_step_int=step, **settings
                )
                step += 1
            jax.block_until_ready((parameters, state))
            seconds.append(round(time.perf_counter() - start, 6))
            if epoch % every == 0:
                found = float(np.nan_to_num(self.loss(parameters, self.data), nan=1e30, posinf=1e30))
                losses.append(float(f"{found:.6g}"))
                if found <= until:
                    break
        return {"loss": losses, "seconds": seconds}


def measure(case):
    """Costs of steps, or trials and runs of the best of them."""
    if "task" not in case:
        return costs_of(case)
    from benchmarks.trials import measured

    if case["optimizer"] != "kfac-jax":
        return measured(case)
    training = PeerTraining(case)
    training.run({name: values[0] for name, values in case["grid"].items()}, 0, 1)
    return measured(case, functools.partial(training.run, epochs=case["epochs"]))


def costs_of(case):
    """Medians and ranges in milliseconds of the kinds of step of both."""
    import jax

    sgd, ours, peer = Timed(case, "sgd"), Timed(case, "kfac"), Peer(case)
    times = {
        "sgd": {"plain": []},
        "keras_ngd": {kind: [] for kind in peer.KINDS},
        "kfac-jax": {kind: [] for kind in peer.KINDS},
    }

    def turn():
        sgd.warm()
        found = {("sgd", "plain"): sgd.seconds()}
        ours.warm()
        for kind, due in ours.kinds.items():
            ours.prepare(*due)
            found["keras_ngd", kind] = ours.seconds()
        peer.seconds("plain")
        for kind in peer.KINDS:
            found["kfac-jax", kind] = peer.seconds(kind)
        return found

    # The first steps compile, and Keras's build their optimizers.
    ours.seconds()
    turn()
    with alone():
        turn()
        for _ in range(case["rounds"]):
            for (name, kind), seconds in turn().items():
                times[name][kind].append(1e3 * seconds)
    return {**summary(times), "blocks": peer.blocks, "jax": jax.__version__}


def table(payload):
    """A Markdown table of all networks, and one for each task."""
    found = [_costs_table([case for case in payload["cases"] if "task" not in case])]
    trained = [case for case in payload["cases"] if "task" in case]
    for of in tasks.by_task(trained).values():
        ends = [sum(run["loss"][-1] for run in case["runs"]) / len(case["runs"]) for case in of]
        found.append(tasks.task_table(of, of[0]["target"] or max(ends)))
    found.append(f"Both with {' and '.join(PACKAGES[:2])}, not with the jax that the next line names.")
    return "\n\n".join(found)


def overheads(case):
    """Milliseconds beyond SGD's of an average step at the longest intervals, by optimizer."""
    ms = case["milliseconds"]
    return {name: cost(ms[name], *INTERVALS[-1]) - ms["sgd"]["plain"] for name in ("keras_ngd", "kfac-jax")}


def goals(payload):
    """Goals of the overhead: name, what is asked, what is measured, whether it is met, where it goes."""
    found = []
    for case in payload["cases"]:
        if "task" not in case:
            over = overheads(case)
            share = over["keras_ngd"] / over["kfac-jax"]
            name = f"KFAC's overhead at (10,100), {case['network']}"
            why = "" if share <= 0.5 else f"{over['keras_ngd']:.1f} ms of {over['kfac-jax']:.1f}"
            found.append((name, "<= 0.50 of kfac-jax's", f"{share:.2f}", share <= 0.5, why))
    return found


def _costs_table(cases):
    columns = ["network", "SGD, ms", "optimizer", "nothing due", *(f"({f},{i})" for f, i in INTERVALS)]
    columns += ["ms of statistics", "of inverses", "overhead at (10,100) of kfac-jax's"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for case in cases:
        ms, sgd, over = case["milliseconds"], case["milliseconds"]["sgd"]["plain"], overheads(case)
        for name in over:
            of = ms[name]
            cells = [case["network"], f"{sgd:.0f}", name, f"{of['plain'] / sgd:.2f}x"]
            cells += [f"{cost(of, *intervals) / sgd:.2f}x" for intervals in INTERVALS]
            cells += [f"{of['statistics'] - of['plain']:.0f}", f"{of['inverses'] - of['statistics']:.0f}"]
            cells += [f"{over['keras_ngd'] / over['kfac-jax']:.2f}" if name == "keras_ngd" else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
