"""What the tests run on eight devices of Keras's JAX backend: virtual ones, in a process of their own."""

import contextlib
import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

DEVICES = 8
FLAGS = (
    f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false"
)

if __name__ == "__main__":
    # Before JAX starts.
    # What travels is looked for in what users compile.
    optimized = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    os.environ.update(KERAS_BACKEND="jax", XLA_FLAGS=FLAGS, TF_CPP_MIN_LOG_LEVEL="3", **optimized)

import keras
import numpy as np
from keras import layers

import keras_ngd
from keras_ngd import sharding
from keras_ngd.analysis import hlo
from tf_tests import paper
from tf_tests.distributed import cases
from tf_tests.small import array, weights

BATCH, STEPS = cases.BATCH, cases.STEPS


def launch(case, folder, timeout=600):
    """What `case()` returns on eight devices."""
    file = Path(folder) / case
    command = [sys.executable, "-m", "tf_tests.distributed.devices", case, str(file)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout
    return pickle.loads(file.read_bytes())


def network(batch_size=None):
    """A convolution and two dense layers; rows of the first two layers' factors are more than devices, not all a multiple."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 6, 2), batch_size=batch_size)
    h = layers.Conv2D(8, 3, activation="tanh", use_bias=False, name="convolution")(inputs)
    h = layers.Dense(16, activation="tanh", name="hidden")(layers.Flatten()(h))
    return keras.Model(inputs, layers.Dense(5, name="logits")(h))


def deep_network():
    """As many layers of one shape as there are devices, and two more."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 6, 2))
    h = layers.Dense(4, activation="tanh")(layers.Flatten()(inputs))
    for _ in range(DEVICES):
        h = layers.Dense(4, activation="tanh")(h)
    return keras.Model(inputs, layers.Dense(5, name="logits")(h))


def _kfac(**arguments):
    return paper.KFAC(0.05, 0.03, factor_interval=2, inverse_interval=4, **arguments)


def _rows(method, **arguments):
    return method(0.05, 0.1, interval=2, batch_size=BATCH, **arguments)


METHODS = {
    "kfac": _kfac,
    "kfac-stagger": lambda **a: _kfac(stagger=True, **a),
    # One program draws the labels of the whole batch.
    "kfac-sampled": lambda **a: _kfac(fisher="sampled", losses_per_example="auto", **a),
    "kfac-eigen": lambda **a: _kfac(inverse="eigen", **a),
    "thor": lambda **a: paper.THOR(
        0.05, 0.03, factor_interval=1, inverse_interval=2, split=8, inverse="newton-schulz", **a
    ),
    "skfac": lambda **a: _rows(paper.SKFAC, **a),
    "sngd": lambda **a: _rows(paper.SNGD, **a),
    "hylo-kid": lambda **a: _rows(paper.HyLo, rank=1.0, mode="kid", **a),
    "hylo-kis": lambda **a: _rows(paper.HyLo, rank=1.0, mode="kis", **a),
    "eigen-adam": lambda **a: keras_ngd.EigenAdam(
        0.01, epsilon=0.1, split=8, factor_interval=2, inverse_interval=4, **a
    ),
    "ekfac-examples": lambda **a: keras_ngd.EKFAC(
        scale="examples", split=8, factor_interval=2, inverse_interval=4, **a
    ),
    "ekfac": lambda **a: keras_ngd.EKFAC(split=8, factor_interval=2, inverse_interval=4, **a),
    "hylo-switch": lambda **a: _rows(paper.HyLo, rank=0.5, steps_per_epoch=7, eta=0.1, **a),
}

# HyLo with all rows is SNGD, by another computation.
SAME = {"hylo-kid": "sngd", "hylo-kis": "sngd"}
SHARED = ["kfac", "kfac-sampled", "eigen-adam", "thor", "skfac", "sngd", "hylo-kid", "hylo-kis"]
SHARDED = [name for name in METHODS if name not in SAME]


def data_parallel():
    """All devices have all weights."""
    return keras.distribution.DataParallel()


def model_parallel():
    """Two parts of each batch, and four of the kernels' outputs; a pattern that variables of ours match, too."""
    mesh = keras.distribution.DeviceMesh((2, 4), ("data", "model"), keras.distribution.list_devices())
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["convolution/kernel"] = (None, None, None, "model")
    layouts["hidden/kernel"] = (None, "model")
    layouts["hidden/bias"] = ("model",)
    layouts[".*(statistics|inverse).*"] = ("model",)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="data")


