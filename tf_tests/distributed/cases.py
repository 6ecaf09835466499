"""What the tests run in each of several processes."""

import contextlib
import hashlib
import os

import keras
import numpy as np
from keras import layers

import keras_ngd
from keras_ngd.fisher import cotangents
from tf_tests import paper
from tf_tests.small import array, relative_distance, weights

BATCH, STEPS = 24, 20


def data(examples=BATCH * STEPS):
    """A small classification problem: `(x, y)`, in batches of which any sub-batch is a fair sample."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 6, 6, 2)).astype("float32")
    return x, (2 * (x[:, 0, :, 0].sum(axis=1) > 0) + (x[:, 1, :, 1].sum(axis=1) > 0)).astype("int32")


def weighted_data():
    """The first five batches, and a weight for each example."""
    x, y = data(5 * BATCH)
    return x, y, np.random.default_rng(1).uniform(0.5, 50.0, len(x)).astype("float32")


def network():
    """A convolution without bias, a wide layer, two narrow ones of one shape, and a layer that is not captured."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 6, 2))
    h = layers.Conv2D(4, 3, activation="tanh", use_bias=False, name="convolution")(inputs)
    h = layers.LayerNormalization()(layers.Flatten()(h))
    for name in ("first", "second"):
        h = layers.Dense(4, activation="tanh", name=name)(h)
    return keras.Model(inputs, layers.Dense(4, name="logits")(h))


