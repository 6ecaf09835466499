"""`EinsumDense`, and attention, which consists of it, against float64 computations from the definition."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers, ops

import keras_ngd
from keras_ngd.layers.einsum_dense import EinsumGeometry
from tf_tests.reference import kronecker
from tf_tests.reference.running import close, drawn
from tf_tests.small import array, captured, compiled, fit, kfac, weights

pytestmark = pytest.mark.neutral

BATCH = 5

# Equations, with the letters of the inputs, the outputs, the groups and the rows. `n` are the examples.
EQUATIONS = {
    "ni,io->no": ("i", "o", "", "n"),
    "nti,iho->ntho": ("i", "ho", "", "nt"),
    "nthi,hio->nto": ("hi", "o", "", "nt"),
    "nthi,iho->nto": ("ih", "o", "", "nt"),
    "ntgi,gio->ntgo": ("i", "o", "g", "nt"),
    "ngti,oig->ntog": ("i", "o", "g", "nt"),
    "nti,oti->no": ("ti", "o", "", "n"),
    "ntsi,oi->nsto": ("i", "o", "", "nts"),
}


def rows(tensor, letters, groups, examples_and_positions, last):
    """`[groups, examples, positions, dim]`, entry by entry."""
    sizes = dict(zip(letters, tensor.shape, strict=True))
    found = np.zeros(
        [int(np.prod([sizes[c] for c in part])) for part in (groups, "n", examples_and_positions[1:], last)]
    )
    order = groups + examples_and_positions + last
    for i, values in enumerate(itertools.product(*(range(sizes[c]) for c in order))):
        at = dict(zip(order, values, strict=True))
        found.reshape(-1)[i] = tensor[tuple(at[c] for c in letters)]
    return found


def sizes_of(equation, rng):
    return {letter: int(rng.integers(1, 4)) for letter in sorted(set(equation) - set(",->"))} | {"n": BATCH}


def case(equation, seed, bias=True):
    """A layer in a model of its own, a batch of it, and its rows, by the reference."""
    rng = np.random.default_rng(seed)
    (inputs, kernel), outputs = equation.split("->")[0].split(","), equation.split("->")[1]
    last_in, last_out, groups, positions = EQUATIONS[equation]
    sizes = sizes_of(equation, rng)
    shape = [[sizes[c] for c in letters] for letters in (inputs, kernel, outputs)]
    bias_axes = "".join(c for c in outputs if c in groups + last_out) if bias else None
    layer = layers.EinsumDense(
        equation, shape[2][1:], bias_axes=bias_axes, kernel_initializer=drawn, bias_initializer=drawn, name="layer"
    )
    model = keras.Sequential([keras.Input(shape[0][1:]), layer])
    x, y = rng.normal(size=shape[0]).astype("float32"), rng.normal(size=shape[2]).astype("float32")
    s = np.einsum(equation, x.astype("float64"), array(layer._kernel).astype("float64"))
    if bias:
        s = s + array(layer.bias).astype("float64")
    ds = 2 * (s - y) / s.size
    a = rows(x.astype("float64"), inputs, groups, positions, last_in)
    if bias:
        a = np.concatenate([a, np.ones_like(a[..., :1])], axis=-1)
    return model, layer, (x, y), (a, rows(ds, outputs, groups, positions, last_out))


def gradient_of(model, layer, batch):
    """`V` of a layer, from the momenta of a step of plain SGD."""
    optimizer = keras.optimizers.SGD(1.0, momentum=0.5)
    model.compile(optimizer=optimizer, loss="mse", jit_compile=keras.backend.backend() == "jax")
    model.train_on_batch(*batch)
    momenta = {
        v.path: -array(m) for v, m in zip(model.trainable_variables, optimizer.momentums, strict=True) if m is not None
    }
    geometry = layer.statistics.geometry
    return geometry, ops.convert_to_numpy(geometry.to_matrix([momenta[v.path] for v in layer.statistics.parameters()]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_factors_and_gradient(equation, bias):
    model, layer, batch, (a, ghat) = case(equation, 0, bias)
    keras_ngd.capture(model, kfac(losses_per_example=1))
    geometry, v = gradient_of(model, layer, batch)
    close(v, np.einsum("knti,knto->kio", a, ghat), 1e-5)
    for parameter, back in zip(
        layer.statistics.parameters(),
        geometry.from_matrix(geometry.to_matrix(layer.statistics.parameters())),
        strict=True,
    ):
        np.testing.assert_array_equal(ops.convert_to_numpy(back), array(parameter))
    close(array(layer.statistics.averages[0]), kronecker.input_factor(a), 1e-5)
    close(array(layer.statistics.averages[1]), kronecker.output_factor(ghat, BATCH), 1e-5)


@given(st.sampled_from(sorted(EQUATIONS)), st.integers(0, 100))
def test_rows(equation, seed):
    rng = np.random.default_rng(seed)
    (inputs, kernel), outputs = equation.split("->")[0].split(","), equation.split("->")[1]
    last_in, last_out, groups, positions = EQUATIONS[equation]
    sizes = sizes_of(equation, rng)
    geometry = EinsumGeometry(equation, tuple(sizes[c] for c in kernel))
    for letters, last, found in ((inputs, last_in, geometry.input_rows), (outputs, last_out, geometry.gradient_rows)):
        tensor = rng.normal(size=[sizes[c] for c in letters]).astype("float32")
        expected = rows(tensor, letters, groups, positions, last)
        np.testing.assert_array_equal(
            ops.convert_to_numpy(found(tensor)).reshape(expected.shape), expected.astype("float32")
        )


@pytest.mark.parametrize("equation", ["nti,iho->ntho", "ntgi,gio->ntgo", "nthi,hio->nto"])
def test_a_step(equation):
    """One step of KFAC with a damping relative to the factors, without clip."""
    model, layer, batch, (a, ghat) = case(equation, 1)
    before = [array(v) for v in (layer._kernel, layer.bias)]
    captured(
        model,
        keras_ngd.KFAC(
            1.0,
            damping_mode="relative",
            momentum=0.0,
            factor_interval=1,
            inverse_interval=1,
            fisher_scale=None,
            loss_clip=None,
            losses_per_example=1,
        ),
    )
    model.train_on_batch(*batch)
    geometry = layer.statistics.geometry
    old, new = (
        ops.convert_to_numpy(geometry.to_matrix(p)) for p in (before, [array(v) for v in (layer._kernel, layer.bias)])
    )
    factors = kronecker.input_factor(a), kronecker.output_factor(ghat, BATCH)
    v = np.einsum("knti,knto->kio", a, ghat)
    expected = np.stack(
        [kronecker.dense_preconditioned(*f, v, 1.0, "relative") for *f, v in zip(*factors, v, strict=True)]
    )
    close(old - new, expected, 1e-4)


def test_bias_of_some_outputs_is_no_row():
    """It follows the rule of the rest."""
    layer = layers.EinsumDense("nti,iho->ntho", (4, 2, 3), bias_axes="o", name="layer")
    model = keras.Sequential([keras.Input((4, 3)), layer])
    captured(model)
    assert [v.name for v in layer.statistics.parameters()] == ["kernel"]
    fit(model, np.ones((8, 4, 3), "float32"), np.ones((8, 4, 2, 3), "float32"))
    assert np.abs(array(layer.bias)).max() > 0


REFUSED = {
    "nti,io->no": "sums the input over 't' alone",
    "nti,ioz->nto": "sums the kernel over 'z' alone",
    "nii,io->no": "has the letter 'i' twice",
    "ni,nio->no": "does not have the examples as the first letter",
}


@pytest.mark.parametrize("equation", REFUSED)
def test_equations_that_cannot_be_sorted(equation):
    kernel = equation.split(",")[1].split("->")[0]
    with pytest.raises(ValueError, match=REFUSED[equation]):
        EinsumGeometry(equation, (2,) * len(kernel))


def test_the_report_says_why():
    inputs = keras.Input((4, 3))
    summed = layers.EinsumDense("nti,io->no", (2,), name="summed")
    model = keras.Model(inputs, layers.Dense(2)(summed(inputs)))
    report = keras_ngd.capture(model, kfac())
    assert "sums the input over 't' alone" in report.not_captured["summed"]


# Attention

TOKENS, WIDTH, HEADS = 4, 6, 2


def attention_of_dense(heads, key_heads=None):
    """Attention out of dense layers: `[q, k, v, o]` and a function of the tokens."""
    key_heads = heads if key_heads is None else key_heads
    size = WIDTH // heads
    q, o = layers.Dense(heads * size, name="query"), layers.Dense(WIDTH, name="attention_output")
    k, v = (layers.Dense(key_heads * size, name=name) for name in ("key", "value"))

    def call(x):
        split = [
            layers.Reshape((TOKENS, n, size))(dense(x)) for dense, n in ((q, heads), (k, key_heads), (v, key_heads))
        ]
        query, key, value = split
        key, value = (ops.repeat(t, heads // key_heads, axis=2) for t in (key, value))
        scores = ops.einsum("bthd,bshd->bhts", query, key) / size**0.5
        scores = scores + ops.convert_to_tensor(np.triu(np.full((TOKENS, TOKENS), -1e9, "float32"), 1))
        mixed = ops.einsum("bhts,bshd->bthd", ops.softmax(scores), value)
        return o(layers.Reshape((TOKENS, heads * size))(mixed))

    return [q, k, v, o], call


ATTENTIONS = {
    "multi-head": (lambda: layers.MultiHeadAttention(HEADS, WIDTH // HEADS, name="layer"), HEADS),
    "no flash": (lambda: layers.MultiHeadAttention(HEADS, WIDTH // HEADS, flash_attention=False, name="layer"), HEADS),
    "group-query": (lambda: layers.GroupQueryAttention(WIDTH // HEADS, HEADS, 1, name="layer"), 1),
}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_takes_the_steps_of_dense_layers(kind):
    make, key_heads = ATTENTIONS[kind]
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(16, TOKENS, WIDTH)).astype("float32") for _ in range(2))
    inputs = keras.Input((TOKENS, WIDTH))
    attention = make()
    model = keras.Model(inputs, attention(inputs, inputs, use_causal_mask=True))
    dense, call = attention_of_dense(HEADS, key_heads)
    other = keras.Model(inputs, call(inputs))
    named = {v.path.split("/", 1)[1]: v for v in attention.weights}
    assert len(named) == 8
    for layer in dense:
        for variable in layer.weights:
            variable.assign(array(named[f"{layer.name}/{variable.name}"]).reshape(variable.shape))
    optimizer = kfac()
    report = keras_ngd.capture(model, optimizer)
    assert report.captured == [f"layer/{name}" for name in ("query", "key", "value", "attention_output")]
    for each in (compiled(model, optimizer), captured(other)):
        fit(each, x, y)
    found = weights(model)
    for path, expected in weights(other).items():
        close(found[f"layer/{path}"].reshape(expected.shape), expected, 1e-4)
