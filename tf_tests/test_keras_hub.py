"""Backbones of keras_hub, tiny ones with random weights: how much of them is captured, and a step of each."""

import keras
import numpy as np
import pytest

import keras_ngd
from tf_tests.small import array, assert_same, compiled, fit, kfac, weights

keras_hub = pytest.importorskip("keras_hub")
pytestmark = [pytest.mark.slow, pytest.mark.neutral]

TOKENS, WORDS = 6, 500
OF_TOKENS = {"vocabulary_size": WORDS, "num_layers": 1, "hidden_dim": 32, "intermediate_dim": 64}
BACKBONES = {
    "BertBackbone": {**OF_TOKENS, "num_heads": 2, "max_sequence_length": TOKENS},
    "DistilBertBackbone": {**OF_TOKENS, "num_heads": 2, "max_sequence_length": TOKENS},
    "GPT2Backbone": {**OF_TOKENS, "num_heads": 2, "max_sequence_length": TOKENS},
    "LlamaBackbone": {**OF_TOKENS, "num_query_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "GemmaBackbone": {**OF_TOKENS, "num_query_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    "ViTBackbone": {
        "image_shape": (8, 8, 3),
        "patch_size": (4, 4),
        "num_layers": 1,
        "num_heads": 2,
        "hidden_dim": 32,
        "mlp_dim": 64,
    },
}


def made(name):
    """A backbone, and a batch of its inputs."""
    keras.utils.set_random_seed(0)
    dropout = {} if name in ("LlamaBackbone", "GemmaBackbone", "ViTBackbone") else {"dropout": 0.0}
    backbone = getattr(keras_hub.models, name)(**BACKBONES[name], **dropout)
    rng = np.random.default_rng(0)
    if name == "ViTBackbone":
        return backbone, rng.normal(size=(8, 8, 8, 3)).astype("float32")
    ids = {
        "token_ids": rng.integers(1, WORDS, size=(8, TOKENS)),
        "segment_ids": np.zeros((8, TOKENS)),
        "padding_mask": np.ones((8, TOKENS)),
    }
    names = [tensor.name for tensor in keras.tree.flatten(backbone.input)]
    return backbone, {key: value.astype("int32") for key, value in ids.items() if key in names}


def with_head(backbone):
    """A model on it whose outputs are of three numbers for each example."""
    results = backbone.output
    results = results["sequence_output"] if isinstance(results, dict) else results
    pooled = keras.layers.GlobalAveragePooling1D()(results)
    return keras.Model(backbone.input, keras.layers.Dense(3, name="head")(pooled))


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name):
    backbone, x = made(name)
    model = with_head(backbone)
    plain = model.predict(x, verbose=0)
    optimizer = kfac()
    report = keras_ngd.capture(model, optimizer, include=lambda layer: True)
    assert report.captured_share >= 0.99, report
    np.testing.assert_allclose(model.predict(x, verbose=0), plain, rtol=1e-4, atol=1e-5)
    before = weights(model)
    fit(compiled(model, optimizer), x, np.random.default_rng(1).normal(size=(8, 3)).astype("float32"))
    assert optimizer.factor_updates == 1
    assert optimizer.skipped_statistics == optimizer.skipped_steps == 0
    after = weights(model)
    assert all(np.isfinite(value).all() for value in after.values())
    assert sum(np.any(after[path] != value) for path, value in before.items()) > len(before) / 2
    keras_ngd.release(model)
    assert not any("statistics" in v.path for v in model.weights)


def test_a_language_model_with_tied_weights_resumes(tmp_path):
    """By way of its weights: keras_hub makes its layers anew, plain ones."""
    backbone, x = made("GPT2Backbone")
    y = x["token_ids"]

    def language_model(backbone):
        table = backbone.token_embedding
        model = keras.Model(backbone.input, table(backbone.output, reverse=True))
        optimizer = kfac()
        report = keras_ngd.capture(model, optimizer)
        assert table.path in report.captured
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return compiled(model, optimizer, loss=loss)

    model = language_model(backbone)
    fit(model, x, y)
    assert np.abs(array(backbone.token_embedding.statistics.averages[0])).max() > 0
    model.save_weights(tmp_path / "model.weights.h5")
    resumed = language_model(made("GPT2Backbone")[0])
    resumed.optimizer.build(resumed.trainable_variables)
    resumed.load_weights(tmp_path / "model.weights.h5")
    for each in (model, resumed):
        fit(each, x, y)
    assert_same(weights(resumed), weights(model))