def tokens():
    """A table, whose gradient is sparse, attention, and a normalisation layer that is captured."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 6, 2))
    numbers = layers.Reshape((72,))(inputs)[:, :8]
    h = layers.Embedding(4, 4, name="table")(keras.ops.cast(keras.ops.clip(numbers + 2, 0, 3), "int32"))
    h = h + layers.MultiHeadAttention(2, 2, name="attention")(h, h)
    h = layers.Flatten()(layers.LayerNormalization(name="norm")(h))
    return keras.Model(inputs, layers.Dense(4, name="logits")(h))


def _kfac(size, **arguments):
    return paper.KFAC(0.05, 0.03, **{"factor_interval": 2, "inverse_interval": 4, **arguments})


def _thor(size, **arguments):
    return paper.THOR(0.05, 0.03, factor_interval=1, inverse_interval=2, split=4, omega=(0.02, 0.005), **arguments)


def _shortened(size):
    return keras_ngd.distributed.Horovod(wire_dtype="bfloat16") if size > 1 else "local"


def _rows(method, size, **arguments):
    return method(0.05, 0.1, **{"interval": 2, "batch_size": BATCH // size, **arguments})


# Functions of the number of workers. What equals one worker's training with all examples:
METHODS = {
    "kfac": _kfac,
    "kfac-eigen": lambda size: _kfac(size, factor_interval=1, inverse_interval=5, inverse="eigen"),
    "kfac-mem-opt": lambda size: _kfac(size, gradient_worker_fraction=0),
    "sp-ngd": lambda size: _kfac(size, gradient_worker_fraction=0, reduce_scatter=True),
    # At its default damping, whose unit is the mean over all layers' statistics, of which each worker has its own.
    "sp-ngd-defaults": lambda size: keras_ngd.KFAC(
        factor_interval=2, inverse_interval=4, inverse="eigen", gradient_worker_fraction=0, reduce_scatter=True
    ),
    "kfac-half": lambda size: _kfac(size, gradient_worker_fraction=0.5),
    # Refreshes of a share of the layers at a time, of which each worker has a part.
    "kfac-stagger": lambda size: _kfac(size, inverse_interval=5, stagger=True),
    "sp-ngd-stagger": lambda size: keras_ngd.KFAC(
        inverse="eigen", gradient_worker_fraction=0, reduce_scatter=True, **STAGGER
    ),
    "thor-stagger": lambda size: _thor(size, stagger=True),
    "thor": _thor,
    "thor-half": lambda size: _thor(size, gradient_worker_fraction=0.5),
    "skfac": lambda size: _rows(paper.SKFAC, size),
    "sngd": lambda size: _rows(paper.SNGD, size),
    "hylo-kid": lambda size: _rows(paper.HyLo, size, rank=1.0, mode="kid"),
    "hylo-kis": lambda size: _rows(paper.HyLo, size, rank=1.0, mode="kis"),
    "ekfac": lambda size: keras_ngd.EKFAC(split=4, factor_interval=2, inverse_interval=4),
    "ekfac-examples": lambda size: keras_ngd.EKFAC(scale="examples", split=4, factor_interval=2, inverse_interval=4),
    # An epsilon that is far above what rounding makes of directions without gradients.
    "eigen-adam": lambda size: keras_ngd.EigenAdam(0.01, epsilon=0.1, split=4, factor_interval=2, inverse_interval=4),
    # Of blocks of every structure: see `tokens`.
    "tokens-eigen-adam": lambda size: keras_ngd.EigenAdam(0.1, epsilon=1.0, factor_interval=1, inverse_interval=3),
    "tokens-sp-ngd": lambda size: _kfac(size, gradient_worker_fraction=0, reduce_scatter=True),
    "tokens-thor": lambda size: _thor(size, gradient_worker_fraction=0.5),
    # A damping in float32's reach of the kernel matrices' largest eigenvalues, some thousands.
    "tokens-sngd": lambda size: paper.SNGD(0.05, 10.0, interval=2, batch_size=BATCH // size),
}
STAGGER = {"factor_interval": 1, "inverse_interval": 3, "interval_growth": None, "stagger": True}
DRAWN = {"fisher": "sampled", "losses_per_example": "auto"}

# And what does not, since each worker compresses or samples its own batch, or is not tried here:
COMPRESSING = {
    "hylo-switch": lambda size: _rows(paper.HyLo, size, rank=0.5, steps_per_epoch=7, eta=0.1),
    "hylo-random": lambda size: _rows(paper.HyLo, size, rank=0.5, mode="random", steps_per_epoch=10),
    # The scale of the loss read from what was compiled.
    "kfac-auto": lambda size: _kfac(size, losses_per_example="auto"),
    "sngd-auto": lambda size: _rows(paper.SNGD, size, losses_per_example="auto"),
    # Room for all examples, of which each worker has a part.
    "sngd-roomy": lambda size: _rows(paper.SNGD, 1),
    "kfac-bfloat16": lambda size: _kfac(size, communicator=_shortened(size)),
    "sp-ngd-bfloat16": lambda size: _kfac(
        size, gradient_worker_fraction=0, reduce_scatter=True, communicator=_shortened(size)
    ),
    # Without captured layers. A gradient of fewer columns than rows leaves bases to rounding, in which it has no entries.
    "tokens-soap": lambda size: keras_ngd.EigenAdam(0.1, epsilon=1.0, basis="gradient", inverse_interval=3),
    # Bases that are seldom renewed, of eigenvalues that are nearly the same, are rounding's.
    "tokens-eigen-adam-stagger": lambda size: keras_ngd.EigenAdam(0.1, epsilon=1.0, **STAGGER),
    # Each worker draws labels of its own.
    "kfac-drawn": lambda size: _kfac(size, **DRAWN),
    "sp-ngd-drawn": lambda size: _kfac(size, gradient_worker_fraction=0, reduce_scatter=True, **DRAWN),
    "thor-drawn": lambda size: _thor(size, **DRAWN),
    "sngd-drawn": lambda size: _rows(paper.SNGD, size, **DRAWN),
    "skfac-subsample": lambda size: _rows(paper.SKFAC, size, convolution="subsample", history=2),
}


def prepared(method, size=1):
    """A captured and compiled model."""
    model = tokens() if method.startswith("tokens") else network()
    optimizer = {**METHODS, **COMPRESSING}[method](size)
    if method != "tokens-soap":
        keras_ngd.capture(model, optimizer, include=lambda layer: method.startswith("tokens"))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    return model


def part(x, rank, size):
    """This worker's share of each batch of `BATCH`."""
    return x.reshape(-1, BATCH, *x.shape[1:])[:, rank::size].reshape(-1, *x.shape[1:])


def digest(model):
    """A number that differs where any bit of a weight, a statistic or the optimizer's state does."""
    model.optimizer.gather_statistics()
    # Row methods' own rows are each worker's own, as are the numbers that workers draw labels with.
    mean = isinstance(model.optimizer, (keras_ngd.KFAC, keras_ngd.EKFAC, keras_ngd.EigenAdam))
    own = ("tally", "label_draw")
    variables = [
        v for v in model.trainable_variables if not hasattr(v, "keras_ngd_statistics") or (mean and v.name not in own)
    ]
    variables += model.optimizer.variables
    return hashlib.sha256(b"".join(array(v).tobytes() for v in variables)).hexdigest()