def prepared(method, make=network, **arguments):
    """A captured and compiled model."""
    model, optimizer = make(), METHODS[method](**arguments)
    keras_ngd.capture(model, optimizer)
    return compiled(model, optimizer)


def compiled(model, optimizer):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    return model


@contextlib.contextmanager
def active(distribution):
    """A `keras.distribution`, or None, inside the context."""
    keras.distribution.set_distribution(distribution)
    try:
        yield
    finally:
        keras.distribution.set_distribution(None)


def fit(model, first=0, last=STEPS):
    """Trains on some of the batches, in order."""
    x, y = (part[BATCH * first : BATCH * last] for part in cases.data())
    return model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)


def different_copies(model):
    """Paths of variables of which some devices have another copy of the same part, or none."""
    found = []
    for variable in [*model.variables, *model.optimizer.variables]:
        shards, parts = variable.value.addressable_shards, {}
        for shard in shards:
            parts.setdefault(str(shard.index), []).append(np.asarray(shard.data).tobytes())
        if len(shards) != DEVICES or any(len(set(copies)) > 1 for copies in parts.values()):
            found.append(variable.path)
    return found


def state_bytes(model):
    """Bytes of statistics and curvatures that are as large as can be cut: of all, and of those on one device."""
    averages = [v for block in model.optimizer.layout.blocks for v in block.statistics.averages]
    curvatures = [v for group in model.optimizer.layout.groups for v in group.curvature.variables]
    found = [v for v in averages + curvatures if len(v.shape) > 2 and max(sharding.shape_of(v)[:-1]) >= DEVICES]
    whole = sum(4 * int(np.prod(sharding.shape_of(v))) for v in found)
    return whole, sum(v.value.addressable_shards[0].data.nbytes for v in found)


def averages(model):
    """Copies of the statistics, whole."""
    blocks = model.optimizer.layout.blocks
    return {f"{b.layer} {i}": array(sharding.gathered(v)) for b in blocks for i, v in enumerate(b.statistics.averages)}


def trained(method, distribution=None, **arguments):
    """What 20 steps leave."""
    with active(distribution):
        model = prepared(method, **arguments)
        history = fit(model).history
    return {
        "weights": weights(model),
        "loss": history["loss"],
        "different": [] if distribution is None else different_copies(model),
        "bytes": state_bytes(model),
        "averages": averages(model),
        "updates": (model.optimizer.factor_updates, model.optimizer.inverse_updates),
    }


def trainings():
    """All methods on one device, on eight, with sharded state, and with sharded kernels."""
    found = {}
    for method in METHODS:
        if method not in SAME:
            found[method, "one"] = trained(method)
            found[method, "sharded"] = trained(method, data_parallel(), shard_state=True)
        if method in SHARED:
            found[method, "eight"] = trained(method, data_parallel())
    found["kfac", "deep, one"] = trained("kfac", make=deep_network)
    found["kfac", "deep, sharded"] = trained("kfac", data_parallel(), make=deep_network, shard_state=True)
    found["kfac", "kernels"] = trained("kfac", model_parallel())
    found["kfac", "kernels and state"] = trained("kfac", model_parallel(), shard_state=True)
    return found


def step(model):
    """The model's compiled training step for a batch."""
    import jax

    distribution = keras.distribution.distribution()
    batch = tuple(part[:BATCH] for part in cases.data())
    model._symbolic_build(data_batch=batch)
    kinds = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
    state = model._get_jax_state(**dict.fromkeys(kinds, True))
    shardings = (None, model._get_state_sharding_spec())
    data = tuple(jax.device_put(part, distribution.get_data_layout(part.shape).backend_layout) for part in batch)
    return jax.jit(model.train_step, donate_argnums=0, out_shardings=shardings).lower(state, data).compile()


