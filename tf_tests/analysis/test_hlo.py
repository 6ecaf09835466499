"""What is read from the text of a program: on a text as libtpu writes it, and against XLA's own counts."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ngd.analysis import hlo

# Shortened from what libtpu 0.0.52 makes of a training step for v5e:2x2.
TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0:T(8,128)})->f32[8,16]{1,0:T(8,128)}}

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%fused_computation.1 (p0: f32[8,16], p1: f32[16,4]) -> f32[8,4] {
  %p0 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %p1 = f32[16,4]{1,0:T(8,128)} parameter(1)
  ROOT %convolution.1 = f32[8,4]{1,0:T(8,128)S(1)} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%gathered (p: f32[2,16]) -> f32[8,16] {
  %p = f32[2,16]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.1 = f32[8,16]{1,0:T(8,128)} all-gather(%p), channel_id=3, dimensions={0}
}

%body (s: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %s = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %m = f32[8,16]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %permuted = (f32[8,16]{1,0:T(8,128)}, f32[8,16]{1,0:T(8,128)}, u32[]{:S(2)}) collective-permute-start(%m)
  %done = f32[8,16]{1,0:T(8,128)} collective-permute-done(%permuted)
  ROOT %t = (s32[]{:T(128)}, /*index=1*/f32[8,16]{1,0:T(8,128)}) tuple(%i, %done)
}

%condition (s: (s32[], f32[8,16])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  ROOT %c = pred[]{:T(512)} custom-call(%s), custom_call_target="xla_ffi_python_cpu_callback"
}

%open (p: f32[2,16]) -> f32[8,16] {
  %p = f32[2,16]{1,0:T(8,128)} parameter(0)
  %whole = f32[8,16]{1,0:T(8,128)} fusion(%p), kind=kCustom, calls=%gathered
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%zero, %whole)
  %loop = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"},"flag_configs":[]}
  %again = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%loop), condition=%condition, body=%body
  ROOT %result = f32[8,16]{1,0:T(8,128)} get-tuple-element(%again), index=1
}

%closed (p: f32[2,16]) -> f32[8,16] {
  %p = f32[2,16]{1,0:T(8,128)} parameter(0)
  %nothing = f32[]{:T(128)} constant(0)
  ROOT %zeros = f32[8,16]{1,0:T(8,128)} broadcast(%nothing), dimensions={}
}

ENTRY %main (x: f32[8,16], w: f32[16,4], part: f32[2,16], gate: s32[]) -> f32[8,16] {
  %x = f32[8,16]{1,0:T(8,128)} parameter(0)
  %w = f32[16,4]{1,0:T(8,128)} parameter(1)
  %part = f32[2,16]{1,0:T(8,128)} parameter(2)
  %gate = s32[]{:T(128)S(6)} parameter(3)
  %fusion.1 = f32[8,4]{1,0:T(8,128)S(1)} fusion(%x, %w), kind=kOutput, calls=%fused_computation.1
  %all-reduce.1 = (f32[8,4]{1,0:T(8,128)}, bf16[16,4]{1,0:T(8,128)(2,1)}) all-reduce(%fusion.1, %w), to_apply=%region_0.1
  %sent = (f32[8,4]{1,0:T(8,128)}, u32[], token[]) send(%fusion.1), channel_id=9, is_host_transfer=true
  %factor = f32[16,16]{1,0:T(8,128)} custom-call(%w), custom_call_target="Cholesky"
  ROOT %conditional = f32[8,16]{1,0:T(8,128)} conditional(%gate, %part, %part), branch_computations={%closed, %open}
}
"""


def test_every_step_and_updates_are_told_apart():
    every, some = hlo.contents(TEXT)
    assert every.collectives == {"all-reduce": 1}
    # What is summed, w in float32 as it goes in.
    assert every.collective_bytes == 4 * (8 * 4 + 16 * 4)
    assert every.product_flops == 2 * 8 * 16 * 4
    assert (every.conditionals, every.loops) == (1, 0)
    # The gathered rows once; what is permuted in a loop of five rounds and in one of unknown length.
    assert some.collectives == {"all-gather": 1, "collective-permute": 5 + 1}
    assert some.collective_bytes == 4 * 8 * 16 * (1 + 5 + 1)
    assert (some.product_flops, some.conditionals, some.loops) == (0, 0, 1)


def test_what_waits_for_the_host_is_found():
    every, some = hlo.contents(TEXT)
    assert every.host == {"send": 1}
    assert every.custom_calls == {"Cholesky": 1}
    assert some.host == {"xla_ffi_python_cpu_callback": 6}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f32[16,8]{1,0:T(8,128)S(1)}", 512),
        ("(f32[16]{0:T(128)}, /*index=1*/bf16[3,2]{1,0}, pred[7]{0}, s32[])", 64 + 12 + 7 + 4),
        ("token[]", 0),
        ("s4[3]{0}", 2),
        ("c64[2]{0}", 16),
    ],
)
def test_sizes_of_types(text, expected):
    assert hlo.type_bytes(text) == expected


def test_what_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.contents("module @jit_step { }")


def _text_and_flops(function, *arrays):
    """HLO as the backend hands it to XLA, and what XLA counts in it (on JAX)."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(function, jit_compile=True, autograph=False)
        return compiled.experimental_get_compiler_ir(*map(tf.constant, arrays))(stage="hlo"), None
    import jax

    lowered = jax.jit(function).lower(*arrays)
    text = lowered.compiler_ir("hlo").as_hlo_module().to_string()
    return text, lowered.cost_analysis()["flops"]


def test_products_of_many_matrices():
    a, b = np.zeros((3, 8, 16), "float32"), np.zeros((3, 16, 4), "float32")
    every, some = hlo.contents(_text_and_flops(ops.matmul, a, b)[0])
    assert (every.product_flops, some.product_flops) == (2 * 3 * 8 * 16 * 4, 0)


@pytest.mark.parametrize(("stride", "padding", "outputs"), [(1, "valid", 6), (2, "valid", 3), (2, "same", 4)])
def test_convolutions_without_what_pads_them(stride, padding, outputs):
    x, kernel = np.zeros((2, 8, 8, 3), "float32"), np.zeros((3, 3, 3, 5), "float32")

    def convolve(x, kernel):
        return ops.conv(x, kernel, stride, padding)

    text, counted = _text_and_flops(convolve, x, kernel)
    every, _ = hlo.contents(text)
    # "same" pads one row and one column at the end, which the last outputs would see.
    seen = (outputs * 3 - (padding == "same")) ** 2
    assert every.product_flops == 2 * 2 * seen * 3 * 5
    assert counted is None or every.product_flops == counted


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="TensorFlow does not say what XLA counts")
@pytest.mark.parametrize(("stride", "padding"), [(1, "same"), (2, "valid"), (2, "same")])
def test_gradients_of_convolutions_as_xla_counts_them(stride, padding):
    import jax

    x, kernel = np.zeros((2, 8, 8, 3), "float32"), np.zeros((3, 3, 3, 5), "float32")

    def gradients(x, kernel, upstream):
        return jax.vjp(lambda x, k: ops.conv(x, k, stride, padding), x, kernel)[1](upstream)

    upstream = np.zeros(ops.conv(x, kernel, stride, padding).shape, "float32")
    text, counted = _text_and_flops(gradients, x, kernel, upstream)
    assert hlo.contents(text)[0].product_flops == counted > 0
