"""What a training step takes of each chip of a TPU, by method, network and topology, compiled without a TPU.

Every case is the command line of `keras_ngd.analysis.tpu_compile`; beside them, refreshes of inverses and bases by each means.
Compiling takes minutes of processor time for a deep network and method.

    python -m benchmarks.tpu                                    # all cases
    python -m benchmarks.tpu --cases 3c1f,inverses --append     # some; the result keeps the others
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from benchmarks import results

FACTORS, ROWS = "kfac,thor,ekfac,eigen-adam", "skfac,sngd,hylo-kid,hylo-kis"
METHODS = f"{FACTORS},{ROWS}"
FOUR, MANY = {"topology": "v5e:2x2", "batch_per_chip": 32}, {"topology": "v5e:16x16", "batch_per_chip": 8}
# As many rows as there are examples: matrices of all rows of 256 chips' are kept small.
MANY_ROWS = {**MANY, "batch_per_chip": 1}
SMALL = {"model": "examples.networks:cnn_3c1f", "split": 16}
RESNET32 = {"model": "examples.networks:resnet32", "split": 16}
RESNET50 = {"model": "resnet50", "image_size": 224}
CASES = {
    "3c1f": {**SMALL, "method": METHODS, **FOUR},
    "3c1f-256": {**SMALL, "method": FACTORS, **MANY},
    "3c1f-256-rows": {**SMALL, "method": ROWS, **MANY_ROWS},
    "resnet32": {**RESNET32, "method": METHODS, **FOUR},
    "resnet32-256": {**RESNET32, "method": FACTORS, **MANY},
    "resnet32-256-rows": {**RESNET32, "method": ROWS, **MANY_ROWS},
    "resnet50": {**RESNET50, "method": METHODS, **FOUR},
    "resnet50-256": {**RESNET50, "method": FACTORS, **MANY},
    "resnet50-256-rows": {**RESNET50, "method": ROWS, **MANY_ROWS},
}
INVERSES, SIZES = ("newton-schulz", "cholesky", "eigen"), ((11, 144), (4, 576))
# Compiled in processes of their own: refreshes of inverses, and of bases.
REFRESHES = ("inverses", "bases")

FLAGS = flags.FLAGS
# Not when imported for its table: other benchmarks' flags have the same names.
if __name__ == "__main__":
    flags.DEFINE_list("cases", [*CASES, *REFRESHES], "What to compile.")
    flags.DEFINE_list("methods", None, "Methods to compile in place of all.")
    flags.DEFINE_string("result", "tpu", "Name of the result.")
    flags.DEFINE_boolean("append", False, "Keep what the result has of other cases and methods.")
    flags.DEFINE_enum(
        "worker", None, REFRESHES, "Compile these in this process and print JSON (used by the benchmark)."
    )


def environment():
    """Of the processes that compile."""
    return {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


def arguments(case, methods=None):
    """The command line's arguments of a case."""
    settings = {**CASES[case], **({"method": ",".join(methods)} if methods else {})}
    return [f"--{name}={value}" for name, value in settings.items()]


def compiled_case(case, methods):
    """The reports of a case, as dicts; what there is of them if the compiler fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "reports.json"
        command = [
            sys.executable,
            "-m",
            "keras_ngd.analysis",
            "tpu_compile",
            *arguments(case, methods),
            f"--json={path}",
        ]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return json.loads(path.read_text())


def compiled_for_a_chip(function, *shapes):
    """What a function of tensors of these shapes takes of one chip."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from keras_ngd import backend
    from keras_ngd.analysis import hlo
    from keras_ngd.analysis.tpu_steps import tpu_devices

    mesh = Mesh(np.array(tpu_devices("v5e:2x2")[:1]), ("batch",))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def traced(*tensors):
        with backend.compiling_for(mesh):
            return function(*tensors)

    given = [jax.ShapeDtypeStruct(shape, "float32", sharding=everywhere) for shape in shapes]
    start = time.process_time()
    compiled = jax.jit(traced).lower(*given).compile()
    seconds = time.process_time() - start
    every, some = hlo.contents(compiled.as_text())
    return {
        "flops": compiled.cost_analysis()["flops"],
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "code_bytes": compiled.memory_analysis().generated_code_size_in_bytes,
        "loops": every.loops + some.loops,
        "custom_calls": dict(every.custom_calls + some.custom_calls),
        "seconds": seconds,
    }


