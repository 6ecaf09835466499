"""Command line of `keras_ngd.analysis.cost_model`.

    python -m keras_ngd.analysis cost_model --model resnet50 --batch_size 80 --bandwidth 12.5 --latency 5e-6

The model is one of `keras.applications`, with random weights; only its layers' shapes matter. What a worker computes in a
second is measured on this machine, unless it is given.
"""

import dataclasses

from absl import flags

from keras_ngd.analysis.exchanges import METHODS
from keras_ngd.analysis.measuring import application
from keras_ngd.analysis.projection import WORKERS, cost_model
from keras_ngd.analysis.rates import Rates, measure_rates

FLAGS = flags.FLAGS


def define_flags():
    """Defines the flags, when the command runs: importing the module leaves the flags of others alone."""
    flags.DEFINE_string("model", "resnet50", "Name of a model of keras.applications, in any case.")
    flags.DEFINE_integer("image_size", 224, "Height and width of the images.", lower_bound=8)
    flags.DEFINE_integer("batch_size", 32, "Examples of one worker.", lower_bound=1)
    flags.DEFINE_list("workers", [str(p) for p in WORKERS], "Numbers of workers.")
    flags.DEFINE_list("methods", list(METHODS), "Methods to compare.")
    flags.DEFINE_float("bandwidth", 12.5, "Of a link between workers, GB/s.")
    flags.DEFINE_float("latency", 5e-6, "Of a message between workers, seconds.")
    flags.DEFINE_float("product_tflops", None, "Of large products, 10^12 operations per second. Default: measured.")
    flags.DEFINE_float("factorization_tflops", None, "Of large factorizations. Default: measured.")
    flags.DEFINE_float("gradient_seconds", None, "Of a forward and backward pass. Default: from the layers' products.")
    flags.DEFINE_integer("factor_interval", 10, "Steps between updates of factors, or of rows.")
    flags.DEFINE_integer("inverse_interval", 100, "Steps between refreshes of the factors' inverses.")
    flags.DEFINE_float("rank", 0.1, "Rows that HyLo keeps, as a share of the global batch.")
    flags.DEFINE_integer("split", 128, "THOR's block size.")
    flags.DEFINE_bool("packed", True, "Whether symmetric matrices are sent as one triangle each.")
    flags.DEFINE_bool("eigen", False, "Whether KFAC keeps eigenvectors instead of inverses.")
    flags.DEFINE_string("output", "cost_model.png", "File of the plot; empty for none.")


def rates_of_flags():
    """The rates as given, those that are not measured."""
    given = {"product_flops": FLAGS.product_tflops, "factorization_flops": FLAGS.factorization_tflops}
    given = {name: 1e12 * value for name, value in given.items() if value is not None}
    network = {"bandwidth": 1e9 * FLAGS.bandwidth, "latency": FLAGS.latency}
    if len(given) == 2:
        return Rates(**given, **network)
    return dataclasses.replace(measure_rates(**network), **given)


def main(_):
    shape = (FLAGS.image_size, FLAGS.image_size, 3)
    model = application(FLAGS.model)(weights=None, input_shape=shape, include_top=True, classes=1000)
    projected = cost_model(
        model,
        [int(p) for p in FLAGS.workers],
        FLAGS.methods,
        FLAGS.batch_size,
        rates_of_flags(),
        FLAGS.factor_interval,
        FLAGS.inverse_interval,
        FLAGS.split,
        FLAGS.rank,
        FLAGS.gradient_seconds,
        FLAGS.packed,
        eigen=FLAGS.eigen,
    )
    print(projected)
    if FLAGS.output:
        projected.plot(FLAGS.output)
        print(f"plot: {FLAGS.output}")
