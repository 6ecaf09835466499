"""KFAC of this package and of kfac-jax on the same Keras model, data, batch and jax, in one run, turn by turn.

kfac-jax does not run on the jax of this project, so both run in an environment of their own, which the benchmark makes
(`.venv-peers`). Of kfac-jax, `kfac_jax.Optimizer` is used, with Keras's
`stateless_call` as its loss function, its estimator for the gradients of the targets (`"fisher_empirical"`, what this package
records), and neither adaptive damping nor adaptive rates. It registers all layers by itself. The ratios are to Keras's SGD.
"""

import os
import pathlib
import subprocess
import sys
import time

from benchmarks import results
from benchmarks.costs import INTERVALS, Timed, cost, summary

FOLDER = pathlib.Path(__file__).parent.parent / ".venv-peers"
PACKAGES = ("kfac-jax==0.0.8", "jax==0.7.2", "jaxlib==0.7.2", "keras", "tqdm")
NEVER = 10**6


def cases(quick):
    """One for each network."""
    networks, rounds = (("3c1f",), 3) if quick else (("3c1f", "resnet32", "resnet18"), 5)
    return [{"name": network, "network": network, "mode": "jax", "rounds": rounds} for network in networks]


def environment(case):
    """Of the process that measures a case."""
    return {"KERAS_BACKEND": "jax", **results.KEEP_MEMORY}


def python(case):
    """The interpreter of the peers' environment, which is made where it is missing.

    Raises:
        RuntimeError: where it cannot be made.
    """
    found = FOLDER / "bin" / "python"
    if not (FOLDER / "complete").exists():
        for command in (
            [sys.executable, "-m", "venv", str(FOLDER)],
            [str(found), "-m", "pip", "install", "-q", *PACKAGES],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        (FOLDER / "complete").touch()
    return os.fspath(found)


class Peer:
    """kfac-jax's optimizer on a network; `seconds` is how long a step takes."""

    def __init__(self, case, factor_interval, inverse_interval):
        import jax
        import kfac_jax
        from jax import numpy as jnp

        from benchmarks.methods import DAMPING
        from benchmarks.networks import NETWORKS, batch

        x, y, _ = batch(case["network"])
        model = NETWORKS[case["network"]]["make"]()
        # Steps give their buffers away.
        self.parameters = [jnp.array(v.value) for v in model.trainable_variables]
        others = [v.value for v in model.non_trainable_variables]

        def loss(parameters, batch):
            x, y = batch
            logits, _ = model.stateless_call(parameters, others, x, training=True)
            kfac_jax.register_softmax_cross_entropy_loss(logits, y)
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1))

        self.optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(loss),
            l2_reg=0.0,
            learning_rate_schedule=lambda step: 1e-3,
            momentum_schedule=lambda step: 0.9,
            damping_schedule=lambda step: DAMPING,
            num_burnin_steps=0,
            curvature_update_period=factor_interval,
            inverse_update_period=inverse_interval,
            estimation_mode="fisher_empirical",
        )
        self.key, self.batch, self.step = jax.random.PRNGKey(0), (jnp.asarray(x), jnp.asarray(y)), 0
        self.state = self.optimizer.init(self.parameters, self.key, self.batch)
        self.blocks = [type(block).__name__ for block in self.optimizer._estimator.blocks]

    def seconds(self):
        """How long a step takes."""
        import jax

        start = time.perf_counter()
        self.parameters, self.state, _ = self.optimizer.step(
            self.parameters, self.state, self.key, batch=self.batch, global_step_int=self.step
        )
        jax.block_until_ready((self.parameters, self.state))
        self.step += 1
        return time.perf_counter() - start


def measure(case):
    """Medians and ranges in milliseconds of the kinds of step of both."""
    import jax

    ours = {"sgd": Timed(case, "sgd"), "kfac": Timed(case, "kfac")}
    peers = {
        "inverses": Peer(case, 1, 1),
        "statistics": Peer(case, 1, NEVER),
        "plain": Peer(case, NEVER, NEVER),
    }
    first = {"keras_ngd": ours["kfac"].seconds(), "kfac-jax": peers["inverses"].seconds()}
    times = {"sgd": {"plain": []}, "keras_ngd": {kind: [] for kind in peers}, "kfac-jax": {kind: [] for kind in peers}}
    # The first steps compile, and all intervals begin with an update.
    for turn in range(case["rounds"] + 2):
        found = {("sgd", "plain"): ours["sgd"].seconds()}
        for kind, due in ours["kfac"].kinds.items():
            ours["kfac"].prepare(*due)
            found["keras_ngd", kind] = ours["kfac"].seconds()
        for kind, peer in peers.items():
            found["kfac-jax", kind] = peer.seconds()
        if turn > 1:
            for (name, kind), seconds in found.items():
                times[name][kind].append(1e3 * seconds)
    return {
        **summary(times),
        "first_step_seconds": first,
        "blocks": peers["plain"].blocks,
        "jax": jax.__version__,
    }


def table(payload):
    """A Markdown table of all networks."""
    columns = ["network", "SGD, ms", "optimizer", "nothing due", *(f"({f},{i})" for f, i in INTERVALS)]
    columns += ["ms of statistics", "of inverses", "first step, s", "overhead at (10,100) of kfac-jax's"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for case in payload["cases"]:
        ms, sgd = case["milliseconds"], case["milliseconds"]["sgd"]["plain"]
        over = {name: cost(ms[name], *INTERVALS[-1]) - sgd for name in ("keras_ngd", "kfac-jax")}
        for name in over:
            of = ms[name]
            cells = [case["network"], f"{sgd:.0f}", name, f"{of['plain'] / sgd:.2f}x"]
            cells += [f"{cost(of, *intervals) / sgd:.2f}x" for intervals in INTERVALS]
            cells += [f"{of['statistics'] - of['plain']:.0f}", f"{of['inverses'] - of['statistics']:.0f}"]
            cells += [f"{case['first_step_seconds'][name]:.0f}"]
            cells += [f"{over['keras_ngd'] / over['kfac-jax']:.2f}" if name == "keras_ngd" else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
