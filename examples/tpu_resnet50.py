"""ResNet-50 on whatever devices there are: a TPU, several GPUs, or one device. One program, through tf.distribute.

    python examples/tpu_resnet50.py                                                   # offline, on this machine
    python examples/tpu_resnet50.py --replicas=2                                      # on two halves of its CPU
    python examples/tpu_resnet50.py --dataset=imagenet2012 --classes=1000 --image_size=224 --batch_size=1024 --epochs=40

What differs from a script for one device is that the model and the optimizer are made in the strategy's scope. The batch is that
of all replicas together.
"""

import datasets  # isort: skip  (first: it imports TensorFlow without its greetings)
import keras
import networks
import tensorflow as tf
import training
from absl import app, flags

import keras_ngd

FLAGS = flags.FLAGS
METHODS = [method for method in training.NATURAL_GRADIENTS if method != "hylo"]
flags.DEFINE_enum("method", "thor", METHODS, "Method to train with.")
flags.DEFINE_string("tpu", None, "Name or address of a TPU. Default: the local one, if there is any.")
flags.DEFINE_integer(
    "replicas", 1, "Parts that a CPU is divided into, where there is no TPU and no GPU.", lower_bound=1
)
flags.DEFINE_string(
    "dataset", "shapes32", "An embedded set (shapes32) or one of tensorflow-datasets, such as imagenet2012."
)
flags.DEFINE_integer("classes", 10, "Classes of the data.", lower_bound=2)
flags.DEFINE_integer("image_size", 32, "Height and width that images are brought to.", lower_bound=32)
flags.DEFINE_string("data_dir", None, "Where tensorflow-datasets keeps prepared data. Default: its own choice.")
flags.DEFINE_integer("epochs", 1, "Epochs.", lower_bound=1)
flags.DEFINE_integer("steps", 20, "Steps of an epoch, and of its test; 0 for all of the data.", lower_bound=0)
flags.DEFINE_integer("batch_size", 16, "Examples of a step, of all replicas together.", lower_bound=1)
flags.DEFINE_float("learning_rate", None, "Learning rate, before it falls. Default: 0.03, of eigen_adam 0.01.")
flags.DEFINE_float("damping", 0.03, "What is added to the curvature, but for eigen_adam.")
flags.DEFINE_integer("interval", 10, "Steps between updates of the curvature.", lower_bound=1)
flags.DEFINE_integer("seed", 1, "Seed of weights and of the order of examples.")


def make_strategy():
    """A strategy for the TPU, if there is one; else for all GPUs, or for parts of the CPU."""
    # It would tell of every reduction.
    tf.get_logger().setLevel("WARNING")
    if FLAGS.tpu is not None or tf.config.list_physical_devices("TPU"):
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(FLAGS.tpu or "local")
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    if not tf.config.list_physical_devices("GPU") and FLAGS.replicas > 1:
        [cpu] = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * FLAGS.replicas)
        return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(FLAGS.replicas)])
    return tf.distribute.MirroredStrategy()


def load(split):
    """Batches of a split, scaled to about -2 to 2, all of one size: TPUs compile for it."""
    examples = datasets.load(FLAGS.dataset, split, FLAGS.data_dir)
    seed = FLAGS.seed if split == "train" else None
    return datasets.image_batches(examples, FLAGS.image_size, FLAGS.batch_size, seed, steps=FLAGS.steps or None)


def make_optimizer(steps):
    """The optimizer of the flags."""
    rate = training.learning_rate_of(FLAGS.method, FLAGS.learning_rate)
    rate = keras.optimizers.schedules.CosineDecay(rate, steps)
    shared = {"learning_rate": rate, "damping": FLAGS.damping, "weight_decay": 5e-4}
    return training.natural_gradient(FLAGS.method, FLAGS.interval, FLAGS.batch_size, **shared)


def main(_):
    keras.utils.set_random_seed(FLAGS.seed)
    strategy = make_strategy()
    train, test = load("train"), load("test")
    with strategy.scope():
        model = networks.resnet50(FLAGS.image_size, FLAGS.classes)
        optimizer = make_optimizer(FLAGS.epochs * len(train))
        keras_ngd.capture(model, optimizer)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    clock = training.Clock()
    history = model.fit(train, validation_data=test, epochs=FLAGS.epochs, callbacks=[clock], verbose=2).history
    print(f"{type(strategy).__name__}, {strategy.num_replicas_in_sync} replicas, {clock.seconds[-1]:.1f} s of training")
    print(f"test accuracy {history['val_accuracy'][-1]:.4f}, training loss {history['loss'][-1]:.4f}")


if __name__ == "__main__":
    app.run(main)
