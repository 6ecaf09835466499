"""ResNet-18 on 32x32 images by Momentum, KFAC and THOR: the CIFAR-10 experiment of the THOR paper.

    python examples/cifar_resnet.py                                             # offline, small: a few minutes on two cores
    python examples/cifar_resnet.py --dataset=cifar10 --width=64 --epochs=90    # the paper's, which downloads CIFAR-10

All methods share the paper's settings: batches of 128, learning rate 0.1 and damping 0.3, both falling tenfold after each
third of the epochs (eq. 13), weight decay 0.0005; blocks of 72 for THOR, with intervals that grow, and 20 steps for
KFAC.
"""

import datasets  # isort: skip  (first: it imports TensorFlow without its greetings)
import keras
import networks
import numpy as np
import training
from absl import app, flags

import keras_ngd

OMEGAS = {"thor": (0.01, 0.0), "thor_stop": (0.01, 0.001), "thor_nt": (0.0, 0.0)}
METHODS = ("momentum", "kfac", *OMEGAS)

FLAGS = flags.FLAGS
flags.DEFINE_multi_enum("method", ["momentum", "kfac", "thor"], METHODS, "Methods to train with; repeat for several.")
flags.DEFINE_string("dataset", "shapes32", "An embedded set (shapes32) or one of tensorflow-datasets, such as cifar10.")
flags.DEFINE_integer("classes", 10, "Classes of the data.", lower_bound=2)
flags.DEFINE_string("data_dir", None, "Where tensorflow-datasets keeps prepared data. Default: its own choice.")
flags.DEFINE_integer("width", 16, "Channels of the first stage; the paper's network has 64.", lower_bound=1)
flags.DEFINE_integer("epochs", 9, "Epochs; the paper's have 90.", lower_bound=1)
flags.DEFINE_integer("batch_size", 128, "Examples a step.", lower_bound=1)
flags.DEFINE_integer("split", 72, "Size of THOR's blocks.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.1, "Learning rate of all methods.")
flags.DEFINE_float("damping", 0.3, "Damping of KFAC and THOR.")
flags.DEFINE_integer("kfac_interval", 20, "Steps between KFAC's updates.", lower_bound=1)
flags.DEFINE_integer("first_interval", 10, "THOR's first interval; it grows by half at each update.", lower_bound=1)
flags.DEFINE_integer("last_interval", 200, "THOR's longest interval.", lower_bound=1)
flags.DEFINE_integer("seed", 1, "Seed of weights and of the order of examples.")
flags.DEFINE_boolean("augment", True, "Random shifts and reflections of the training images.")
flags.DEFINE_boolean("jit", False, "Compile steps with XLA; JAX always does. Slow to start on TensorFlow.")
flags.DEFINE_string("output", "cifar_resnet.png", "The plot's file; empty for none.")
flags.DEFINE_string("history", None, "A JSON file for all epochs' figures. Default: none.")


def make_optimizer(method, steps_per_epoch):
    """The paper's optimizer of this name; see the flags."""
    decay = keras.optimizers.schedules.ExponentialDecay
    third = max(round(FLAGS.epochs * steps_per_epoch / 3), 1)
    learning_rate = decay(FLAGS.learning_rate, third, 0.1, staircase=True)
    if method == "momentum":
        return keras.optimizers.SGD(learning_rate, momentum=0.9, weight_decay=5e-4)
    shared = {
        **keras_ngd.PAPER_SETTINGS,
        "learning_rate": learning_rate,
        "damping": decay(FLAGS.damping, third, 0.1, staircase=True),
        "damping_mode": "factor",
        "weight_decay": 5e-4,
    }
    if method == "kfac":
        return keras_ngd.KFAC(factor_interval=FLAGS.kfac_interval, inverse_interval=FLAGS.kfac_interval, **shared)
    interval = keras_ngd.schedules.GrowingInterval(FLAGS.first_interval, 1.5, FLAGS.last_interval)
    return keras_ngd.THOR(
        factor_interval=interval, inverse_interval=interval, split=FLAGS.split, omega=OMEGAS[method], **shared
    )


def load(split):
    """Batches of a split, scaled to about -2 to 2."""
    import tensorflow as tf

    examples = datasets.load(FLAGS.dataset, split, FLAGS.data_dir).cache()
    if split == "train":
        examples = examples.shuffle(min(len(examples), 50_000), seed=FLAGS.seed)
        if FLAGS.augment:
            examples = examples.map(lambda x, y: (datasets.augmented(x), y), tf.data.AUTOTUNE)
    batches = examples.batch(FLAGS.batch_size, drop_remainder=split == "train")
    return batches.map(lambda x, y: ((tf.cast(x, "float32") - 127.5) / 64, y), tf.data.AUTOTUNE).prefetch(2)


def train(method, train_data, test_data):
    """One method's history, with `seconds` of training and what its first step took."""
    keras.utils.set_random_seed(FLAGS.seed)
    model = networks.resnet18(32, FLAGS.classes, FLAGS.width)
    optimizer, clock = make_optimizer(method, len(train_data)), training.Clock()
    callbacks = [clock]
    if method != "momentum":
        report = keras_ngd.capture(model, optimizer)
        print(
            f"\n{method}: {len(report.captured)} layers captured, {report.bytes / 2**20:.1f} MiB of second-order state"
        )
    if method in OMEGAS:
        callbacks.insert(0, keras_ngd.callbacks.CurvatureMonitor(condition=False))
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=FLAGS.jit or keras.backend.backend() == "jax",
    )
    history = model.fit(
        train_data, validation_data=test_data, epochs=FLAGS.epochs, callbacks=callbacks, verbose=2
    ).history
    return {**history, "seconds": np.array(clock.seconds), "first": clock.first}


def main(_):
    train_data, test_data = load("train"), load("test")
    results = {method: train(method, train_data, test_data) for method in FLAGS.method}
    training.print_table(results)
    if FLAGS.history:
        training.save_history(results, FLAGS.history)
    if FLAGS.output:
        training.plot(results, f"ResNet-18 (width {FLAGS.width}) on {FLAGS.dataset}", FLAGS.output)


if __name__ == "__main__":
    app.run(main)