def compiled_inverses():
    """What a refresh of both inverses of `k` layers, of factors of one size, takes by each means."""
    from keras_ngd.curvature import KroneckerCurvature

    for count, size in SIZES:
        for inverse in INVERSES:
            curvature = KroneckerCurvature(count, size, size, "float32", inverse, "pi")
            shapes = []
            curvature.build(lambda shape, *_, shapes=shapes: shapes.append(shape))

            def refresh(a, g, damping, *state, curvature=curvature):
                return curvature.refresh([a, g], damping, list(state))

            found = compiled_for_a_chip(refresh, *[(count, size, size)] * 2, (), *shapes)
            yield {"count": count, "size": size, "inverse": inverse, **found}


def compiled_bases():
    """What new bases of `2 k` factors of one size take: eigendecompositions, and steps of orthogonal iteration."""
    from benchmarks import eigenvectors

    for count, size in SIZES:
        for kind, function in eigenvectors.functions().items():
            if kind != "check":
                yield {
                    "count": count,
                    "size": size,
                    "inverse": kind,
                    **compiled_for_a_chip(function, *[(2 * count, size, size)] * 3),
                }


def compiled_refreshes(kind):
    """All of a kind of `REFRESHES`."""
    found = []
    for entry in {"inverses": compiled_inverses, "bases": compiled_bases}[kind]():
        found.append(entry)
        print(json.dumps(entry), file=sys.stderr, flush=True)
    return found


def refresh_table(found, means="inverse"):
    """The refreshes as Markdown."""
    from keras_ngd.analysis.tpu_tables import number

    lines = [f"| factors | {means} | GFLOP, loops once | MiB of temporaries | of program | routines | s to compile |"]
    lines.append("|---" * 7 + "|")
    for entry in found:
        routines = ", ".join(f"{count} {name}" for name, count in sorted(entry["custom_calls"].items())) or "-"
        sizes = [number(entry[name] / 2**20) for name in ("temporary_bytes", "code_bytes")]
        cells = [f"{2 * entry['count']} of {entry['size']} x {entry['size']}", entry["inverse"]]
        cells += [number(entry["flops"] / 1e9), *sizes, routines, f"{entry['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(payload):
    """All results as Markdown: for each case its command and its table."""
    # Late: the tables of other benchmarks are made without the library.
    from keras_ngd.analysis.tpu_steps import TpuReport
    from keras_ngd.analysis.tpu_tables import tpu_table

    parts = []
    for case in [name for name in CASES if name in payload["cases"]]:
        reports = [TpuReport.from_dict(values) for values in payload["cases"][case]]
        methods = [report.step.optimizer.replace("_", "-") for report in reports]
        command = f"KERAS_BACKEND=jax python -m keras_ngd.analysis tpu_compile {' '.join(arguments(case, methods))}"
        parts += [f"    {command}", tpu_table(reports)]
    return "\n\n".join(parts)


def main(_):
    if FLAGS.worker:
        print(json.dumps(compiled_refreshes(FLAGS.worker)))
        return
    payload = {"cases": {}, **{kind: [] for kind in REFRESHES}}
    if FLAGS.append and (results.DIRECTORY / f"{FLAGS.result}.json").exists():
        payload |= {name: value for name, value in results.load(FLAGS.result).items() if name in payload}
    for case in FLAGS.cases:
        if case in REFRESHES:
            command = [sys.executable, "-m", "benchmarks.tpu", f"--worker={case}"]
            done = subprocess.run(command, env=environment(), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"Compiling refreshes failed:\n{done.stderr[-3000:]}")
            payload[case] = json.loads(done.stdout.splitlines()[-1])
        elif case in CASES:
            new = compiled_case(case, FLAGS.methods)
            names = [report["step"]["optimizer"] for report in new]
            kept = [r for r in payload["cases"].get(case, []) if r["step"]["optimizer"] not in names]
            payload["cases"][case] = kept + new
        else:
            raise app.UsageError(f"--cases must be of {', '.join([*CASES, *REFRESHES])}. Received: {case}")
        path = results.save(FLAGS.result, payload)
        print(f"{case}: written to {path}", flush=True)
    print("\n" + "\n\n".join([table(payload), *(refresh_table(payload[kind], kind) for kind in REFRESHES)]))


if __name__ == "__main__":
    app.run(main)
