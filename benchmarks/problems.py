"""What `benchmarks.defaults` trains: data, networks and losses."""

from examples import datasets  # isort: skip  (before keras: it imports TensorFlow without its greetings)
import keras
import numpy as np
import sklearn.datasets
from keras import layers

import keras_ngd
from benchmarks import task_data, tasks, texts
from examples.networks import Positions, attention_block

SEED = 1
# How the outputs of a loss's network look, and its targets.
_SIGNS = ("hinge", "squared_hinge")
_ACTIVATIONS = {
    "mean_squared_logarithmic_error": "softplus",
    "poisson": "softplus",
    "kl_divergence": "softmax",
    "categorical_crossentropy": "softmax",
    "sparse_categorical_crossentropy": "softmax",
    "categorical_focal_crossentropy": "softmax",
    "binary_crossentropy": "sigmoid",
    "binary_focal_crossentropy": "sigmoid",
    "tversky": "sigmoid",
    "dice": "sigmoid",
}


def _hidden(width, size):
    """An input of `width` numbers and two hidden layers of `size`."""
    inputs = keras.Input((width,))
    x = layers.Dense(size, activation="relu")(inputs)
    return inputs, layers.Dense(size, activation="relu")(x)


def loss_problem(name):
    """The digits and a small network under one of Keras's losses."""
    images, labels = datasets.arrays("digits", "train")
    x, classes = images.reshape(len(images), -1), np.eye(10, dtype="float32")[labels]

    def make():
        inputs, hidden = _hidden(x.shape[1], 64)
        outputs = layers.Dense(10, activation=_ACTIVATIONS.get(name))(hidden)
        # Circle compares directions.
        return keras.Model(inputs, layers.UnitNormalization()(outputs) if name == "circle" else outputs)

    y, metric, loss = classes, "categorical_accuracy", name
    if name in _SIGNS:
        y = 2 * classes - 1
    elif name == "mean_absolute_percentage_error":
        y = classes + 0.5  # Shares of zero are none.
    elif name == "sparse_categorical_crossentropy":
        y, metric = labels, "sparse_categorical_accuracy"
    elif name == "circle":
        # Keras knows it by no short name.
        y, metric, loss = labels, None, keras.losses.Circle()
    return make, x, y, loss, metric, 64


def table_problem(name):
    """One of scikit-learn's tables: classes, or targets in the units they come in."""
    name, _, standardized = name.partition(" ")
    data = getattr(sklearn.datasets, f"load_{name}")()
    x, y = data.data.astype("float32"), data.target
    if standardized:
        x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    regression = name in ("diabetes", "linnerud")
    y = y.reshape(len(y), -1).astype("float32") if regression else y

    def make():
        inputs, hidden = _hidden(x.shape[1], 64)
        last = layers.Dense(y.shape[1]) if regression else layers.Dense(int(y.max()) + 1, activation="softmax")
        return keras.Model(inputs, last(hidden))

    loss = "mean_squared_error" if regression else "sparse_categorical_crossentropy"
    return make, x, y, loss, None if regression else "sparse_categorical_accuracy", 32


def _sources(characters):
    """The texts of the standard library's modules, each cut to so many characters."""
    return [text[:characters] for text in texts.sources() if len(text) >= characters]


def _embedded(length, alphabet, width):
    tokens = keras.Input((length,), dtype="int32")
    return tokens, Positions(length, width)(layers.Embedding(alphabet, width)(tokens))


def characters():
    """The next of 32 characters."""
    (codes,), alphabet = texts.codes(["".join(_sources(16_000)[:12])])
    count = (len(codes) - 1) // 32
    x, y = texts.windows(codes, 32 * np.arange(count), 32)

    def make():
        tokens, x = _embedded(32, alphabet, 48)
        for _ in range(2):
            x = attention_block(x, 48, 4, use_causal_mask=True)
        return keras.Model(tokens, layers.Dense(alphabet)(layers.LayerNormalization()(x)))

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return make, x, y, loss, "sparse_categorical_accuracy", 64


def files():
    """Which of eight files 64 characters are from; normalized after each part, with dropout, as Keras's example has it."""
    codes, alphabet = texts.codes(_sources(20_000)[:8])
    x = np.concatenate([code[: len(code) // 64 * 64].reshape(-1, 64) for code in codes])
    y = np.repeat(np.arange(len(codes)), [len(code) // 64 for code in codes])

    def make():
        tokens, x = _embedded(64, alphabet, 32)
        x = layers.LayerNormalization()(x + layers.Dropout(0.1)(layers.MultiHeadAttention(2, 32)(x, x)))
        dense = layers.Dense(32)(layers.Dense(32, activation="relu")(x))
        x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x + layers.Dropout(0.1)(dense)))
        x = layers.Dropout(0.1)(layers.Dense(20, activation="relu")(layers.Dropout(0.1)(x)))
        return keras.Model(tokens, layers.Dense(len(codes), activation="softmax")(x))

    return make, x, y, "sparse_categorical_crossentropy", "sparse_categorical_accuracy", 32


def network_problem(name):
    """One of the networks."""
    if name in ("characters", "files"):
        return {"characters": characters, "files": files}[name]()
    problem = task_data.problem(name)
    (x, y), loss = problem.training, problem.loss
    if name == "resnet":
        # The 512 images of the task are too few for anything to be learnt that tells others.
        x, y = datasets.arrays("shapes32", "train", scale=64.0)
        x = x - 2
    metric = "sparse_categorical_accuracy" if y.ndim == 1 else None
    return task_data.MODELS[name], x, y, loss, metric, tasks.TASKS[name]["batch_size"]


PROBLEMS = {"networks": network_problem, "losses": loss_problem, "tables": table_problem}


def run(kind, name, optimizer_name, epochs):
    """Trains a problem with an optimizer at its defaults; what JSON can hold of it."""
    make, x, y, loss, metric, batch = PROBLEMS[kind](name)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    split = len(x) * 4 // 5 // batch * batch or len(x) * 4 // 5
    keras.utils.set_random_seed(SEED)
    model = make()
    if hasattr(keras_ngd, optimizer_name):
        optimizer = getattr(keras_ngd, optimizer_name)()
        keras_ngd.capture(model, optimizer)
    else:
        optimizer = getattr(keras.optimizers, optimizer_name)()
    metrics = [] if metric is None else [metric]
    model.compile(optimizer=optimizer, loss=loss, metrics=metrics, jit_compile=False)
    model.fit(x[:split], y[:split], batch_size=batch, epochs=epochs, verbose=0)
    train = model.evaluate(x[:split], y[:split], batch_size=batch, verbose=0, return_dict=True)
    # Circle compares the examples of a batch: a short one is another loss.
    test = model.evaluate(x[split:], y[split:], batch_size=batch, verbose=0, return_dict=True)
    steps = int(keras.ops.convert_to_numpy(optimizer.iterations))
    chance = None
    if metric is not None:
        labels = y if y.ndim == 1 or metric.startswith("sparse") else np.argmax(y, -1)
        chance = float(np.bincount(np.ravel(labels[split:]).astype(int)).max() / labels[split:].size)

    def number(value):
        return float(f"{value:.5g}") if np.isfinite(value) else None

    return {
        "loss": number(train["loss"]),
        "test_loss": number(test["loss"]),
        "accuracy": None if metric is None else number(test[metric]),
        "chance": chance,
        "clipped": optimizer.clipped_steps / steps if hasattr(optimizer, "clipped_steps") else None,
    }
