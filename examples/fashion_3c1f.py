"""A small convolutional network on images by SGD, Adam, KFAC, SKFAC and HyLo: the 3C1F experiment of the HyLo paper.

    python examples/fashion_3c1f.py                             # offline: a few minutes on two cores
    python examples/fashion_3c1f.py --dataset=fashion_mnist     # the paper's data

Fashion-MNIST comes from the folder that `--fashion_mnist` names, from Debian's package `dataset-fashion-mnist`, or is downloaded.

Learning rates and dampings are the best of three to twelve trials for each method, by the loss on a fifth of the offline
training images that was held out, at another seed; SKFAC's history and HyLo's rank are the best of four and five by the
training loss there. All learning rates fall to zero.
"""

import datasets  # isort: skip  (first: it imports TensorFlow without its greetings)
import keras
import networks
import tensorflow as tf
import training
from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "dataset", "shapes32", "An embedded set (shapes32) or one of tensorflow-datasets, such as fashion_mnist."
)
flags.DEFINE_string(
    "fashion_mnist", None, "A folder with the IDX files of Fashion-MNIST. Default: Debian's, or else a download."
)
flags.DEFINE_integer("classes", 10, "Classes of the data.", lower_bound=2)
flags.DEFINE_integer("width", 16, "Channels of the first layer, doubled by each of the others.", lower_bound=1)
flags.DEFINE_boolean("augment", True, "Random shifts and reflections of the training images.")
training.define_flags(
    learning_rates={"sgd": 0.1, "adam": 0.003, "kfac": 0.03, "skfac": 0.05, "hylo": 0.1},
    dampings={"kfac": 0.03, "skfac": 0.1, "hylo": 0.2},
    epochs=30,
    batch_size=128,
    interval=10,
    output="fashion_3c1f.png",
    skfac_history=4,
    hylo_rank=0.4,
)


def load(split):
    """Examples of a split, scaled to about -2 to 2."""
    examples = datasets.load(FLAGS.dataset, split, FLAGS.data_dir, files=FLAGS.fashion_mnist)
    return examples.map(lambda x, y: ((tf.cast(x, "float32") - 127.5) / 64, y), tf.data.AUTOTUNE).cache()


def main(_):
    train, test = load("train"), load("test")

    def batches():
        examples = train.shuffle(min(len(train), 60_000), seed=FLAGS.seed)
        if FLAGS.augment:
            examples = examples.map(lambda x, y: (datasets.augmented(x), y), tf.data.AUTOTUNE)
        return examples.batch(FLAGS.batch_size, drop_remainder=True).prefetch(2)

    results = training.train_all(
        lambda: networks.cnn_3c1f(train.element_spec[0].shape, FLAGS.classes, FLAGS.width),
        batches,
        test.batch(FLAGS.batch_size).prefetch(2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metric=lambda: keras.metrics.SparseCategoricalAccuracy("accuracy"),
    )
    training.print_table(results)
    if FLAGS.history:
        training.save_history(results, FLAGS.history)
    if FLAGS.output:
        training.plot(results, f"3C1F (width {FLAGS.width}) on {FLAGS.dataset}", FLAGS.output)


if __name__ == "__main__":
    app.run(main)
