"""What a step of each method costs, in steps of SGD with momentum on the same network, backend and batch, all in one run.

A case trains one network on one backend with all optimizers, turn by turn. A natural-gradient method takes three kinds of
step: one on which nothing is due, one that updates the statistics, and one that also refreshes the inverses; methods that keep
rows take both at once. What a pair of intervals costs is their average over a whole cycle. THOR renews all layers at every
refresh here. "captured" is SGD on a model captured for KFAC whose layers never record.
"""

import statistics
import time

from benchmarks import results
from benchmarks.methods import METHODS, ROW_METHODS, optimizer_of

MODES = ("tensorflow", "tensorflow-jit", "jax")
INTERVALS = ((1, 1), (1, 10), (10, 100))
# Compiling all methods for a deep network takes XLA many minutes.
CASES = [
    *((network, mode) for network in ("resnet32", "unet", "transformer") for mode in ("tensorflow", "jax")),
    ("resnet18", "tensorflow"),
    ("resnet50", "tensorflow"),
]
QUICK = [("3c1f", "tensorflow"), ("3c1f", "jax")]


def cases(quick):
    """One for each network and backend."""
    rounds, pairs = (3, QUICK) if quick else (5, CASES)
    return [
        {"name": f"{network}-{mode}", "network": network, "mode": mode, "methods": list(METHODS), "rounds": rounds}
        for network, mode in pairs
    ]


def environment(case):
    """Of the process that measures a case."""
    return {"KERAS_BACKEND": case["mode"].split("-")[0], **results.KEEP_MEMORY}


class Timed:
    """A model that is trained by one method, and can be told what is due in its next step."""

    def __init__(self, case, method):
        import keras

        import keras_ngd
        from benchmarks.networks import NETWORKS, batch

        keras.utils.set_random_seed(0)
        self.method, self.x, (self.y, loss) = method, *_first(batch(case["network"]))
        self.model = NETWORKS[case["network"]]["make"]()
        self.optimizer, captured = optimizer_of(method, case["network"])
        self.bytes = 0 if captured is None else keras_ngd.capture(self.model, captured).bytes
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
            self.optimizer._next_inverses.assign(0 if refreshing else 2**30)

    def seconds(self):
        """How long a step takes."""
        start = time.perf_counter()
        self.model.train_on_batch(self.x, self.y)
        return time.perf_counter() - start


def _first(batch):
    x, *rest = batch
    return x, rest


def measure(case):
    """Medians and ranges in milliseconds of each method's kinds of step."""
    import keras

    models = {method: Timed(case, method) for method in ("sgd", "captured", *case["methods"])}
    first, times = {}, {method: {kind: [] for kind in one.kinds} for method, one in models.items()}
    for method, one in models.items():
        first[method] = one.seconds()
    for turn in range(case["rounds"] + 1):
        for method, one in models.items():
            for kind, due in one.kinds.items():
                one.prepare(*due)
                seconds = one.seconds()
                if turn:
                    times[method][kind].append(1e3 * seconds)
    return {
        "milliseconds": {m: {kind: statistics.median(t) for kind, t in found.items()} for m, found in times.items()},
        "ranges": {m: {kind: [min(t), max(t)] for kind, t in found.items()} for m, found in times.items()},
        "first_step_seconds": first,
        "second_order_bytes": {method: one.bytes for method, one in models.items()},
        "device": keras.distribution.list_devices()[0],
    }


def cost(milliseconds, factor_interval, inverse_interval):
    """Milliseconds of a step, on average over a cycle; rows are taken when inverses are refreshed."""
    plain = milliseconds["plain"]
    total = (inverse_interval - 1) * plain + milliseconds.get("inverses", plain)
    if "statistics" in milliseconds:
        total += (inverse_interval // factor_interval - 1) * (milliseconds["statistics"] - plain)
    return total / inverse_interval


def table(payload):
    """A Markdown table for each case."""
    parts = []
    for case in payload["cases"]:
        ms, sgd = case["milliseconds"], case["milliseconds"]["sgd"]["plain"]
        lines = [
            f"**{case['network']}, {case['mode']}**: a step of SGD takes {sgd:.0f} ms.",
            "",
            "| method | nothing due | (1,1) | (1,10) | (10,100) | ms of statistics | of inverses | first step, s | state, MiB |",
            "|---" * 9 + "|",
        ]
        for method, of in ms.items():
            if method == "sgd":
                continue
            cells = [method, f"{of['plain'] / sgd:.2f}x"]
            second_order = "inverses" in of
            cells += [f"{cost(of, *i) / sgd:.2f}x" if second_order else "" for i in INTERVALS]
            update = of.get("statistics", of.get("inverses", 0)) - of["plain"]
            cells.append(f"{update:.0f}" if second_order else "")
            cells.append(f"{of['inverses'] - of['statistics']:.0f}" if "statistics" in of else "")
            cells.append(f"{case['first_step_seconds'][method]:.0f}")
            cells.append(f"{case['second_order_bytes'][method] / 2**20:.0f}" if second_order else "")
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def plot(payload, path):
    """Costs at (10,100), by method, for each case."""
    from matplotlib.figure import Figure

    found = payload["cases"]
    figure = Figure(figsize=(10, 1.2 + 1.6 * len(found)), layout="constrained")
    for axis, case in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found, strict=True):
        ms = case["milliseconds"]
        ratios = {m: cost(of, *INTERVALS[-1]) / ms["sgd"]["plain"] for m, of in ms.items() if m != "sgd"}
        bars = axis.bar(list(ratios), list(ratios.values()), color="tab:blue")
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(f"{case['network']}, {case['mode']}", loc="left", fontsize=9)
        axis.set_ylabel("of SGD's step")
        axis.margins(y=0.2)
    figure.savefig(path, dpi=100)
