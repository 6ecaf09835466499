"""What a step of each method costs, in steps of SGD with momentum on the same network, backend and batch, all in one run.

A case trains one network on one backend with all optimizers, turn by turn. A natural-gradient method takes three kinds of
step: one on which nothing is due, one that updates the statistics, and one that also refreshes the inverses, or the bases;
methods that keep rows take both at once. What a pair of intervals costs is their average over a whole cycle. THOR renews all
layers at every refresh here, EKFAC and EigenAdam all bases. "captured" is SGD on a model captured for KFAC whose layers never
record.

What each part of second order takes is the difference of two kinds of step. Beside it stands what share this is of the rate of
a large matrix product, measured in the same process: the operations that a part has by the layers' shapes (those of
`keras_ngd.analysis.cost_model`; an inverse of d rows counts as d^3, a step of orthogonal iteration as 4 d^3), at that rate, over
the time it took. More than all of it is a part that needs fewer operations than these, as the statistics of convolutions that
store no patches. EigenAdam's preconditioning is what its step has beyond Adam's.
"""

import ctypes
import dataclasses
import math
import pathlib
import statistics
import time

from benchmarks import results
from benchmarks.alone import alone
from benchmarks.methods import BESIDE, METHODS, ROTATIONS, ROW_METHODS, optimizer_of

INTERVALS = ((1, 1), (1, 10), (10, 10), (10, 100))
# Compiling all methods for a deep network takes XLA many minutes. The last three are trained by `benchmarks.tasks`.
CASES = [
    *(
        (network, mode)
        for network in ("resnet32", "unet", "transformer", "language-model")
        for mode in ("tensorflow", "jax")
    ),
    ("resnet18", "tensorflow"),
    ("resnet50", "tensorflow"),
    *((network, "jax") for network in ("digits-cnn", "digits-mlp", "autoencoder")),
]
QUICK = [("3c1f", "tensorflow"), ("3c1f", "jax")]
# Short steps are taken for so long, in so many rounds at most, whatever the rounds of a case.
SECONDS, MOST_ROUNDS = 30, 60
# Of each method the intervals and the most that its step may be, of SGD's or of that of `BESIDE`.
GOALS = (
    ("kfac", INTERVALS[-1], 1.15),
    ("ekfac", INTERVALS[-1], 1.15),
    ("eigen-adam", INTERVALS[-1], 1.15),
    ("eigen-adam", (10, 10), 1.5),
    ("thor", INTERVALS[-1], 1.05),
    ("hylo-kid", INTERVALS[-1], 1.05),
    ("hylo-kis", INTERVALS[-1], 1.05),
)
PARTS = ("statistics", "inverses", "preconditioning")
NAMES = {"sgd": "SGD", "adam": "Adam"}
# Of a step of orthogonal iteration, for each of an inverse: three products, and a QR factorization with its factor Q.
ITERATION_OPERATIONS = 4
# Linux forgets here what the largest memory of this process was.
PEAK = pathlib.Path("/proc/self/clear_refs")


def cases(quick):
    """One for each network and backend."""
    found, settings = QUICK if quick else CASES, {"rounds": 3, "seconds": 0 if quick else SECONDS}
    return [
        {"name": f"{network}-{mode}", "network": network, "mode": mode, "methods": list(METHODS), **settings}
        for network, mode in found
    ]


def environment(case):
    """Of the process that measures a case."""
    return {"KERAS_BACKEND": case["mode"], **results.KEEP_MEMORY}


class Timed:
    """A model that is trained by one method, and can be told what is due in its next step.

    Args:
        case: its "network" and "mode".
        method: as for `optimizer_of`.
        arguments: a dict, as for `optimizer_of`. Default None: none.
        **selected: further arguments of `capture`.
    """

    def __init__(self, case, method, arguments=None, **selected):
        import keras

        import keras_ngd
        from benchmarks.networks import NETWORKS, batch

        keras.utils.set_random_seed(0)
        self.method, (self.x, self.y, loss) = method, batch(case["network"])
        self.model = NETWORKS[case["network"]]["make"]()
        self.optimizer, captured = optimizer_of(method, case["network"], **(arguments or {}))
        if captured is not None:
            keras_ngd.capture(self.model, captured, **selected)
        self.statistics = [
            s for la in self.model._flatten_layers() if (s := getattr(la, "statistics", None)) is not None
        ]
        self.model.compile(optimizer=self.optimizer, loss=loss, jit_compile=case["mode"] != "tensorflow")

    @property
    def kinds(self):
        """Of step: whether statistics and inverses are due."""
        if not self.statistics or self.method == "captured":
            return {"plain": (False, False)}
        found = {"plain": (False, False), "inverses": (True, True)}
        return found if self.method in ROW_METHODS else {**found, "statistics": (True, False)}

    def prepare(self, recording, refreshing):
        """Says what is due in the next step."""
        # A gate of HyLo's says which rows are taken; an average takes a batch with a small weight.
        opened = {"hylo-kid": 2.0, "hylo-kis": 1.0}.get(self.method, 1.0 if self.method in ROW_METHODS else 0.05)
        for one in self.statistics:
            one.gate.assign(opened * recording)
        if self.statistics and self.method != "captured":
            self.optimizer.clock.next_inverses.assign(0 if refreshing else 2**30)

    def seconds(self):
        """How long a step takes."""
        start = time.perf_counter()
        self.model.train_on_batch(self.x, self.y)
        return time.perf_counter() - start

    def warm(self):
        """Takes a step that does not count: what other methods have left of the memory is laid out otherwise."""
        self.prepare(False, False)
        self.seconds()

    def kept(self):
        """Bytes of weights and state."""
        return sum(4 * math.prod(v.shape) for v in self.model.variables + self.optimizer.variables)

    def peak(self):
        """Bytes that a step with everything due takes beside what is kept, at its peak."""
        found = []
        for _ in range(3):
            self.prepare(True, True)
            # What the allocator keeps of earlier steps would hide what this one takes.
            ctypes.CDLL(None).malloc_trim(0)
            PEAK.write_text("5")
            before = _resident("VmRSS")
            self.seconds()
            found.append(_resident("VmHWM") - before)
        return statistics.median(found)


