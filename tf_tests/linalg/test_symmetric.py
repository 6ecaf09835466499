"""What matrices are asked for."""

import numpy as np
import pytest

from keras_ngd import backend
from keras_ngd.linalg import symmetric
from tf_tests.reference.running import run


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize(("value", "finite"), [(0.0, True), (np.nan, False), (np.inf, False)])
def test_a_checksum_shows_what_is_not_finite(value, finite, xla):
    rows = np.random.default_rng(0).standard_normal((2, 9, 5)).astype("float32")
    rows[1, 3, 2] = value
    total = run(lambda rows: symmetric.checksum(backend.matmul(rows, rows, transpose_a=True)), rows, xla=xla)
    assert np.isfinite(total) == finite
