"""Command line of `keras_ngd.analysis.tpu_compile`.

    KERAS_BACKEND=jax python -m keras_ngd.analysis tpu_compile --model resnet50 --method kfac,thor --topology v5e:16x16

The model is one of `keras.applications`, with random weights, or what a function without arguments makes
(`--model examples.networks:resnet32`). It needs libtpu, `pip install "keras_ngd[tpu]"`, but no TPU.
"""

import functools
import importlib
import json
import os
import pathlib
from collections.abc import Callable

import keras
from absl import app, flags

from keras_ngd import backend, optimizers
from keras_ngd.analysis.measuring import application
from keras_ngd.analysis.tpu_steps import tpu_compile, tpu_devices
from keras_ngd.analysis.tpu_tables import tpu_table

METHODS = ("kfac", "thor", "ekfac", "eigen-adam", "skfac", "sngd", "hylo-kid", "hylo-kis", "hylo-switch")

FLAGS = flags.FLAGS


def define_flags():
    """Defines the flags, when the command runs: importing the module leaves the flags of others alone."""
    flags.DEFINE_string("model", "resnet50", "A model of keras.applications, in any case, or module:function.")
    flags.DEFINE_integer(
        "image_size", 224, "Height and width of the images of a model of keras.applications.", lower_bound=8
    )
    flags.DEFINE_list("method", ["kfac"], f"Methods to compile, of {', '.join(METHODS)}.")
    flags.DEFINE_list("topology", ["v5e:2x2"], "TPU topologies to compile for.")
    flags.DEFINE_integer("batch_per_chip", 32, "Examples of a chip.", lower_bound=1)
    flags.DEFINE_string("inverse", "auto", "The argument of KFAC and THOR of this name.")
    flags.DEFINE_integer("split", 128, "THOR's argument of this name.")
    flags.DEFINE_float("rank", 0.1, "HyLo's argument of this name.")
    flags.DEFINE_string("json", None, "File to write the numbers to, after each method anew.")


def make_model():
    """The model of the flags."""
    if ":" not in FLAGS.model:
        shape = (FLAGS.image_size, FLAGS.image_size, 3)
        return application(FLAGS.model)(weights=None, input_shape=shape, include_top=True, classes=1000)
    module, function = FLAGS.model.split(":", 1)
    try:
        return getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise app.UsageError(f"--model names {function!r} of {module!r}, which cannot be imported: {error}") from error


def make_optimizer(method, examples):
    """The optimizer of a method and of the flags, for batches of so many examples."""
    if method not in METHODS:
        raise app.UsageError(f"--method must be of {', '.join(METHODS)}. Received: {method}")
    name, _, mode = method.partition("-") if method.startswith("hylo") else (method, "", "")
    made: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
        "kfac": functools.partial(optimizers.KFAC, inverse=FLAGS.inverse),
        "thor": functools.partial(optimizers.THOR, inverse=FLAGS.inverse, split=FLAGS.split),
        "ekfac": optimizers.EKFAC,
        "eigen-adam": optimizers.EigenAdam,
        "skfac": functools.partial(optimizers.SKFAC, batch_size=examples),
        "sngd": functools.partial(optimizers.SNGD, batch_size=examples),
        "hylo": functools.partial(
            optimizers.HyLo, batch_size=examples, rank=FLAGS.rank, mode=mode, steps_per_epoch=100
        ),
    }
    return made[name](name=method.replace("-", "_"))


def main(_):
    devices = {topology: tpu_devices(topology) for topology in FLAGS.topology}
    if "JAX_PLATFORMS" not in os.environ:
        # Weights are made where the compiler is, not on an accelerator that happens to be there.
        backend.compute_on_cpu()
    model, reports = make_model(), []
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    for topology in FLAGS.topology:
        plain = None
        for method in FLAGS.method:
            optimizer = make_optimizer(method, FLAGS.batch_per_chip * len(devices[topology]))
            report = tpu_compile(model, optimizer, topology, FLAGS.batch_per_chip, plain=plain)
            plain = report.plain
            reports.append(report)
            print(f"{report}\n", flush=True)
            if FLAGS.json:
                text = json.dumps([report.as_dict() for report in reports], indent=1)
                pathlib.Path(FLAGS.json).write_text(text + "\n")
    print(tpu_table(reports))