def _resident(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def ideal(method, job, flops):
    """Milliseconds that the operations of each part of a method's update take at a rate."""
    from keras_ngd.analysis import projection, rates
    from keras_ngd.optimizers.eigenbasis_method import DEFAULT_SPLIT

    machine, inverses, products = rates.Rates(flops, flops), 1, 1
    if method in ROTATIONS:
        # Blocks as THOR has them.
        inverses, products = ITERATION_OPERATIONS, ROTATIONS[method]
        method, job = "thor", dataclasses.replace(job, split=DEFAULT_SPLIT)
    seconds = (
        projection.statistics_seconds(method, job, machine),
        inverses * sum(projection.inversion_costs(method, job, machine)),
        products * sum(projection.preconditioning_costs(method, job, machine)),
    )
    return {part: 1e3 * s for part, s in zip(PARTS, seconds, strict=True)}


def summary(times):
    """Medians and ranges of lists of times, by method and kind of step."""
    return {
        "milliseconds": {m: {kind: statistics.median(t) for kind, t in of.items()} for m, of in times.items()},
        "ranges": {m: {kind: [min(t), max(t)] for kind, t in of.items()} for m, of in times.items()},
    }


def measure(case):
    """Medians and ranges in milliseconds of each method's kinds of step, its memory, and the machine's rate."""
    from benchmarks.networks import NETWORKS
    from keras_ngd.analysis import exchanges

    models, first = {}, {}
    for method in ("sgd", "captured", *case["methods"]):
        start = time.process_time()
        models[method] = Timed(case, method)
        models[method].seconds()
        first[method] = time.process_time() - start
    second_order = [method for method in case["methods"] if len(models[method].kinds) > 1]
    with alone():
        found = timed(models, case["rounds"], case["seconds"]) | {"peak_bytes": peaks(models)}
    settings = NETWORKS[case["network"]]
    job = exchanges.Job(exchanges.layer_shapes(models["sgd"].model), 1, settings["batch"], split=settings["split"])
    ideal_milliseconds = {method: ideal(method, job, found["product_flops"]) for method in second_order}
    return {**found, "first_step_processor_seconds": first, "ideal_milliseconds": ideal_milliseconds}


def timed(models, rounds, least_seconds):
    """Medians and ranges of the kinds of step of each of some `Timed`, taken turn by turn; their state, and the machine's rate.

    Args:
        models: `Timed` by name.
        rounds: how many turns count, at least.
        least_seconds: until when further turns are taken, up to `MOST_ROUNDS`.
    """
    import keras

    from keras_ngd.analysis.rates import product_seconds

    times = {method: {kind: [] for kind in one.kinds} for method, one in models.items()}
    turn, start = 0, time.perf_counter()
    while turn <= rounds or (turn <= MOST_ROUNDS and time.perf_counter() - start < least_seconds):
        for method, one in models.items():
            one.warm()
            for kind, due in one.kinds.items():
                one.prepare(*due)
                seconds = one.seconds()
                if turn:
                    times[method][kind].append(1e3 * seconds)
        turn += 1
    return {
        **summary(times),
        "kept_bytes": {method: one.kept() for method, one in models.items()},
        "product_flops": 2 * 1024**3 / product_seconds(1024),
        "device": keras.distribution.list_devices()[0],
    }


def peaks(models):
    """What `Timed.peak` says of each of some `Timed`; nothing where it would not be seen. Later steps get their memory anew."""
    import keras

    # TensorFlow's allocator and those of GPUs keep what they once had.
    seen = PEAK.exists() and keras.backend.backend() == "jax" and "cpu" in keras.distribution.list_devices()[0]
    return {method: one.peak() for method, one in models.items()} if seen else {}


def cost(milliseconds, factor_interval, inverse_interval):
    """Milliseconds of a step, on average over a cycle; rows are taken when inverses are refreshed."""
    plain = milliseconds["plain"]
    total = (inverse_interval - 1) * plain + milliseconds.get("inverses", plain)
    if "statistics" in milliseconds:
        total += (inverse_interval // factor_interval - 1) * (milliseconds["statistics"] - plain)
    return total / inverse_interval


def ratio(case, method, intervals=INTERVALS[-1], beside="sgd"):
    """A method's average step, in steps of another; by default at the longest intervals, in steps of SGD."""
    return cost(case["milliseconds"][method], *intervals) / case["milliseconds"][beside]["plain"]


def parts(milliseconds, plain):
    """Milliseconds of statistics, inverses and preconditioning; rows and what is made of them count as statistics.

    Args:
        milliseconds: by kind of step.
        plain: of a step of the same network without the method.
    """
    both = milliseconds["inverses"] - milliseconds["plain"]
    rows = "statistics" not in milliseconds
    inverses = 0.0 if rows else milliseconds["inverses"] - milliseconds["statistics"]
    return dict(zip(PARTS, (both - inverses, inverses, milliseconds["plain"] - plain), strict=True))


def _row(case, method):
    """A method's line of a case's table."""
    of, sgd = case["milliseconds"][method], case["milliseconds"]["sgd"]["plain"]
    cells = [method, f"{of['plain'] / sgd:.2f}x"]
    if "inverses" in of:
        cells += [f"{ratio(case, method, intervals):.2f}x" for intervals in INTERVALS]
        operations = case["ideal_milliseconds"][method]
        if "statistics" not in of:
            operations = {**operations, "statistics": operations["statistics"] + operations["inverses"], "inverses": 0}
        beside = case["milliseconds"][BESIDE.get(method, "sgd")]["plain"]
        for part, taken in parts(of, beside).items():
            share = f" ({operations[part] / taken:.0%})" if taken > 0 and operations[part] else ""
            cells.append(f"{taken:.1f}{share}" if operations[part] else "")
    else:
        cells += [""] * (len(INTERVALS) + len(PARTS))
    found = [case[kind].get(method) for kind in ("kept_bytes", "peak_bytes")]
    cells += ["" if count is None else f"{count / 2**20:.1f}" for count in found]
    return [*cells, f"{case['first_step_processor_seconds'][method]:.0f}"]


def table(payload):
    """A Markdown table for each case."""
    columns = ["method", "nothing due", *(f"({f},{i})" for f, i in INTERVALS)]
    columns += [
        *(f"{part}, ms (of the rate)" for part in PARTS),
        "kept, MiB",
        "a step's peak, MiB",
        "first step, s of the processor",
    ]
    found = []
    for case in payload["cases"]:
        sgd, rate = case["milliseconds"]["sgd"]["plain"], case["product_flops"]
        title = f"**{case['network']}, {case['mode']}**: a step of SGD takes {sgd:.1f} ms; products, {rate / 1e9:.0f} GFLOP/s."
        lines = [title, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_row(case, method))} |" for method in case["milliseconds"]]
        found.append("\n".join(lines))
    return "\n\n".join(found)


def profile(case, method, intervals=INTERVALS[-1]):
    """Where an average step goes, beyond that of what it is compared with: shares of that step."""
    of, plain = case["milliseconds"][method], case["milliseconds"][BESIDE.get(method, "sgd")]["plain"]
    factors, inverses = intervals
    # Rows are taken when inverses are due.
    every = {"statistics": factors if "statistics" in of else inverses, "inverses": inverses, "preconditioning": 1}
    operations = case["ideal_milliseconds"][method]["preconditioning"] / plain
    found = [f"{part} {taken / plain / every[part]:+.3f}" for part, taken in parts(of, plain).items()]
    return f"{', '.join(found)}, whose operations take {operations:.3f} at the rate of a large product"


def goals(payload):
    """Goals of a step: name, what is asked, what is measured, whether it is met, where it goes.

    What is not measured yet has none.
    """
    found = []
    for case in payload["cases"]:
        for method, intervals, most in GOALS:
            beside = BESIDE.get(method, "sgd")
            if not {method, beside} <= set(case["milliseconds"]):
                continue
            measured = ratio(case, method, intervals, beside)
            name = f"{method} at {str(intervals).replace(' ', '')}, {case['network']}, {case['mode']}"
            met = measured <= most
            why = "" if met else profile(case, method, intervals)
            found.append((name, f"<= {most:.2f}x of {NAMES[beside]}'s step", f"{measured:.2f}x", met, why))
    return found


def plot(payload, path):
    """Costs at (10,100), by method, for each case."""
    from matplotlib.figure import Figure

    found = payload["cases"]
    figure = Figure(figsize=(10, 1.2 + 1.6 * len(found)), layout="constrained")
    for axis, case in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found, strict=True):
        ratios = {method: ratio(case, method) for method in case["milliseconds"] if method != "sgd"}
        bars = axis.bar(list(ratios), list(ratios.values()), color="tab:blue")
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(f"{case['network']}, {case['mode']}", loc="left", fontsize=9)
        axis.set_ylabel("of SGD's step")
        axis.margins(y=0.2)
    figure.savefig(path, dpi=100)