def fit(model, x, y, rank=0, size=1, **arguments):
    """Trains on this worker's share, in order."""
    batch = BATCH // size
    return model.fit(part(x, rank, size), part(y, rank, size), batch_size=batch, shuffle=False, verbose=0, **arguments)


def several(cases):
    """The results of more than one case, by name, in the same processes: starting them takes longer than most cases."""
    return {name: globals()[name](**arguments) for name, arguments in cases.items()}


def methods(names, steps=200):
    """Of each method: the weights after 20 steps, digests after 20 and after more, and the bytes received."""
    import horovod.tensorflow as hvd

    rank, size = hvd.rank(), hvd.size()
    x, y = data()
    found = {}
    for name in names:
        model = prepared(name, size)
        fit(model, x, y, rank, size)
        found[name] = {"weights": weights(model), "digests": [digest(model)]}
        found[name]["received"] = model.optimizer.received_bytes()
        found[name]["updates"] = (model.optimizer.factor_updates, model.optimizer.inverse_updates)
        fit(model, x, y, rank, size, epochs=steps // STEPS - 1)
        found[name]["digests"].append(digest(model))
        found[name]["finite"] = bool(all(np.isfinite(v).all() for v in weights(model).values()))
    return found


@contextlib.contextmanager
def same_noise():
    """A context in which all examples' labels are drawn with the same noise, by whichever worker."""
    noise = cotangents.noise
    cotangents.noise = lambda shape, draw, loss: keras.ops.broadcast_to([0.3, 0.6, 0.2, 0.5], shape)
    try:
        yield
    finally:
        cotangents.noise = noise


def drawn(names):
    """Of each method: the weights after 20 steps, where all workers draw the labels that one with all examples would."""
    import horovod.tensorflow as hvd

    found = {}
    for name in names:
        with same_noise():
            model = prepared(name, hvd.size())
            fit(model, *data(), hvd.rank(), hvd.size())
        found[name] = weights(model)
    return found


def tensors(rank):
    """What worker `rank` gives to each collective."""
    import ml_dtypes

    rng = np.random.default_rng(rank)
    return {
        "float32": rng.normal(size=(3, 4)).astype("float32"),
        "float64": rng.normal(size=6),
        "int32": rng.integers(0, 9, size=(2, 3), dtype="int32"),
        "bfloat16": rng.normal(size=(4,)).astype(ml_dtypes.bfloat16),
        "ragged": rng.normal(size=(2 * rank, 3)).astype("float32"),
        "layers": [rng.normal(size=shape).astype("float32") for shape in ((2, 3), (5,), (1, 1, 4), (3, 3))],
    }


def first_come(file):
    """0 where the file is not there, which it is from then on; else 1."""
    there = os.path.exists(file)
    open(file, "w").close()
    return int(there)


def collectives(owners, file):
    """The results of all collectives on `tensors(rank)`, at once and inside a condition of a graph."""
    import tensorflow as tf

    from keras_ngd.distributed import Horovod, in_turn, shard

    def exchanged(communicator):
        mine = tensors(communicator.rank)
        kinds = ("float32", "float64", "int32", "bfloat16")
        reduced = communicator.all_reduce([mine[kind] for kind in kinds], "gradients", "reduce")
        [gathered] = communicator.all_gather([mine["ragged"]], "rows", "gather")
        scattered = communicator.reduce_scatter(mine["layers"], owners, "statistics", "scatter")
        return {
            "all_reduce": dict(zip(kinds, reduced, strict=True)),
            "all_gather": gathered,
            "reduce_scatter": scattered,
            "broadcast": communicator.broadcast(mine["layers"], 1, "inverses", "broadcast"),
        }

    def shortened(communicator):
        mine = tensors(communicator.rank)
        communicator.reduce_scatter(mine["layers"], owners, "statistics", "scatter")
        return {"broadcast": communicator.broadcast(mine["layers"], 1, "inverses", "broadcast")}

    def numbers(found):
        return tf.nest.map_structure(lambda t: None if t is None else np.array(t), found)

    def inside_a_graph(communicator, like):
        flat = tf.nest.flatten(like)
        kept = [i for i, value in enumerate(flat) if value is not None]

        @tf.function(autograph=False)
        def compiled(due):
            def exchange():
                tensors = tf.nest.flatten(exchanged(communicator))
                return [tensors[i] for i in kept]

            return tf.cond(due, exchange, lambda: [tf.zeros(flat[i].shape, flat[i].dtype) for i in kept])

        compiled(tf.constant(False))
        for i, value in zip(kept, compiled(tf.constant(True)), strict=True):
            flat[i] = np.array(value)
        return tf.nest.pack_sequence_as(like, flat)

    communicator = Horovod()
    found = {"eager": numbers(exchanged(communicator))}
    received = {"eager": communicator.received_bytes()}
    communicator = Horovod()
    found["graph"] = inside_a_graph(communicator, found["eager"])
    received["graph"] = communicator.received_bytes()
    for dtype in ("bfloat16", "float16"):
        communicator = Horovod(wire_dtype=dtype)
        found[dtype] = numbers(shortened(communicator))
        received[dtype] = communicator.received_bytes()
    for where, sizes in received.items():
        found[where]["bytes"] = sizes
    communicator = Horovod()
    found["gathered"] = communicator.gather_objects({"rank": communicator.rank})
    found["of worker 0"] = communicator.broadcast_object(f"from {communicator.rank}")
    found["in turn"] = in_turn(lambda: first_come(file))
    found["shard"] = [int(i) for i in shard(tf.data.Dataset.range(11))]
    return found


def uneven(methods, sizes):
    """Of each method what it leaves where workers' batches differ in size, and where one's has a NaN."""
    return {name: unequal(name, sizes) for name in methods} | {"nan": unequal("kfac-eigen", (4, 4), bad=1)}


def unequal(method, sizes, bad=None):
    """Trains on batches of which each worker has its own size; worker `bad` has a NaN in its second batch."""
    import horovod.tensorflow as hvd

    rank, steps = hvd.rank(), 6
    x, y = data(sum(sizes) * steps)
    first = np.cumsum([0, *sizes])
    mine = np.arange(len(x)).reshape(steps, sum(sizes))[:, first[rank] : first[rank + 1]].ravel()
    x = x.copy()
    if rank == bad:
        x[mine[sizes[rank]]] = np.nan
    model = prepared(method)
    model.fit(x[mine], y[mine], batch_size=sizes[rank], shuffle=False, verbose=0)
    optimizer = model.optimizer
    counters = (optimizer.skipped_statistics, optimizer.skipped_steps, optimizer.factor_updates)
    return {"weights": weights(model), "digest": digest(model), "counters": counters}


def all_shares(methods):
    """`shares` of each method."""
    return {name: shares(name) for name in methods}


def shares(method):
    """Which matrices this worker inverts, how large its optimizer's state is, and the bytes it received."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    from keras_ngd.curvature import kronecker

    inverted = {}
    invert = kronecker.damped_inverses

    def counting(work, method):
        for factors, *_ in work:
            size = factors.shape[-1]
            if size not in inverted:
                with tf.init_scope():
                    inverted[size] = tf.Variable(0)
            inverted[size].assign_add(factors.shape[0])
        return invert(work, method)

    kronecker.damped_inverses = counting
    try:
        model = prepared(method, hvd.size())
        fit(model, *data(), hvd.rank(), hvd.size())
    finally:
        kronecker.damped_inverses = invert
    return {
        "inverted": {size: int(count) for size, count in inverted.items()},
        "held": sum(
            array(v).nbytes for group in model.optimizer.local_layout.groups for v in group.curvature.variables
        ),
        "received": model.optimizer.received_bytes(),
        "updates": (model.optimizer.factor_updates, model.optimizer.inverse_updates),
        "shapes": [block.shape[:2] for block in model.optimizer.layout.blocks],
        "plain": sum(
            int(np.prod(v.shape)) for v in model.trainable_variables if not hasattr(v, "keras_ngd_statistics")
        ),
    }


def disagreements(kinds):
    """The messages of the errors that a worker gets when worker 1 trains something else."""
    return {what: disagreement(what) for what in kinds}


def disagreement(what):
    """One of them."""
    import horovod.tensorflow as hvd

    other = hvd.rank() == 1
    keras.utils.set_random_seed(1)
    inputs = keras.Input((6, 6, 2))
    h = layers.Dense(9 if what == "model" and other else 8, name="hidden")(layers.Flatten()(inputs))
    model = keras.Model(inputs, layers.Dense(4, name="logits")(h))
    method = keras_ngd.THOR if what == "optimizer" and other else keras_ngd.KFAC
    fraction = 0.3 if what == "fraction" else 1.0
    optimizer = method(0.1 if what == "argument" and other else 0.05, gradient_worker_fraction=fraction)
    if not (what == "nothing captured" and other):
        keras_ngd.capture(model, optimizer, skip="hidden" if what == "captured" and other else None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    x, y = data(48)
    callbacks = []
    if what == "steps":
        callbacks.append(keras_ngd.callbacks.BroadcastInitialState())
        x, y = (x[:24], y[:24]) if other else (x, y)
    try:
        model.fit(x, y, batch_size=12, verbose=0, callbacks=callbacks)
    except ValueError as error:
        return str(error)
    return "no error"


def resumed(methods, steps, save=None, load=None):
    """Of each method: weights and step after going on from what is in the folder `load`, and saving to `save`."""
    import horovod.tensorflow as hvd

    rank, size = hvd.rank(), hvd.size()
    x, y = data(BATCH * steps)
    found = {}
    for method in methods:
        # Worker 0 alone has the file.
        model = keras.models.load_model(f"{load}/{method}.keras") if load and rank == 0 else prepared(method, size)
        callbacks = [keras_ngd.callbacks.BroadcastInitialState()]
        if save is not None:
            callbacks.append(keras_ngd.callbacks.GatherStatistics())
        if save is not None and rank == 0:
            callbacks.append(keras.callbacks.ModelCheckpoint(f"{save}/{method}.keras"))
        fit(model, x, y, rank, size, callbacks=callbacks)
        found[method] = {
            "weights": weights(model),
            "digest": digest(model),
            "step": int(model.optimizer.iterations),
            "jit": model.jit_compile,
        }
    return found


def glue():
    """What the callbacks do to weights that differ and to metrics."""
    import horovod.tensorflow as hvd

    rank = hvd.rank()
    keras.utils.set_random_seed(rank)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.BatchNormalization(), layers.Dropout(0.5)])
    keras_ngd.capture(model, optimizer := paper.KFAC(0.05))
    model.compile(optimizer=optimizer, loss="mse", metrics=["mae"])
    model.layers[1].moving_mean.assign([float(rank), 1.0])
    started = {}

    class AtStart(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            started.update(weights(self.model))

    rng = np.random.default_rng(rank)
    x, y = rng.normal(size=(8, 3)).astype("float32"), rng.normal(size=(8, 2)).astype("float32")
    own = model.evaluate(x, y, verbose=0, return_dict=True)
    callbacks = [keras_ngd.callbacks.BroadcastInitialState(), AtStart(), keras_ngd.callbacks.MetricAverage()]
    history = model.fit(x, y, batch_size=4, verbose=0, callbacks=callbacks, validation_data=(x, y)).history
    averaged = {"a": float(rank), "b": 2.0 * rank}
    keras_ngd.callbacks.MetricAverage().on_epoch_end(0, averaged)
    return {"start": started, "history": history, "averaged": averaged, "own": own}


def ungathered(path):
    """The messages of the errors where what others have would be lost: in saving, and in starting once more."""
    import horovod.tensorflow as hvd

    rank, size, found = hvd.rank(), hvd.size(), {}
    model = prepared("sp-ngd", size)
    fit(model, *data(), rank, size)
    losing = {
        "model": lambda: model.save(f"{path}/{rank}.keras"),
        "weights": lambda: model.save_weights(f"{path}/{rank}.weights.h5"),
        "start": lambda: fit(model, *data(), rank, size, callbacks=[keras_ngd.callbacks.BroadcastInitialState()]),
    }
    for what, lose in losing.items():
        try:
            lose()
            found[what] = "no error"
        except ValueError as error:
            found[what] = str(error)
    before = weights(model)
    fit(model, *data(), rank, size, callbacks=[keras_ngd.callbacks.GatherStatistics(save_freq=7)])
    model.save(f"{path}/{rank}.keras")
    averages = [array(v) for block in model.optimizer.layout.blocks for v in block.statistics.averages]
    return found | {"averages": averages, "went on": relative_distance(weights(model), before) > 0}


def killed(path, method="kfac"):
    """Trains for ever; worker 1 dies in the second epoch."""
    import signal

    import horovod.tensorflow as hvd

    rank, size = hvd.rank(), hvd.size()

    class Die(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if rank == 1 and int(self.model.optimizer.iterations) == STEPS + 5:
                os.kill(os.getpid(), signal.SIGKILL)

    callbacks = [Die(), *([keras.callbacks.ModelCheckpoint(path)] if rank == 0 else [])]
    fit(prepared(method, size), *data(), rank, size, epochs=10_000, callbacks=callbacks)
