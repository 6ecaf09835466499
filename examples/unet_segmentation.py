"""A U-Net on binary masks by SGD, Adam, KFAC, SKFAC and HyLo, with the Dice score.

    python examples/unet_segmentation.py                               # offline: a few minutes on two cores
    python examples/unet_segmentation.py --dataset=oxford_iiit_pet     # pets before their background, which downloads

Learning rates and dampings are the best of four to fifteen trials for each method, by the loss on a fifth of the offline
training images that was held out, at another seed. All learning rates fall to zero.
"""

import datasets  # isort: skip  (first: it imports TensorFlow without its greetings)
import keras
import networks
import numpy as np
import tensorflow as tf
import training
from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "dataset",
    "masks64",
    "An embedded set (masks64) or one of tensorflow-datasets with the features image and segmentation_mask.",
)
flags.DEFINE_integer("foreground", 1, "The value in the masks that is to be found.")
flags.DEFINE_integer("size", 64, "Height and width that images are scaled to.", lower_bound=8)
flags.DEFINE_integer("width", 8, "Channels at full size, doubled at each halving.", lower_bound=1)
flags.DEFINE_integer("depth", 3, "How often the image is halved.", lower_bound=1)
flags.DEFINE_boolean("augment", True, "Random reflections of the training images.")
training.define_flags(
    learning_rates={"sgd": 0.3, "adam": 0.01, "kfac": 0.3, "skfac": 0.3, "hylo": 0.3},
    dampings={"kfac": 0.003, "skfac": 0.003, "hylo": 0.1},
    epochs=10,
    batch_size=32,
    interval=10,
    output="unet_segmentation.png",
)
PICTURES = 6


def load(split):
    """Examples of a split: images scaled to about -2 to 2, masks of 0 and 1."""

    def prepared(image, mask):
        if image.shape[:2] != (FLAGS.size, FLAGS.size):
            image = tf.image.resize(image, (FLAGS.size, FLAGS.size), antialias=True)
            mask = tf.image.resize(mask, (FLAGS.size, FLAGS.size), "nearest")
        return (tf.cast(image, "float32") - 127.5) / 64, tf.cast(mask == FLAGS.foreground, "float32")

    examples = datasets.load(FLAGS.dataset, split, FLAGS.data_dir, keys=("image", "segmentation_mask"))
    return examples.map(prepared, tf.data.AUTOTUNE).cache()


def augmented(image, mask):
    """The same random reflections of both."""
    both = tf.concat([image, mask], -1)
    both = tf.image.random_flip_left_right(tf.image.random_flip_up_down(both))
    return both[..., : image.shape[-1]], both[..., image.shape[-1] :]


def draw_pictures(figure, images, truth, found):
    """Images beside each other, and below them the true masks and those `found` by each method, on an empty figure."""
    images = np.clip((images * 64 + 127.5) / 255, 0, 1)
    rows = {"image": images if images.shape[-1] == 3 else np.repeat(images, 3, -1)}
    rows["truth"] = np.repeat(truth, 3, -1)
    for method, masks in found.items():
        rows[method] = np.concatenate([masks, masks * truth, truth], -1)
    for axis, (name, row) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        apart = np.pad(row, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.5)
        axis.imshow(np.concatenate(apart, axis=1), interpolation="nearest")
        axis.set(xticks=[], yticks=[], ylabel=name)
        axis.spines[:].set_visible(False)
    figure.suptitle("white: found, red: found but not there, blue: missed", fontsize="medium")


def plot(results, images, truth, found, path):
    from matplotlib.figure import Figure

    width = 6.8 * len(images) / (len(found) + 2)
    figure = Figure(figsize=(11 + width, 7), layout="constrained")
    curves, pictures = figure.subfigures(1, 2, width_ratios=(11, width))
    training.draw_curves(curves, results, "dice", lowest=0.8)
    curves.suptitle(f"U-Net (width {FLAGS.width}, depth {FLAGS.depth}) on {FLAGS.dataset}")
    draw_pictures(pictures, images, truth, found)
    figure.savefig(path, dpi=110)
    print(f"plot: {path}")


def main(_):
    train, test = load("train"), load("test")
    images, truth = next(test.batch(PICTURES).as_numpy_iterator())
    found = {}

    def batches():
        examples = train.shuffle(min(len(train), 10_000), seed=FLAGS.seed)
        if FLAGS.augment:
            examples = examples.map(augmented, tf.data.AUTOTUNE)
        return examples.batch(FLAGS.batch_size, drop_remainder=True).prefetch(2)

    def predict(method, model):
        found[method] = keras.ops.convert_to_numpy(model(images, training=False) > 0).astype("float32")

    results = training.train_all(
        lambda: networks.unet(FLAGS.size, images.shape[-1], FLAGS.width, FLAGS.depth),
        batches,
        test.batch(FLAGS.batch_size).prefetch(2),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metric=training.Dice,
        after=predict,
    )
    training.print_table(results, "dice")
    if FLAGS.history:
        training.save_history(results, FLAGS.history)
    if FLAGS.output:
        plot(results, images, truth, found, FLAGS.output)


if __name__ == "__main__":
    app.run(main)
