"""Data that every example can count on, offline: tensorflow-datasets builders over what installed packages bring.

Any other set of tensorflow-datasets is loaded the same way, `load("fashion_mnist")`, where it can be downloaded.
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
    import tensorflow  # noqa: F401
import tensorflow_datasets as tfds
from absl import logging

TRAIN_EXAMPLES = 1500


class Digits(tfds.core.GeneratorBasedBuilder):
    """The 1,797 handwritten digits of scikit-learn's `load_digits`: 8x8 images with values 0 to 16.

    The first 1,500 are for training, the other 297 for testing: the set's own order keeps writers together, so the
    test is on other writers than most of the training.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "As in scikit-learn."}

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8x8, with values 0 to 16.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
        )

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


EMBEDDED = (Digits.name,)


def load(name="digits", split="train", data_dir=None):
    """A split as a `tf.data.Dataset` of `(input, label)`, prepared in `data_dir` on first use.

    Args:
        name: of an embedded or any other set of tensorflow-datasets.
        split: as for `tfds.load`.
        data_dir: where prepared sets are kept. Default None: where tensorflow-datasets keeps them (`TFDS_DATA_DIR`,
            or a folder in the home directory).
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        if name in EMBEDDED:
            # Nothing is downloaded, so there is no progress worth a report.
            with contextlib.redirect_stdout(io.StringIO()):
                tfds.disable_progress_bar()
                tfds.builder(name, data_dir=data_dir).download_and_prepare()
                tfds.enable_progress_bar()
        return tfds.load(name, split=split, data_dir=data_dir, as_supervised=True)
    finally:
        logging.set_verbosity(verbosity)


def arrays(name="digits", split="train", data_dir=None, scale=16.0):
    """A split as two arrays in the order it is stored in: float32 inputs divided by `scale`, and labels."""
    examples = load(name, split, data_dir)
    inputs, labels = examples.batch(len(examples)).get_single_element()
    return inputs.numpy().astype("float32") / scale, labels.numpy()
