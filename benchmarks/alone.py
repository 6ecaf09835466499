"""Cases that run beside each other, and the parts of them that have the machine to themselves.

Preparing a case takes longer than timing it, and can share the machine. So the harness runs several at once, and what is timed
stands in

    with alone():
        ...

which stops the processes of all other cases meanwhile. A process that starts waits until nothing is timed.
"""

import contextlib
import fcntl
import os
import pathlib
import signal

# A directory, set by the harness: a file for each running case, named by its process, and one that is locked.
VARIABLE = "KERAS_NGD_BENCHMARKS"


def _directory():
    return pathlib.Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None


@contextlib.contextmanager
def _locked(directory):
    with open(directory / "lock", "w") as file:
        # Given back by the system when the process ends, however it does.
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def registered():
    """Makes this process one that others stop; waits while something is timed."""
    directory = _directory()
    if directory is None:
        yield
        return
    entry = directory / str(os.getpid())
    with _locked(directory):
        entry.touch()
    try:
        yield
    finally:
        with _locked(directory):
            entry.unlink()


@contextlib.contextmanager
def alone():
    """Stops the other cases' processes; waits while another case is timed. Without the harness it does nothing."""
    directory = _directory()
    if directory is None:
        yield
        return
    with _locked(directory):
        others = [int(p.name) for p in directory.iterdir() if p.name.isdigit() and p.name != str(os.getpid())]
        try:
            send(others, signal.SIGSTOP)
            yield
        finally:
            send(others, signal.SIGCONT)


def send(processes, number):
    """Sends a signal to processes, some of which may have ended."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
