"""A residual network on several workers: one process of this script each, started by Horovod.

    horovodrun -np 2 -H localhost:2 --gloo python examples/distributed_resnet.py      # offline, two workers here
    python examples/distributed_resnet.py                                             # the same on one
    horovod_scripts/run_hosts.sh host1:8,... examples/distributed_resnet.py --network=resnet50 --dataset=imagenet2012

Each worker reads its part of the data set. What differs from a script for one worker is `hvd.init()`, and that the data
are sharded; metrics and checkpoints say so, too. The learning rate grows with the number of workers, from one worker's, over
the first epochs (Goyal et al., 2017), and then falls to zero.
"""

import datasets  # isort: skip  (first: it imports TensorFlow without its greetings)
import os

import keras
import networks
import training
from absl import app, flags

import keras_ngd
from keras_ngd.callbacks import BroadcastInitialState, MetricAverage
from keras_ngd.distributed import in_turn, shard

try:
    import horovod.tensorflow as hvd

    hvd.init()
    RANK, WORKERS = hvd.rank(), hvd.size()
except ImportError:
    RANK, WORKERS = 0, 1

FLAGS = flags.FLAGS
flags.DEFINE_enum("method", "kfac", training.NATURAL_GRADIENTS, "Method to train with.")
flags.DEFINE_enum("network", "resnet32", ["resnet32", "resnet50"], "Network to train.")
flags.DEFINE_string("dataset", "shapes32", "An embedded set (shapes32) or one of tensorflow-datasets, such as cifar10.")
flags.DEFINE_integer("classes", 10, "Classes of the data.", lower_bound=2)
flags.DEFINE_integer("image_size", 32, "Height and width that images are brought to.", lower_bound=8)
flags.DEFINE_integer("width", 16, "Channels of ResNet-32's first stage.", lower_bound=1)
flags.DEFINE_string("data_dir", None, "Where tensorflow-datasets keeps prepared data. Default: its own choice.")
flags.DEFINE_integer("epochs", 4, "Epochs.", lower_bound=1)
flags.DEFINE_integer("steps", None, "Steps of an epoch, and of its test. Default: all examples once.", lower_bound=1)
flags.DEFINE_integer("batch_size", 64, "Examples a step and worker.", lower_bound=1)
flags.DEFINE_float("learning_rate", None, "Learning rate of one worker. Default: 0.03, of eigen_adam 0.01.")
flags.DEFINE_float("warmup", 1.0, "Epochs over which the learning rate grows to that of all workers.", lower_bound=0.0)
flags.DEFINE_float("damping", 0.03, "What is added to the curvature, but for eigen_adam.")
flags.DEFINE_integer("interval", 10, "Steps between updates of the curvature.", lower_bound=1)
flags.DEFINE_integer("seed", 1, "Seed of weights and of the order of examples.")
flags.DEFINE_string("checkpoint", None, "A .keras file that worker 0 writes after every epoch, and goes on from.")


def make_optimizer(steps_per_epoch):
    """The optimizer of the flags."""
    of_one_worker = training.learning_rate_of(FLAGS.method, FLAGS.learning_rate)
    learning_rate = keras.optimizers.schedules.CosineDecay(
        of_one_worker,
        decay_steps=round((FLAGS.epochs - FLAGS.warmup) * steps_per_epoch),
        warmup_target=of_one_worker * WORKERS,
        warmup_steps=round(FLAGS.warmup * steps_per_epoch),
    )
    return training.natural_gradient(
        FLAGS.method,
        FLAGS.interval,
        FLAGS.batch_size,
        steps_per_epoch,
        learning_rate=learning_rate,
        damping=FLAGS.damping,
        weight_decay=5e-4,
    )


def load(split):
    """This worker's batches of a split, scaled to about -2 to 2."""
    examples = shard(in_turn(lambda: datasets.load(FLAGS.dataset, split, FLAGS.data_dir)))
    trained_on = split == "train"
    return datasets.image_batches(
        examples,
        FLAGS.image_size,
        FLAGS.batch_size,
        shuffled_by=FLAGS.seed + RANK if trained_on else None,
        drop_remainder=trained_on,
        steps=FLAGS.steps,
    )


def make_model(steps_per_epoch):
    """The network, captured and compiled."""
    if FLAGS.network == "resnet32":
        model = networks.resnet32(FLAGS.image_size, FLAGS.classes, FLAGS.width)
    else:
        model = networks.resnet50(FLAGS.image_size, FLAGS.classes)
    optimizer = make_optimizer(steps_per_epoch)
    keras_ngd.capture(model, optimizer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    return model


def main(_):
    keras.utils.set_random_seed(FLAGS.seed + RANK)
    train, test = load("train"), load("test")
    clock = training.Clock()
    callbacks = [BroadcastInitialState(), MetricAverage(), clock]
    if FLAGS.checkpoint and os.path.exists(FLAGS.checkpoint):
        model = keras.models.load_model(FLAGS.checkpoint)
    else:
        model = make_model(len(train))
    if FLAGS.checkpoint and RANK == 0:
        callbacks.append(keras.callbacks.ModelCheckpoint(FLAGS.checkpoint))
    done = int(model.optimizer.iterations) // len(train)
    history = model.fit(
        train,
        validation_data=test,
        initial_epoch=done,
        epochs=FLAGS.epochs,
        callbacks=callbacks,
        verbose=2 if RANK == 0 else 0,
    ).history
    if RANK == 0 and history:
        received = {stage: f"{size / 2**20:.1f} MiB" for stage, size in model.optimizer.received_bytes().items()}
        print(f"{WORKERS} workers, {clock.seconds[-1]:.1f} s of training; received by each: {received or 'nothing'}")
        print(f"test accuracy {history['val_accuracy'][-1]:.4f}, training loss {history['loss'][-1]:.4f}")


if __name__ == "__main__":
    app.run(main)
