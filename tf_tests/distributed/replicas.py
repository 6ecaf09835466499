"""Runs functions of `tf_tests.distributed.replica_cases` under strategies of `tf.distribute`, in processes of their own."""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import keras
import pytest

tensorflow_only = [
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute serves the TensorFlow backend")
]


def mirrored(case, replicas, folder, **arguments):
    """What `case(strategy, **arguments)` returns under a MirroredStrategy of so many parts of the CPU."""
    [result] = _run(case, folder, [{"TEST_REPLICAS": str(replicas)}], arguments)
    return result


def workers(case, processes, folder, **arguments):
    """What it returns in each process of a MultiWorkerMirroredStrategy."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(processes)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    cluster = {"worker": addresses}
    configurations = [
        {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": rank}})}
        for rank in range(processes)
    ]
    return _run(case, folder, configurations, arguments)


def _run(case, folder, environments, arguments, timeout=400):
    folder = Path(folder)
    (folder / "arguments").write_bytes(pickle.dumps(arguments))
    jobs = []
    for rank, environment in enumerate(environments):
        with open(folder / f"output{rank}", "w") as output:
            jobs.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tf_tests.distributed.replicas", case, str(folder), str(rank)],
                    env={**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [job.wait(timeout) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    for rank, code in enumerate(codes):
        assert code == 0, (folder / f"output{rank}").read_text()[-4000:]
    return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(len(jobs))]


def main():
    """One process: makes its strategy, calls the case and leaves its result."""
    case, folder, rank = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    import tensorflow as tf

    if "TF_CONFIG" in os.environ:
        from keras_ngd.distributed import MultiWorkerMirroredStrategy

        strategy = MultiWorkerMirroredStrategy()
    else:
        count = int(os.environ["TEST_REPLICAS"])
        parts = [tf.config.LogicalDeviceConfiguration() for _ in range(count)]
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], parts)
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])
    from tf_tests.distributed import replica_cases

    keras.utils.set_random_seed(0)
    result = getattr(replica_cases, case)(strategy, **pickle.loads((folder / "arguments").read_bytes()))
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main()
