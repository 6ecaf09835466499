"""Factorizations of many batches in one program, on as many threads as they could all wait in."""

import os
import subprocess
import sys

import keras
import pytest

from tf_tests import small

PROGRAM = """
import os
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:2])
import jax
from jax import numpy as jnp
from keras_ngd import backend

def definite(size):
    rows = jax.random.normal(jax.random.PRNGKey(size), (32, size, size))
    return rows @ rows.mT + jnp.eye(size)

batches = [definite(size) for size in range(40, 56)]
for function in (backend.cholesky, backend.eigh, backend.triangular_inverse):
    found = jax.jit(lambda batches: [jnp.sum(jax.tree.leaves(function(2.0 * batch))[-1]) for batch in batches])
    for _ in range(40):
        jax.block_until_ready(found(batches))
    print(function.__name__)
"""


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="TensorFlow's wait in no thread of the program")
def test_programs_of_many_batches_end():
    root = os.path.dirname(os.path.dirname(os.path.abspath(small.__file__)))
    # With the loops that XLA makes for users.
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": root}
    # Half a minute, or for ever.
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
