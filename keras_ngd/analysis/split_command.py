"""Command line of `keras_ngd.analysis.split_dimension`.

    python -m keras_ngd.analysis split_dimension --model resnet50 --image_size 64

The model is one of `keras.applications`, with random weights unless `--weights` names a file of its own; the data are crops of
the two photographs that come with scikit-learn, unless `--data` names a `.npy` file of inputs.
"""

import numpy as np
from absl import flags

from keras_ngd.analysis.measuring import application
from keras_ngd.analysis.split_choice import CANDIDATES, TOLERANCE, split_dimension

FLAGS = flags.FLAGS


def define_flags():
    """Defines the flags, when the command runs: importing the module leaves the flags of others alone."""
    flags.DEFINE_string("model", "resnet50", "Name of a model of keras.applications, in any case.")
    flags.DEFINE_string("weights", None, "Weights file for it. Default: random weights.")
    flags.DEFINE_integer("image_size", 64, "Height and width of the images.", lower_bound=8)
    flags.DEFINE_integer("batch_size", 32, "Images to measure on.", lower_bound=1)
    flags.DEFINE_string("data", None, "A .npy file of inputs. Default: crops of scikit-learn's sample photographs.")
    flags.DEFINE_list("candidates", [str(c) for c in CANDIDATES], "Sizes of blocks, increasing.")
    flags.DEFINE_float("tolerance", TOLERANCE, "Information loss that counts as none.")
    flags.DEFINE_string("output", "split_dimension.png", "File of the plot; empty for none.")


def photographs(count, size):
    """`[count, size, size, 3]`: random crops, each scaled down from a random larger square."""
    from sklearn.datasets import load_sample_images

    rng, images, crops = np.random.default_rng(0), load_sample_images().images, []
    for i in range(count):
        image = images[i % len(images)]
        step = rng.integers(1, min(image.shape[:2]) // size + 1) if size <= min(image.shape[:2]) else 1
        top, left = (rng.integers(0, n - size * step + 1) for n in image.shape[:2])
        crops.append(image[top : top + size * step : step, left : left + size * step : step])
    return np.stack(crops).astype("float32")


def main(_):
    make = application(FLAGS.model)
    data = np.load(FLAGS.data) if FLAGS.data else photographs(FLAGS.batch_size, FLAGS.image_size)
    model = make(weights=FLAGS.weights, input_shape=data.shape[1:], include_top=True, classes=1000)
    # What each model of keras.applications expects of its inputs is in its own module; standardized is close to all.
    data = (data - data.mean()) / data.std() if not FLAGS.data else data
    choice = split_dimension(model, data, [int(c) for c in FLAGS.candidates], FLAGS.tolerance, progress=True)
    print(choice)
    if FLAGS.output:
        choice.plot(FLAGS.output)
        print(f"plot: {FLAGS.output}")
