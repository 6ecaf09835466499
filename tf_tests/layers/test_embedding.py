"""Embeddings against float64 computations from the definition, and against dense layers with one-hot inputs."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers, ops

import keras_ngd
from keras_ngd.layers.embedding import LookupGeometry, ProjectionGeometry
from tf_tests.reference import kronecker
from tf_tests.reference.running import close
from tf_tests.small import array, captured, compiled, fit, kfac, weights

BATCH, TOKENS, WORDS, WIDTH = 16, 5, 7, 3


def data(words=WORDS, seed=0, padded=False):
    rng = np.random.default_rng(seed)
    x = rng.integers(1, words, size=(BATCH, TOKENS)).astype("int32")
    if padded:
        x[:, 3:] *= rng.integers(0, 2, size=(BATCH, TOKENS - 3)).astype("int32")
    return x, rng.normal(size=(BATCH, TOKENS, 2)).astype("float32")


def alone(**kwargs):
    """A model of an embedding alone, whose outputs are what was looked up."""
    layer = layers.Embedding(WORDS, WIDTH, name="layer", **kwargs)
    return keras.Sequential([keras.Input((TOKENS,), dtype="int32"), layer]), layer


def by_hand(table, x, y, mask=None):
    """`A`'s diagonal, `G` and `V` of the mean squared error of what is looked up, entry by entry."""
    counts, g, v, seen = np.zeros(len(table)), np.zeros((table.shape[1],) * 2), np.zeros(table.shape), 0
    for example, targets in zip(x, y, strict=True):
        for token, target in zip(example, targets, strict=True):
            counted = mask is None or token != 0
            ds = 2 * (table[token].astype("float64") - target) / y.size
            if mask is not None:
                ds = ds * counted * y[..., 0].size / (x != 0).sum()
            counts[token] += counted
            seen += counted
            g += BATCH * np.outer(ds, ds)
            v[token] += ds
    return counts / seen, g, v


@pytest.mark.parametrize("mask_zero", [False, True])
def test_factors(mask_zero):
    model, layer = alone(mask_zero=mask_zero)
    x, _ = data(padded=True)
    y = np.random.default_rng(1).normal(size=(BATCH, TOKENS, WIDTH)).astype("float32")
    counts, g, v = by_hand(array(layer._embeddings), x, y, x != 0 if mask_zero else None)
    keras_ngd.capture(model, kfac(losses_per_example=1))
    optimizer = keras.optimizers.SGD(1.0, momentum=0.5)
    compiled(model, optimizer).train_on_batch(x, y)
    [momentum] = [m for m in optimizer.momentums if m is not None]
    close(-array(momentum), v, 1e-5)
    close(array(layer.statistics.averages[0])[0, :, 0, 0], counts, 1e-5)
    close(array(layer.statistics.averages[1])[0, 0], g, 1e-5)


UNCLIPPED = {"momentum": 0.0, "factor_interval": 1, "inverse_interval": 1, "fisher_scale": None, "loss_clip": None}


@pytest.mark.parametrize("mode", ["relative", "pi", "factor"])
def test_a_step(mode):
    model, layer = alone()
    x, _ = data()
    y = np.random.default_rng(1).normal(size=(BATCH, TOKENS, WIDTH)).astype("float32")
    table = array(layer._embeddings)
    counts, g, v = by_hand(table, x, y)
    captured(model, keras_ngd.KFAC(1.0, 0.5, damping_mode=mode, losses_per_example=1, **UNCLIPPED)).train_on_batch(x, y)
    expected = kronecker.dense_preconditioned(np.diag(counts), g, v, 0.5, mode)
    close(table - array(layer._embeddings), expected, 1e-4)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_counts(examples, tokens, words, seed):
    rng = np.random.default_rng(seed)
    x, mask = rng.integers(0, words, size=(examples, tokens)), rng.integers(0, 2, size=(examples, tokens))
    geometry = LookupGeometry(words, 2)
    for counted in (np.ones_like(mask), mask):
        [found] = geometry.input_blocks(x.astype("float32"), ((words, 1),), counted.astype("float32"))
        expected = [counted[x == word].sum() / max(counted.sum(), 1) for word in range(words)]
        np.testing.assert_allclose(ops.convert_to_numpy(found)[0, :, 0, 0], expected, rtol=1e-6)


def test_it_takes_the_steps_of_a_dense_layer_with_one_hot_inputs():
    x, y = data()
    tokens, one_hot = keras.Input((TOKENS,), dtype="int32"), keras.Input((TOKENS, WORDS))
    first, second = layers.Embedding(WORDS, WIDTH), layers.Dense(WIDTH, use_bias=False)
    models = [
        keras.Model(inputs, layers.Dense(2)(ops.tanh(layer(inputs))))
        for inputs, layer in ((tokens, first), (one_hot, second))
    ]
    models[1].set_weights(models[0].get_weights())
    inputs = (x, np.eye(WORDS, dtype="float32")[x])
    for model, batch in zip(models, inputs, strict=True):
        fit(captured(model), batch, y, epochs=2)
    for found, expected in zip(weights(models[0]).values(), weights(models[1]).values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="JAX has no sparse gradients")
