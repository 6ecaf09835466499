"""What the tests run under a strategy of `tf.distribute`."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_ngd
from tf_tests import paper
from tf_tests.distributed import cases
from tf_tests.small import array, regression, relative_distance, weights


def prepared(strategy, method):
    """A captured and compiled model, in the strategy's scope; batches are the whole ones."""
    with strategy.scope():
        return cases.prepared(method)


def dataset(*arrays, batch=cases.BATCH):
    """Global batches, in order."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return tf.data.Dataset.from_tensor_slices(arrays).batch(batch).with_options(options)


def fit(model, x, y, batch=cases.BATCH, **arguments):
    """Trains on whole batches, in order."""
    return model.fit(dataset(x, y, batch=batch), verbose=0, **arguments)


def same_bits(strategy, model):
    """Whether the copies of weights and of the optimizer's state are the same on all replicas of this process."""
    own = [] if isinstance(model.optimizer, (keras_ngd.KFAC, keras_ngd.EKFAC, keras_ngd.EigenAdam)) else None
    found = []
    for variable in model.trainable_variables + model.optimizer.variables:
        statistics = hasattr(variable, "keras_ngd_statistics")
        # What a replica sees of its own examples differs, and so do row methods' rows.
        if statistics and (own is None or variable.name == "tally"):
            continue
        first, *others = [v.numpy() for v in strategy.experimental_local_results(variable.value)]
        found += [np.array_equal(first, other) for other in others]
    return all(found)


def methods(strategy, names):
    """Of each method: weights and a digest after 20 steps, and whether replicas have the same bits."""
    found = {}
    for name in names:
        model = prepared(strategy, name)
        fit(model, *cases.data())
        found[name] = {"weights": weights(model), "same": same_bits(strategy, model), "jit": model.jit_compile}
    return found


def drawn(strategy, names, parts):
    """Of each method: weights after 5 steps where replicas draw as one device would; with their own draws, if bits are equal."""
    found = {}
    for name in names:
        with cases.same_noise():
            model = prepared(strategy, name)
            # Each replica's first examples are among the first of all.
            x, y = (a.reshape(-1, cases.BATCH // parts, parts, *a.shape[1:]) for a in cases.data(5 * cases.BATCH))
            fit(model, *(np.swapaxes(a, 1, 2).reshape(-1, *a.shape[3:]) for a in (x, y)))
        own = prepared(strategy, name)
        fit(own, *cases.data(5 * cases.BATCH))
        found[name] = {"weights": weights(model), "same": same_bits(strategy, own)}
    return found


def weighted(strategy, names):
    """Of each method: weights after 5 steps with weights of examples, and the ratio that these make."""
    found = {}
    for name in names:
        x, y, given = cases.weighted_data()
        model = prepared(strategy, name)
        model.fit(dataset(x, y, given), verbose=0)
        found[name] = {"weights": weights(model), "ratio": model.optimizer.loss_ratio}
    return found


def obligations(strategy):
    """Of each method of `tf_tests.test_obligations`: weights after 5 steps, and whether replicas have the same bits."""
    from tf_tests import test_obligations

    found = {}
    for method in test_obligations.METHODS:
        with strategy.scope():
            model = test_obligations.with_all_rows(method)
        fit(model, *regression(5 * test_obligations.BATCH), batch=test_obligations.BATCH)
        found[method.kind.__name__] = {"weights": weights(model), "same": same_bits(strategy, model)}
    return found


def traced_as_one(strategy, names):
    """The same as `methods`, by what is for TPUs: no replica knows its number while it is traced. The sum alone is the CPU's."""

    from keras_ngd.distributed import strategies

    class OnParts(strategies.TPUReplicas):
        def _sum(self, vector, name):
            return strategies.Replicas._sum(self, vector, name)

    make, strategies.make = strategies.make, OnParts
    try:
        return methods(strategy, names)
    finally:
        strategies.make = make


def uneven(strategy, names):
    """Batches that replicas cannot share equally: the last has five examples, and one alone; against one device's weights."""
    found = {}
    for name in names:
        for examples in (cases.BATCH * 3 + 5, cases.BATCH * 3 + 1):
            x, y = cases.data(examples)
            model = prepared(strategy, name)
            history = fit(model, x, y, epochs=2).history
            alone = cases.prepared(name)
            alone.fit(x, y, batch_size=cases.BATCH, epochs=2, shuffle=False, verbose=0)
            found[name, examples % cases.BATCH] = {
                "distance": relative_distance(weights(model), weights(alone)),
                "same": same_bits(strategy, model),
                "skipped": (model.optimizer.skipped_statistics, model.optimizer.skipped_steps),
                "accuracy": history["accuracy"],
            }
    return found


def settings(strategy):
    """With Keras's own settings: the distance to one device's weights."""
    found = {}
    for name, arguments in {
        "weight decay": {"weight_decay": 0.01, "nesterov": True},
        "clipping": {"global_clipnorm": 0.05},
        "loss scale": {"loss_scale_factor": 64.0},
        "averages": {"use_ema": True, "ema_momentum": 0.5},
        "schedule": {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.05, 5, 0.5)},
    }.items():
        x, y = cases.data(cases.BATCH * 6)
        x = (x[:, 0, :, 0] > 0).astype("int32")
        trained = []
        for scope in (strategy.scope(), None):
            model = _trainable(scope, arguments)
            if scope:
                fit(model, x, y)
            else:
                model.fit(x, y, batch_size=cases.BATCH, shuffle=False, verbose=0)
            trained.append(weights(model))
        found[name] = relative_distance(*trained)
    return found


def _trainable(scope, arguments):
    """A network with a layer whose gradient is sparse, where Keras scales that, and clips it by what it sums up to."""
    import contextlib

    with scope or contextlib.nullcontext():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6,), dtype="int32")
        if {"loss_scale_factor", "global_clipnorm"} & set(arguments):
            h = layers.Rescaling(0.5)(inputs)
        else:
            h = layers.Flatten()(layers.Embedding(2, 3, name="embedding")(inputs))
        h = layers.Dense(4, activation="tanh", name="first")(h)
        model = keras.Model(inputs, layers.Dense(4, name="logits")(h))
        optimizer = paper.KFAC(**{"learning_rate": 0.05, "factor_interval": 1, "inverse_interval": 2, **arguments})
        keras_ngd.capture(model, optimizer)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=optimizer, loss=loss, auto_scale_loss=True)
    return model


