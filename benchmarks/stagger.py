"""How even steps are whose refreshes are spread over the interval, and how uneven those are that refresh all layers at once.

A case trains one network on one backend with KFAC, with `stagger` and without, a round of the interval each in turn.
Statistics are recorded in the first step alone, so that what differs between steps is the refresh. Times are processor seconds,
which other work on the machine changes little, and of each step of a round the median over all rounds.
"""

import statistics
import time

from benchmarks import costs, results

INTERVAL, ROUNDS = 20, 4
# With layers as wide and batches as small as these, a refresh takes as long as several steps.
NETWORKS = {
    "resnet32-wide": {"width": 32, "batch": 8},
    "resnet32": {"width": 16, "batch": 8},
}
MOST = 2.0
KINDS = {"at once": False, "spread": True}


def cases(quick):
    """One for each network and backend."""
    networks = ["resnet32"] if quick else ["resnet32-wide"]
    return [
        {
            "name": f"{name}-{mode}",
            "network": name,
            "mode": mode,
            "interval": INTERVAL,
            "rounds": 1 if quick else ROUNDS,
        }
        for name in networks
        for mode in ("tensorflow", "jax")
    ]


def environment(case):
    """Of the process that measures a case."""
    # The threads of JAX's LAPACK wait without giving way, which would count as work.
    return {**costs.environment(case), results.THREADS: "1"}


def trained(case, stagger):
    """A function that takes so many steps and returns the processor milliseconds of each, and the optimizer."""
    import keras
    import numpy as np

    import keras_ngd
    from examples.networks import resnet32

    settings, rng = NETWORKS[case["network"]], np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    model = resnet32(width=settings["width"])
    optimizer = keras_ngd.KFAC(
        1e-3, factor_interval=10**6, inverse_interval=case["interval"], interval_growth=None, stagger=stagger
    )
    keras_ngd.capture(model, optimizer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, jit_compile=case["mode"] != "tensorflow")
    x = rng.normal(size=(settings["batch"], 32, 32, 3)).astype("float32")
    y = rng.integers(0, 10, settings["batch"])

    def run(steps):
        found = []
        for _ in range(steps):
            start = time.process_time()
            model.train_on_batch(x, y)
            found.append(1e3 * (time.process_time() - start))
        return found

    return run, optimizer


def measure(case):
    """Of each kind the median milliseconds of each step of a round, how many shares there are, and the first step's seconds."""
    runs, found = {}, {}
    for kind, stagger in KINDS.items():
        run, optimizer = trained(case, stagger)
        # With its compilation; the first round is the first refresh's.
        [first, *_] = run(case["interval"])
        runs[kind], found[kind] = run, {"first_step_seconds": first / 1e3, "shares": len(optimizer.shares.parts) or 1}
    times = {kind: [] for kind in KINDS}
    for _ in range(case["rounds"]):
        for kind, run in runs.items():
            times[kind].append(run(case["interval"]))
    for kind, rounds in times.items():
        found[kind]["milliseconds"] = [statistics.median(of_step) for of_step in zip(*rounds, strict=True)]
    return {"kinds": found}


def longest(found):
    """A round's longest step, in its median steps."""
    return max(found["milliseconds"]) / statistics.median(found["milliseconds"])


def table(payload):
    """Markdown of all cases."""
    columns = ["network, backend", "refreshes", "shares", "median step, ms", "mean", "longest", "longest / median"]
    columns += ["first step, s of the processor"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for case in payload["cases"]:
        for kind, found in case["kinds"].items():
            ms = found["milliseconds"]
            cells = [f"{case['network']}, {case['mode']}", kind, str(found["shares"])]
            cells += [f"{value:.0f}" for value in (statistics.median(ms), statistics.mean(ms), max(ms))]
            cells += [f"{longest(found):.2f}x", f"{found['first_step_seconds']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def goals(payload):
    """That no step is much longer than others where refreshes are spread: see `costs.goals`."""
    found = []
    for case in payload["cases"]:
        ratio = longest(case["kinds"]["spread"])
        name = f"longest step of an interval, `stagger=True`, {case['network']}, {case['mode']}"
        found.append((name, f"<= {MOST:.0f}x of the median step", f"{ratio:.2f}x", ratio <= MOST, ""))
    return found