def test_sparse_gradients_arrive_as_they_are():
    """They become dense where they are preconditioned, not before."""
    import tensorflow as tf

    model, _ = alone()
    keras_ngd.capture(model, kfac())
    x, _ = data()
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    assert isinstance(gradients[0], tf.IndexedSlices)
    optimizer = kfac()
    keras_ngd.capture(model, optimizer)
    with tf.GradientTape() as tape:
        loss = optimizer.scale_loss(tf.reduce_mean(model(x) ** 2))
    optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)


# Tables that are used both ways


def language_model(tied, mask_zero=False, soft_cap=None):
    """Logits of each token from what was looked up of it."""
    layer = layers.ReversibleEmbedding(
        WORDS, WIDTH, tie_weights=tied, mask_zero=mask_zero, logit_soft_cap=soft_cap, name="layer"
    )
    tokens = keras.Input((TOKENS,), dtype="int32")
    return keras.Model(tokens, layer(layer(tokens), reverse=True)), layer


def both_uses(table, reverse, x, y):
    """Rows of the lookups and of the projection, by hand, for a squared error of the logits: `a`s, `g`s."""
    h = table[x].astype("float64")
    ds = 2 * (h @ reverse.astype("float64").T - y) / y.size
    return (np.eye(len(table))[x], ds @ reverse.astype("float64")), (ds, h)


@pytest.mark.parametrize("tied", [True, False])
def test_factors_of_both_uses(tied):
    model, layer = language_model(tied)
    x, _ = data()
    y = np.random.default_rng(1).normal(size=(BATCH, TOKENS, WORDS)).astype("float32")
    table = array(layer._embeddings)
    reverse = table if tied else array(layer.reverse_embeddings).T
    (one_hot, g), (ds, h) = both_uses(table, reverse, x, y)
    captured(model, keras_ngd.KFAC(1.0, damping_mode="relative", losses_per_example=1, **UNCLIPPED)).train_on_batch(
        x, y
    )

    lookups = np.diag(one_hot.sum(axis=(0, 1)) / x.size), BATCH * np.einsum("nti,ntj->ij", g, g)
    trace = (ds**2).sum()
    diagonal = np.diag((ds**2).sum(axis=(0, 1)) / trace)
    projection = diagonal, BATCH * trace * np.einsum("nti,ntj->ij", h, h) / x.size
    v = np.einsum("nti,nto->io", one_hot, g), np.einsum("nti,nto->io", ds, h)
    if tied:
        # As calls of a layer: the mean of the first, the sum of the second.
        a, g = (lookups[0] + projection[0]) / 2, lookups[1] + projection[1]
        np.testing.assert_allclose(np.trace(a) * np.trace(g), np.trace(lookups[1]) + np.trace(projection[1]))
        close(
            table - array(layer._embeddings), kronecker.dense_preconditioned(a, g, v[0] + v[1], 1.0, "relative"), 1e-4
        )
        return
    for before, now, factors, gradient in (
        (table, array(layer._embeddings), lookups, v[0]),
        (reverse, array(layer.reverse_embeddings).T, projection, v[1]),
    ):
        close(before - now, kronecker.dense_preconditioned(*factors, gradient, 1.0, "relative"), 1e-4)


def test_projection_is_the_diagonal_of_the_dense_layer_that_it_is():
    """The trace of the block, and its second factor up to the scale, are those of `Dense` without bias."""
    rng = np.random.default_rng(0)
    x, ds = rng.normal(size=(4, 2, WIDTH)).astype("float32"), rng.normal(size=(4, 2, WORDS)).astype("float32")
    geometry = ProjectionGeometry(WORDS, WIDTH)
    [a], [g] = geometry.factor_blocks(x, ds, geometry.partitions(None))
    second = np.einsum("nti,ntj->ij", x, x) / 8
    assert ops.convert_to_numpy(a).sum() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(
        np.einsum("v,ij->vij", ops.convert_to_numpy(a).reshape(-1), ops.convert_to_numpy(g)[0, 0]),
        np.einsum("v,ij->vij", (ds**2).sum(axis=(0, 1)), second),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_masks_and_caps_stay(tied):
    model, layer = language_model(tied, mask_zero=True, soft_cap=2.0)
    x, _ = data(padded=True)
    plain, mask = ops.convert_to_numpy(model(x)), keras.src.backend.get_keras_mask(layer(x))
    report = keras_ngd.capture(model, kfac())
    assert report.captured == ["layer"]
    np.testing.assert_allclose(ops.convert_to_numpy(model(x)), plain, rtol=1e-5)
    np.testing.assert_array_equal(keras.src.backend.get_keras_mask(layer(x)), mask)
    keras_ngd.release(model)
    assert type(layer) is layers.ReversibleEmbedding
    np.testing.assert_allclose(ops.convert_to_numpy(model(x)), plain, rtol=1e-5)
