"""Runs a function of `tf_tests.distributed.cases` in real Horovod processes."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import pytest

HOROVODRUN = shutil.which("horovodrun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

# `processes`: not in several processes of pytest-xdist, since each test starts as many as there are cores.
horovod = [
    pytest.mark.processes,
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Horovod serves the TensorFlow backend"),
    pytest.mark.skipif(HOROVODRUN is None, reason="Horovod is not installed: horovod_scripts/install_horovod.sh"),
]


def command(processes, arguments):
    """The command line that runs `python -m arguments` in several processes of this machine."""
    hosts = ["-np", str(processes), "-H", f"localhost:{processes}", "--gloo"]
    return [HOROVODRUN, *hosts, sys.executable, "-m", *arguments]


def start(case, processes, folder, **arguments):
    """Starts `cases.<case>(**arguments)` in several processes; the `subprocess.Popen` of their launcher."""
    (Path(folder) / "arguments").write_bytes(pickle.dumps(arguments))
    threads = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "2"}
    return subprocess.Popen(
        command(processes, ["tf_tests.distributed.launch", case, str(folder)]),
        env={**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", **threads},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def launch(case, processes, folder, timeout=400, **arguments):
    """What `cases.<case>(**arguments)` returns in each of several processes, by rank."""
    job = start(case, processes, folder, **arguments)
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, 9)
        raise AssertionError(f"{case} hangs: {job.communicate()[0]}") from None
    assert job.returncode == 0, output
    return results(folder, processes)


def results(folder, processes):
    """What each process left, by rank; None where a process left nothing."""
    files = [Path(folder) / f"result{rank}" for rank in range(processes)]
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def main():
    """One process: calls the case and leaves its result, or the error it raised."""
    case, folder = sys.argv[1], Path(sys.argv[2])
    arguments = pickle.loads((folder / "arguments").read_bytes())
    import horovod.tensorflow as hvd

    from tf_tests.distributed import cases

    hvd.init()
    keras.utils.set_random_seed(0)
    result = getattr(cases, case)(**arguments)
    (folder / f"result{hvd.rank()}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main()
