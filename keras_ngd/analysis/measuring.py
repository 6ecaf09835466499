"""What several measurements need: a model by its name, and the time of a function."""

import time

import keras
import numpy as np
from absl import app
from keras import ops


def application(name):
    """A function of `keras.applications` by name, in any case."""
    found = {key.lower(): key for key in dir(keras.applications) if key[0].isupper()}
    if name.lower() not in found:
        raise app.UsageError(f"--model must be one of {', '.join(sorted(found))}. Received: {name}")
    return getattr(keras.applications, found[name.lower()])


def median_seconds(function, matrix, repeats=5):
    """Median time of a compiled function of `[1, n, n]` with a result of this shape, after a first call."""
    ops.convert_to_numpy(function(matrix))
    times = []
    for _ in range(repeats):
        calls, start = 0, time.perf_counter()
        # Long enough to be measured: a small matrix takes microseconds.
        while calls == 0 or time.perf_counter() - start < 0.02:
            ops.convert_to_numpy(function(matrix)[0, 0, 0])
            calls += 1
        times.append((time.perf_counter() - start) / calls)
    return float(np.median(times))
