"""How much of the models that people train is captured: a table in docs/layers.md.

Models have random weights; those of keras_hub and the last four are small ones of their architecture. Those of
`keras.applications` are all there, as they are for 1,000 classes. Normalisation layers follow the rule of the rest.

    python -m benchmarks.coverage
"""

import functools
import json
import pathlib

from absl import app, flags

from benchmarks import results

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "layers.md"
BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"

FLAGS = flags.FLAGS
# Not when imported for its table: other benchmarks' flags have the same names.
if __name__ == "__main__":
    flags.DEFINE_list("models", [], "Names of models to measure. Default: all.")
    flags.DEFINE_string("result", "coverage", "Name of the result.")

WORDS, TOKENS, WIDTH = 1000, 16, 64
_TRANSFORMER = {"vocabulary_size": WORDS, "num_layers": 2, "hidden_dim": WIDTH, "intermediate_dim": 4 * WIDTH}
BACKBONES = {
    "BertBackbone": {**_TRANSFORMER, "num_heads": 4, "max_sequence_length": TOKENS},
    "DistilBertBackbone": {**_TRANSFORMER, "num_heads": 4, "max_sequence_length": TOKENS},
    "GPT2Backbone": {**_TRANSFORMER, "num_heads": 4, "max_sequence_length": TOKENS},
    "LlamaBackbone": {**_TRANSFORMER, "num_query_heads": 4, "num_key_value_heads": 2},
    "GemmaBackbone": {**_TRANSFORMER, "num_query_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
    "ViTBackbone": {
        "image_shape": (32, 32, 3),
        "patch_size": (4, 4),
        "num_layers": 2,
        "num_heads": 4,
        "hidden_dim": WIDTH,
        "mlp_dim": 4 * WIDTH,
    },
}


def backbones():
    """Functions that make models of keras_hub, by name."""

    def maker(name):
        def make():
            import keras_hub

            return getattr(keras_hub.models, name)(**BACKBONES[name])

        return make

    return {f"keras_hub {name}": maker(name) for name in BACKBONES}


def constructors():
    """All functions of `keras.applications` that make models, by name."""
    import keras

    return {name: value for name, value in vars(keras.applications).items() if callable(value)}


def applications():
    """Functions that make the models of `keras.applications` as they are for 1,000 classes, by name."""
    return {f"applications {name}": functools.partial(make, weights=None) for name, make in constructors().items()}


def own():
    """Functions that make further models, by name."""
    import keras
    from keras import layers

    def generator():
        x = noise = keras.Input((64,))
        x = layers.Reshape((4, 4, 128))(layers.Dense(4 * 4 * 128, use_bias=False)(x))
        for filters in (64, 32):
            x = layers.Conv2DTranspose(filters, 4, strides=2, padding="same", use_bias=False)(x)
            x = layers.LeakyReLU()(layers.BatchNormalization()(x))
        return keras.Model(noise, layers.Conv2DTranspose(3, 4, strides=2, padding="same", activation="tanh")(x))

    def unet():
        x, skips = keras.Input((64, 64, 3)), []
        inputs = x
        for filters in (16, 32):
            x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
            skips.append(x)
            x = layers.MaxPooling2D()(x)
        x = layers.Conv2D(64, 3, padding="same", activation="relu")(x)
        for filters, skip in zip((32, 16), skips[::-1], strict=True):
            x = layers.Conv2DTranspose(filters, 2, strides=2)(x)
            x = layers.Conv2D(filters, 3, padding="same", activation="relu")(layers.Concatenate()([x, skip]))
        return keras.Model(inputs, layers.Conv2D(1, 1)(x))

    def tagger():
        tokens = keras.Input((TOKENS,), dtype="int32")
        x = layers.Embedding(WORDS, WIDTH, mask_zero=True)(tokens)
        x = layers.Bidirectional(layers.LSTM(WIDTH, return_sequences=True))(x)
        return keras.Model(tokens, layers.TimeDistributed(layers.Dense(20))(x))

    def translator():
        source, target = (keras.Input((TOKENS,), dtype="int32") for _ in range(2))
        _, state = layers.GRU(WIDTH, return_state=True)(layers.Embedding(WORDS, WIDTH)(source))
        x = layers.GRU(WIDTH, return_sequences=True)(layers.Embedding(WORDS, WIDTH)(target), initial_state=state)
        return keras.Model([source, target], layers.Dense(WORDS)(x))

    return {
        "DCGAN, its generator": generator,
        "U-Net with transposed convolutions": unet,
        "bidirectional LSTM that tags tokens": tagger,
        "GRU to GRU, sequence to sequence": translator,
    }


def measured(make):
    """What `capture` says of one model."""
    import keras

    import keras_ngd

    keras.backend.clear_session()
    # Factors in small blocks, since some have layers of 25,088 inputs; what is captured does not depend on it.
    report = keras_ngd.capture(make(), keras_ngd.THOR(split=16))
    left = {}
    for entry in report.layers:
        if not entry.captured and entry.parameters:
            key = f"{entry.kind}: {entry.reason}"
            left[key] = left.get(key, 0) + entry.parameters
    return {
        "parameters": report.parameters,
        "share": report.captured_share,
        "layers": [len(report.captured), len(report.layers)],
        "left": left,
    }


def table(payload):
    """The table in Markdown."""
    lines = [
        "| model | trainable parameters | captured | layers | most of the rest |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, found in payload["models"].items():
        rest = max(found["left"], key=found["left"].get, default="").split(":")[0]
        captured, layers = found["layers"]
        lines.append(
            f"| {name} | {found['parameters']:,} | {100 * found['share']:.2f}% | {captured} of {layers} | {rest} |"
        )
    return "\n".join(lines)


def main(_):
    makers = {**backbones(), **applications(), **own()}
    names = FLAGS.models or list(makers)
    payload = {"models": {}}
    for name in names:
        payload["models"][name] = measured(makers[name])
        print(json.dumps({name: payload["models"][name]}), flush=True)
    results.save(FLAGS.result, payload)
    if not FLAGS.models:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{table(payload)}\n{END}{after}")


if __name__ == "__main__":
    app.run(main)