def collectives(text):
    """`(kind, elements, conditional)` of each collective in a compiled step: does it run only if some condition holds?"""
    computations, entry = hlo.parse(text)
    always, todo = set(), [entry]
    while todo:
        name = todo.pop()
        if name in computations and name not in always:
            always.add(name)
            todo += [n for i in computations[name] if i.opcode != "conditional" for n in i.called]
    return [
        (kind, sum(math.prod(shape) for _, shape in hlo.shapes(instruction.type)), name not in always)
        for name, instructions in computations.items()
        for instruction in instructions
        if (kind := instruction.opcode.removesuffix("-start")) in hlo.COLLECTIVES
    ]


def steps():
    """Collectives and memory of one device of compiled steps."""
    found = {}
    for method in ("kfac", "sngd"):
        for shard in (False, True):
            with active(data_parallel()):
                executable = step(prepared(method, **({"shard_state": True} if shard else {})))
            memory = executable.memory_analysis()
            found[method, shard] = {
                "collectives": collectives(executable.as_text()),
                "arguments": memory.argument_size_in_bytes,
            }
    with active(data_parallel()):
        found["thor", True] = {"collectives": collectives(step(prepared("thor", shard_state=True)).as_text())}
    found["weights"] = sum(v.size for v in weights(network()).values())
    return found


def error(function, kind=ValueError):
    """The message of the error that a function raises."""
    try:
        function()
    except kind as raised:
        return f"{type(raised).__name__}: {raised}"
    return "no error"


def mistakes():
    """The messages of errors, by what is wrong."""

    def captured(model, optimizer):
        keras_ngd.capture(model, optimizer)
        return compiled(model, optimizer)

    mesh = keras.distribution.DeviceMesh((DEVICES,), ("model",), keras.distribution.list_devices())
    no_batch_axis = keras.distribution.ModelParallel(
        layout_map=keras.distribution.LayoutMap(mesh), batch_dim_name="data"
    )
    early_model, early_optimizer, early = network(), _kfac(), prepared("kfac")
    found = {"no devices": error(lambda: _kfac(shard_state=True))}
    with active(data_parallel()):
        found["model made early"] = error(lambda: captured(early_model, _kfac()))
        found["optimizer made early"] = error(lambda: captured(network(), early_optimizer))
        found["captured early"] = error(lambda: fit(early))
        found["batch size"] = error(lambda: captured(network(batch_size=12), _kfac()))
        found["not a flag"] = error(lambda: _kfac(shard_state=1))
        found["fraction"] = error(lambda: _kfac(shard_state=True, gradient_worker_fraction=0.5))
        late = network()
        model = prepared("kfac")
        x, y = cases.data(60)
        found["last batch"] = error(lambda: model.fit(x, y, batch_size=BATCH, verbose=0, shuffle=False))
        found["steps before it"] = int(model.optimizer.iterations)
    found["distribution gone"] = error(lambda: captured(late, _kfac()))
    with active(no_batch_axis):
        found["no batch axis"] = error(lambda: captured(network(), _kfac()))
    return found


def half(distribution, file, **arguments):
    """Ten steps, and a file of what they leave."""
    with active(distribution):
        model = prepared("kfac", **arguments)
        fit(model, last=STEPS // 2)
        model.save(file)


def rest(distribution, file, optimizer=None):
    """Ten more steps on what is in a file: the weights, bytes of the state, and warnings."""
    with active(distribution), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = keras.models.load_model(file, compile=optimizer is None)
        if optimizer is not None:
            optimizer = optimizer()
            keras_ngd.capture(model, optimizer)
            compiled(model, optimizer).load_weights(file)
        fit(model, STEPS // 2, STEPS)
        return {
            "weights": weights(model),
            "bytes": state_bytes(model),
            "step": int(model.optimizer.iterations),
            "warnings": [str(w.message) for w in said],
            "averages": averages(model),
        }


def resumes():
    """Ten steps here and ten there."""
    folder = Path(sys.argv[2]).parent
    one, eight = folder / "one.keras", folder / "eight.keras"
    half(None, one)
    half(data_parallel(), eight, shard_state=True)
    return {
        "eight": rest(data_parallel(), eight),
        "eight, then one": rest(None, eight),
        "one, then eight": rest(data_parallel(), one, lambda: _kfac(shard_state=True)),
    }


def everything():
    """All of them, in one process."""
    cases_of = {"trainings": trainings, "steps": steps, "mistakes": mistakes, "resumes": resumes}
    return {name: case() for name, case in cases_of.items()}


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(pickle.dumps(globals()[sys.argv[1]]()))
