"""TensorFlow's step as it is handed to XLA: what a TPU would be asked to do."""

import keras
import numpy as np
import pytest

import keras_ngd
from keras_ngd.analysis import hlo, tensorflow_step_hlo
from tf_tests import paper
from tf_tests.analysis.test_tpu_steps import BATCH, network

on_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="is about TensorFlow")
METHODS = {
    "kfac": lambda: paper.KFAC(),
    "thor": lambda: paper.THOR(split=8),
    "skfac": lambda: paper.SKFAC(batch_size=BATCH),
    "skfac-subsample": lambda: paper.SKFAC(batch_size=BATCH, convolution="subsample"),
    "sngd": lambda: paper.SNGD(batch_size=BATCH),
    "hylo-kid": lambda: paper.HyLo(batch_size=BATCH, rank=3, mode="kid"),
    "hylo-kis": lambda: paper.HyLo(batch_size=BATCH, rank=3, mode="kis"),
    "hylo-switch": lambda: paper.HyLo(batch_size=BATCH, rank=3, steps_per_epoch=10),
}


def step_of(optimizer):
    model = network()
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, loss="mse", jit_compile=True)
    return tensorflow_step_hlo(model, np.zeros((BATCH, 6, 6, 2), "float32"), np.zeros((BATCH, 3), "float32"))


@on_tensorflow
@pytest.mark.parametrize("method", METHODS)
def test_sizes_are_static_and_no_library_is_called(method):
    text = step_of(METHODS[method]())
    every, some = hlo.contents(text)
    assert every.conditionals > 0
    assert some.product_flops > 0
    assert not every.custom_calls + some.custom_calls
    assert not every.host + some.host
    sizes = [size for kind, size in hlo._ARRAY.findall(text) if kind in ("f32", "s32", "pred")]
    assert sizes
    assert not [size for size in sizes if "<" in size], "sizes known only while the step runs"


@on_tensorflow
@pytest.mark.parametrize("kind", [keras_ngd.EKFAC, keras_ngd.EigenAdam])
def test_bases_are_followed_without_a_routine_but_for_the_first(kind):
    text = step_of(kind())
    every, some = hlo.contents(text)
    # One for each size of a factor: 19 and 4 of the convolution, 145 and 3 of the other.
    assert every.custom_calls + some.custom_calls == {"Eigh": 4}
    assert not every.host + some.host
    sizes = [size for kind, size in hlo._ARRAY.findall(text) if kind in ("f32", "s32", "pred")]
    assert not [size for size in sizes if "<" in size], "sizes known only while the step runs"


@on_tensorflow
@pytest.mark.slow
def test_auto_iterates_and_eigenvectors_need_a_routine():
    def loops(inverse):
        parts = hlo.contents(step_of(paper.KFAC(inverse=inverse)))
        return sum(part.loops for part in parts), sum(
            (part.custom_calls for part in parts), start=type(parts[0].custom_calls)()
        )

    assert loops("auto") == loops("newton-schulz")
    assert loops("auto")[0] > loops("cholesky")[0]
    assert loops("eigen")[1] == {"Eigh": 4}


def test_what_is_refused():
    model = network()
    if keras.backend.backend() != "tensorflow":
        with pytest.raises(RuntimeError, match="tpu_compile"):
            tensorflow_step_hlo(model, None, None)
        return
    with pytest.raises(ValueError, match="'network'"):
        tensorflow_step_hlo(model, None, None)
