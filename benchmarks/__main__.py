"""The benchmarks' one command.

    python -m benchmarks                            # all, unattended; goes on where it was interrupted
    python -m benchmarks --quick                    # a few minutes: whether all of them run
    python -m benchmarks costs                      # some
    python -m benchmarks costs --only=resnet32-jax
    python -m benchmarks tasks --only='text-*'      # by a pattern; some long cases run only where they are named
    python -m benchmarks tasks --times --only='text-*'    # the seconds of what is measured, anew, beside each other
    python -m benchmarks defaults --optimizers=EKFAC      # one column; the result keeps the others
    python -m benchmarks kinds                      # what does not belong to "all" is named
    python -m benchmarks --render                   # plots and the page alone, from the results that are there

On JAX and a CPU, `OPENBLAS_NUM_THREADS=1` before these keeps factorizations from waiting for other work; results name it.

Results are in `benchmarks/results/`, and `docs/benchmarks.md` is made of them.
"""

import json
import os

from absl import app, flags

from benchmarks import alone, harness, results

FLAGS = flags.FLAGS
flags.DEFINE_boolean("quick", False, "Few and small cases; the page is left as it is.")
flags.DEFINE_list("only", None, "Cases to measure anew, or patterns, of one benchmark; the result keeps the others.")
flags.DEFINE_list("optimizers", None, "Those to measure anew, where a case has several; the result keeps the others.")
flags.DEFINE_boolean("times", False, "Measure anew how long the epochs of what is measured take, beside each other.")
flags.DEFINE_boolean("render", False, "Make the page of the results that are there, and run nothing.")
flags.DEFINE_string(
    "fashion_mnist", None, "A folder with the IDX files of Fashion-MNIST. Default: Debian's, or else a download."
)
flags.DEFINE_string("worker", None, "Measure --case of this benchmark in this process (used by the harness).")
flags.DEFINE_string("case", None, "A case, as JSON.")


def main(arguments):
    if FLAGS.worker:
        with alone.registered():
            print(json.dumps(harness.module_of(FLAGS.worker).measure(json.loads(FLAGS.case))))
        return
    from benchmarks import page

    names, known = arguments[1:] or list(harness.USUAL), (*harness.USUAL, *harness.NAMED)
    if unknown := set(names) - set(known):
        raise app.UsageError(f"There are no benchmarks {sorted(unknown)}. There are: {', '.join(known)}")
    if (FLAGS.only or FLAGS.optimizers or FLAGS.times) and len(names) != 1:
        raise app.UsageError("--only, --optimizers and --times are for one benchmark: name it.")
    if FLAGS.fashion_mnist:
        # Each case has a process of its own.
        os.environ["FASHION_MNIST"] = os.path.abspath(FLAGS.fashion_mnist)
    for name in names:
        if not FLAGS.render:
            if FLAGS.times:
                path = harness.time_again(name, FLAGS.only)
            else:
                path = harness.run(name, FLAGS.quick, FLAGS.only, FLAGS.optimizers)
            print(f"\n{harness.module_of(name).table(json.loads(path.read_text()))}\n\nwritten to {path}\n")
        elif results.path_of(name).exists():
            harness.plot(name, name)
    if not FLAGS.quick:
        page.write()


if __name__ == "__main__":
    app.run(main)
