"""Where the first step goes: tracing, compiling, and the step itself, in seconds and in nodes of the program.

Each case is a process of its own: it makes a network, captures it, compiles it and trains on one batch in plain `fit`, once (the
first step, on which everything is due) and then more often. What the first takes beyond a later one on which everything is due is
the start: tracing is measured again by itself, and the rest of it is what the backend makes of the program. Times are seconds of
the processor: the sum over its cores, which other work on the machine changes less than the time on the clock; the latter stands
beside it.

Nodes are those of TensorFlow's graph with all functions in it, and operations of JAX's StableHLO; by package of `keras_ngd` they
are those whose innermost line of ours is there. The others are Keras's, for the network and for SGD.
"""

import collections
import re
import statistics
import time

from benchmarks import costs
from benchmarks.alone import alone

NETWORKS = ("resnet50", "resnet32", "language-model", "autoencoder", "digits-cnn")
BACKENDS, METHODS = ("tensorflow", "jax"), ("sgd", "adam", "kfac", "eigen-adam", "thor", "hylo-kid")
# Of SGD's first step, by network and method.
GOALS = {("resnet50", "kfac"): 1.8, ("resnet50", "thor"): 1.6, ("resnet50", "hylo-kid"): 1.5}
LATER_STEPS = 3
environment = costs.environment


def cases(quick):
    """One for each network, backend and method."""
    return [
        {"name": f"{network}-{mode}-{method}", "network": network, "mode": mode, "method": method}
        for network in (NETWORKS[-1:] if quick else NETWORKS)
        for mode in BACKENDS
        for method in (METHODS[:3:2] if quick else METHODS)
    ]


def measure(case):
    """Seconds of the first step and of later ones on which everything is due, of tracing, and the nodes of the program."""
    with alone():
        start = time.process_time(), time.perf_counter()
        timed = costs.Timed(case, case["method"])
        made = time.process_time() - start[0]
        first, on_the_clock = _fit(timed)
        everything = timed.kinds.get("inverses")
        later = []
        for _ in range(LATER_STEPS):
            if everything is not None:
                timed.prepare(*everything)
            later.append(_fit(timed))
        tracing = time.process_time()
        program = _traced(timed, case["mode"])
        tracing = time.process_time() - tracing
    step, step_on_the_clock = (statistics.median(of_one) for of_one in zip(*later, strict=True))
    nodes = _nodes_of_graph(program) if case["mode"] == "tensorflow" else _nodes_of_text(program)
    found = {"made": made, "first": first, "first_on_the_clock": on_the_clock, "step": step, "tracing": tracing}
    found = {name: round(seconds, 3) for name, seconds in found.items()} | {
        "step_on_the_clock": round(step_on_the_clock, 3)
    }
    return {**found, "nodes": sum(nodes.values()), "nodes_of": dict(nodes.most_common())}


def _fit(timed):
    """Seconds of the processor that `fit` takes for one batch, and on the clock until the batch is over."""
    import keras

    ends = []

    def batch_end(batch, logs):
        # What is dispatched is waited for.
        float(keras.ops.convert_to_numpy(logs["loss"]))
        ends.append(time.perf_counter())

    start = time.process_time(), time.perf_counter()
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=batch_end)
    timed.model.fit(timed.x, timed.y, batch_size=len(timed.x), verbose=0, callbacks=[callback])
    # Not when `fit` is over: TensorFlow's input pipeline may take seconds to end, of which it computes nothing.
    return time.process_time() - start[0], ends[0] - start[1]


def _traced(timed, mode):
    """The program of a step, traced anew."""
    model, batch = timed.model, (timed.x, timed.y)
    if mode == "tensorflow":
        import tensorflow as tf

        return (
            tf.function(model.train_step, autograph=False).get_concrete_function(tuple(map(tf.constant, batch))).graph
        )
    import jax

    lists = model.trainable_variables, model.non_trainable_variables, model.optimizer.variables, model.metrics_variables
    state = tuple([variable.value for variable in variables] for variables in lists)
    # Nothing that was traced before is taken from there.
    jax.clear_caches()
    lowered = jax.jit(lambda *arguments: model.train_step(*arguments), donate_argnums=0).lower(state, batch)
    # With the places in the source of its operations.
    return lowered.as_text(debug_info=True)