def resumed(strategy, names, path):
    """Trains, saves, and goes on from the file on the replicas and on one device: the two's distance to an undisturbed one."""
    x, y = cases.data(cases.BATCH * 8)
    found = {}
    for name in names:
        model = prepared(strategy, name)
        fit(model, x, y)
        model.save(f"{path}/{name}.keras")
        with strategy.scope():
            again = keras.models.load_model(f"{path}/{name}.keras")
        one = keras.models.load_model(f"{path}/{name}.keras")
        for other in (model, again):
            fit(other, x, y)
        cases.fit(one, x, y)
        expected = weights(model)
        found[name] = {
            "replicas": relative_distance(weights(again), expected),
            "one": relative_distance(weights(one), expected),
            "steps": [int(array(m.optimizer.iterations)) for m in (model, again, one)],
            "same": same_bits(strategy, again),
        }
    return found


def samples(strategy):
    """The numbers that each replica draws for its rows at one update."""
    model = prepared(strategy, "hylo-random")
    fit(model, *cases.data(cases.BATCH))
    return [
        [array(v) for v in strategy.experimental_local_results(block.statistics.averages[0].value)]
        for block in model.optimizer.layout.blocks
    ]


def refused(strategy, kinds):
    """The messages of the errors for what cannot be trained."""
    found = {}
    for kind in kinds:
        try:
            _refuse(strategy, kind)
            found[kind] = "no error"
        except ValueError as error:
            found[kind] = str(error)
    return found


def _refuse(strategy, kind):
    outside = paper.KFAC(0.05)
    with strategy.scope():
        model = cases.network()
        arguments = {
            "fraction": {"gradient_worker_fraction": 0.5},
            "communicator": {"communicator": "horovod"},
        }.get(kind, {})
        inside = paper.KFAC(0.05, **arguments)
    if kind == "optimizer outside":
        keras_ngd.capture(model, outside)
    if kind == "model outside":
        keras_ngd.capture(cases.network(), inside)
    keras_ngd.capture(model, inside)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=inside, loss=loss)
    fit(model, *cases.data(cases.BATCH))
