"""What differs between TensorFlow and JAX, and the few calls that `keras.ops` lacks.

Everything else in the package is written with `keras.ops`, so this is the only package that asks which backend runs. Modules that
are of one backend by their nature say so, and are listed in `tf_tests/test_imports.py`.
"""

from keras_ngd.backend.devices import (
    compiled_for,
    compiling_for,
    compute_on_cpu,
    device_name,
    on_accelerator,
    on_every_device,
    on_tpu,
    serves_distributions,
)
from keras_ngd.backend.gradients import identity_with_gradient, of_known_shape
from keras_ngd.backend.numerics import (
    cholesky,
    concatenated,
    dtype_name,
    eigh,
    filter_gradient,
    itemsize,
    matmul,
    parts,
    rows_at,
    triangular_inverse,
    uniform,
)
from keras_ngd.backend.running import BACKENDS, check_served, name, setting
from keras_ngd.backend.shapes import WrongShape, agrees, check_shapes, shown, static_shape, without_computing
from keras_ngd.backend.sparse_gradients import dense, is_sparse, is_sparse_tensor, sparse, sparse_zero_unless
from keras_ngd.backend.tracing import (
    check_at_most,
    graph,
    makes_variables,
    outside_trace,
    trace_of,
    traced_once,
    unconverted,
    usable,
    value_read,
    within,
)
from keras_ngd.backend.workers import (
    has_strategies,
    replica_context,
    replica_number,
    replicas_in_sync,
    serves_horovod,
    several_processes,
)
from keras_ngd.backend.xla import compiled, factorizes_by_column, quicker_compiled, under_xla, zero_unless

__all__ = [
    "BACKENDS",
    "WrongShape",
    "agrees",
    "check_at_most",
    "check_served",
    "check_shapes",
    "cholesky",
    "compiled",
    "compiled_for",
    "compiling_for",
    "compute_on_cpu",
    "dense",
    "device_name",
    "dtype_name",
    "eigh",
    "factorizes_by_column",
    "filter_gradient",
    "graph",
    "has_strategies",
    "identity_with_gradient",
    "is_sparse",
    "is_sparse_tensor",
    "itemsize",
    "concatenated",
    "makes_variables",
    "matmul",
    "name",
    "of_known_shape",
    "on_accelerator",
    "on_every_device",
    "on_tpu",
    "rows_at",
    "outside_trace",
    "parts",
    "quicker_compiled",
    "replica_context",
    "replica_number",
    "replicas_in_sync",
    "serves_distributions",
    "serves_horovod",
    "setting",
    "several_processes",
    "shown",
    "sparse",
    "sparse_zero_unless",
    "static_shape",
    "trace_of",
    "traced_once",
    "triangular_inverse",
    "uniform",
    "unconverted",
    "under_xla",
    "usable",
    "value_read",
    "within",
    "without_computing",
    "zero_unless",
]