def _package(path):
    """The package of `keras_ngd` that a file is in, or None."""
    found = re.search(r"keras_ngd/(?:(\w+)/)?\w+\.py$", path)
    return found and (found[1] or "keras_ngd")


def _nodes_of_graph(graph):
    """The nodes of a graph of TensorFlow's with its functions, by package."""
    definition = graph.as_graph_def()
    functions = {function.signature.name: function.node_def for function in definition.library.function}
    counted, nodes = set(), collections.Counter()

    def size(node):
        named = [value.func.name for value in node.attr.values()]
        named += [one.name for value in node.attr.values() for one in value.list.func]
        found = 1
        for name in named:
            if name in functions and name not in counted:
                counted.add(name)
                found += sum(map(size, functions[name]))
        return found

    operations = {operation.name: operation for operation in graph.get_operations()}
    for node in definition.node:
        frames = reversed(operations[node.name].traceback or [])
        nodes[next(filter(None, (_package(frame.filename) for frame in frames)), "keras")] += size(node)
    return nodes


def _nodes_of_text(text):
    """The operations of StableHLO's text, by package."""
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
    known = {}

    def package(place):
        if place not in known:
            # `"name"(#loc1)`, `callsite(#loc2 at #loc3)`, or a file: the innermost comes first.
            said = places.get(place, "")
            own = re.match(r'"([^"]+\.py)":\d+', said)
            known[place] = None
            known[place] = (
                _package(own[1]) if own else next(filter(None, map(package, re.findall(r"#loc\d*", said))), None)
            )
        return known[place]

    found = re.findall(r"^ +(?:%\S+ = )?\"?(?:stablehlo|chlo)\.\w+.* loc\((#loc\d*)\)$", text, re.MULTILINE)
    return collections.Counter(package(place) or "keras" for place in found)


def by_network(cases):
    """For each network and backend its cases by method."""
    found = {}
    for case in cases:
        found.setdefault((case["network"], case["mode"]), {})[case["method"]] = case
    return found


def _compiling(case):
    """Seconds of the first step that are neither tracing nor a step."""
    return max(case["first"] - case["step"] - case["tracing"], 0.0)


def table(payload):
    """A Markdown table for each network and backend."""
    columns = [
        "method",
        "first step, s",
        "of SGD's",
        "tracing",
        "compiling",
        "the step",
        "on the clock",
        "nodes",
        "of them",
    ]
    found = []
    for (network, mode), cases in by_network(payload["cases"]).items():
        lines = [f"**{network}, {mode}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for method, case in cases.items():
            ours = ", ".join(f"{name} {count:,}" for name, count in case["nodes_of"].items() if name != "keras")
            compiling = _compiling(case)
            share = f"{case['first'] / cases['sgd']['first']:.2f}" if "sgd" in cases else "-"
            times = [
                f"{seconds:.2f}" for seconds in (case["tracing"], compiling, case["step"], case["first_on_the_clock"])
            ]
            cells = [method, f"{case['first']:.2f}", share, *times, f"{case['nodes']:,}", ours or "-"]
            lines.append(f"| {' | '.join(cells)} |")
        found.append("\n".join(lines))
    return "\n\n".join(found)


def goals(payload):
    """Goals of first steps: name, what is asked, what is measured, whether it is met, where it goes."""
    found = []
    for (network, mode), cases in by_network(payload["cases"]).items():
        for method, most in ((name, most) for (of, name), most in GOALS.items() if of == network):
            if not {"sgd", method} <= set(cases):
                continue
            case, share = cases[method], cases[method]["first"] / cases["sgd"]["first"]
            compiling = _compiling(case)
            why = f"tracing {case['tracing']:.1f} s, compiling {compiling:.1f}, the step {case['step']:.1f}"
            name = f"first step of {method}, {network}, {mode}"
            found.append(
                (name, f"<= {most:.1f}x of SGD's", f"{share:.2f}x", share <= most, "" if share <= most else why)
            )
    return found
