"""What SNGD, SKFAC and HyLo share: batches' sizes, intervals, batches that are not finite, and how misuse is told."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests import paper, small
from tf_tests.small import array, assert_close, captured, compiled, fit, mlp, regression, statistics, weights

METHODS = {
    "SNGD": lambda **kwargs: paper.SNGD(**{"batch_size": 8, **kwargs}),
    "SKFAC": lambda **kwargs: paper.SKFAC(**{"batch_size": 8, "interval": 1, **kwargs}),
    "HyLo": lambda **kwargs: paper.HyLo(**{"batch_size": 8, "interval": 1, "rank": 3, "steps_per_epoch": 4, **kwargs}),
}
ONE_ROW_EACH = ("SKFAC", "HyLo")


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def wide():
    """Layers of which SKFAC keeps the rows of one side and the factor of the other."""
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(20, activation="tanh", name="hidden"), layers.Dense(4, name="outputs")]
    )


def state(model):
    """Copies of what was recorded and of what was made of it."""
    blocks = model.optimizer.layout.blocks
    recorded = [array(v) for block in blocks for v in block.statistics.averages]
    return recorded, [array(v) for group in model.optimizer.layout.groups for v in group.curvature.variables]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_batch_that_is_not_finite(method):
    """Rows and inverses stay as they are, and the next batch is recorded in its place; so if it is the first."""
    history = {"history": 2} if method is METHODS["SKFAC"] else {}
    model = captured(wide(), method(interval=2, learning_rate=0.02, damping=0.1, **history))
    x, y = regression(64)
    x[3, 1], y[8 * 3 + 2, 0] = np.nan, np.inf
    losses, changed, opened = [], [], []
    for i in range(8):
        batch = slice(8 * i, 8 * i + 8)
        if i:
            opened.append(float(array(model.layers[0].statistics.gate)) > 0)
            before = state(model)
        losses.append(model.train_on_batch(x[batch], y[batch]))
        if i:
            changed.append([not same(old, new) for old, new in zip(before, state(model), strict=True)])
    # Step 0 fails, 1 stands in for it; 3 fails, and 4 stands in.
    assert opened == [True, False, True, True, False, True, False]
    assert changed == [[True] * 2, [False] * 2, [False] * 2, [True] * 2, [False] * 2, [True] * 2, [False] * 2]
    optimizer = model.optimizer
    assert optimizer.skipped_statistics == optimizer.skipped_steps == 2
    assert optimizer.factor_updates == 3
    for path, value in {**weights(model), **statistics(model)}.items():
        assert np.isfinite(value).all(), path
    assert fit(model, *regression(64), epochs=3).history["loss"][-1] < losses[1]


def test_a_static_loss_scale_changes_no_step(method):
    """Nor what HyLo's switch decides: it is KIS from the third epoch."""
    trained = []
    for scale in (None, 1024.0):
        keras.utils.set_random_seed(0)
        settling = {"eta": 1e9} if method is METHODS["HyLo"] else {}
        model = captured(wide(), method(loss_scale_factor=scale, damping=0.1, **settling))
        fit(model, *regression(), epochs=3)
        trained.append(weights(model))
    assert_close(*trained, tolerance=1e-4)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SNGD", {}),
        ("SKFAC", {}),
        ("SKFAC", {"history": 3}),
        ("SKFAC", {"convolution": "subsample", "positions": 2}),
        ("HyLo", {}),
        ("HyLo", {"mode": "kis", "rank": 0.25}),
    ],
)
def test_the_report_counts_what_is_stored(name, arguments):
    model = keras.Sequential(
        [
            keras.Input((5, 5, 4)),
            layers.Conv2D(4, 3, groups=2),
            layers.Conv2D(4, 3, groups=2, use_bias=False, padding="same"),
            layers.Flatten(),
            layers.Dense(20),
            layers.Dense(4),
        ]
    )
    optimizer = METHODS[name](**arguments)
    report = keras_ngd.capture(model, optimizer)
    compiled(model, optimizer)
    optimizer.build(model.trainable_variables)
    stored = [value for part in state(model) for value in part]
    stored += [array(v) for v in optimizer.variables if v.path.endswith("gradient_sum")]
    assert report.bytes == sum(value.nbytes for value in stored)
    assert all(entry.shapes for entry in report.layers)


# How large a batch is


class Batches(keras.utils.PyDataset):
    def __init__(self, *batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def dataset(*arrays, batch_size=6):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0]).batch(batch_size)


X, Y = regression(32)
DATA = {
    "array": (X[:6], 6, None),
    "arrays": ([X[:6], Y[:6]], 6, None),
    "dataset": (dataset(X, Y), 6, 6),
    "dataset of inputs": (dataset(X), 6, 6),
    "dataset of two inputs": (dataset(X, X).map(lambda a, b: ((a, b), a)), 6, 6),
    "dataset of names": (dataset(X, Y).map(lambda a, b: ({"inputs": a}, b)), 6, 6),
    "endless dataset": (dataset(X, Y).repeat(), 6, None),
    "PyDataset": (Batches((X[:6], Y[:6]), (X[6:10], Y[6:10])), 6, 2),
}


@pytest.mark.parametrize("kind", DATA)
def test_sizes_are_taken_from_the_data(kind, method):
    data, batch_size, steps = DATA[kind]
    optimizer = method(batch_size=None, **({"steps_per_epoch": None} if method is METHODS["HyLo"] else {}))
    model = mlp()
    keras_ngd.capture(model, optimizer, data=data)
    assert optimizer.capacity == model.layers[1].statistics.batch_size == batch_size
    assert optimizer.get_config()["batch_size"] is None
    if method is METHODS["HyLo"]:
        assert optimizer.steps_per_epoch == optimizer.get_config()["steps_per_epoch"] == steps


def fixed(batch_size):
    """A model whose batch dimension is known."""
    inputs = keras.Input((4,), batch_size=batch_size)
    return keras.Model(inputs, layers.Dense(4, name="outputs")(inputs), name="fixed")


def test_the_batch_size_of_the_model_is_the_last_resort(method):
    for given, data, expected in ((None, None, 16), (None, X[:6], 6), (12, X[:6], 12)):
        optimizer = method(batch_size=given)
        keras_ngd.capture(fixed(16), optimizer, data=data)
        assert optimizer.capacity == expected


def test_a_batch_larger_than_there_is_room_for(method):
    """Where the model or the trace knows its size."""
    for model in (fixed(16), mlp()):
        with pytest.raises(
            ValueError, match="Layer 'outputs' sees 16 examples in a batch, but was captured for 8.*`batch_size`.*skip="
        ):
            fit(captured(model, method()), *regression(), batch_size=16)


def test_a_batch_larger_than_there_is_room_for_after_others(method):
    """TensorFlow's traces no longer know sizes once these change."""
    model = captured(mlp(), method())
    x, y = regression()
    fit(model, x[:8], y[:8])
    kind, message = ValueError, "sees 16 examples in a batch, but was captured for 8"
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        kind, message = tf.errors.InvalidArgumentError, "A batch has more examples than the optimizer.*`batch_size`, 8"
    with pytest.raises(kind, match=message):
        fit(model, x, y, batch_size=16)


# Misuse


# JAX without jit is very slow.
@pytest.mark.parametrize("jit_compile", [True] if small.JIT else [True, False])
@pytest.mark.parametrize("name", ONE_ROW_EACH)
def test_a_layer_called_twice(name, jit_compile):
    def model():
        inputs, layer = keras.Input((4,)), layers.Dense(4, name="twice")
        return keras.Model(inputs, layers.Dense(4, name="once")(layer(layer(inputs))))

    message = f"Layer 'twice' is called several times in a training step, and what {name} records .*skip=..twice"
    with pytest.raises(ValueError, match=message):
        fit(captured(model(), METHODS[name](), jit_compile=jit_compile), *regression())
    if jit_compile == small.JIT:
        without = captured(model(), METHODS[name](), skip="twice")
        fit(without, *regression(16))
        assert without.optimizer.factor_updates == 2


@pytest.mark.parametrize(
    ("argument", "values", "message"),
    [
        ("damping", [0, 0.0, -1.0, float("nan")], "`damping` must be a positive float"),
        ("interval", [0, -1, 1.5, True, None], "`interval` must be an int of at least 1"),
        ("batch_size", [0, -8, 8.0, True, "8"], "`batch_size` must be an int of at least 1"),
        ("losses_per_example", [0, -1, float("nan"), None], "`losses_per_example` must be a number above 0"),
        ("kl_clip", [0, -1.0, float("nan")], "`kl_clip` must be a positive float or None"),
        ("factor_interval", [1], "has one `interval`, not `factor_interval`"),
        ("inverse_interval", [1], "has one `interval`, not `inverse_interval`"),
        ("gradient_accumulation_steps", [2], "does not support `gradient_accumulation_steps`"),
    ],
)
def test_argument_out_of_range(argument, values, message, method):
    for value in values:
        with pytest.raises(ValueError, match=message) as caught:
            method(**{argument: value})
        if "interval`, not" not in message:
            assert f"{value}" in str(caught.value).split("Received:")[1]


def test_captured_for_another_batch_size(method):
    model = mlp()
    keras_ngd.capture(model, method(batch_size=16))
    with pytest.raises(ValueError, match="Layer 'hidden' was captured for another optimizer.*'batch_size': 16"):
        fit(compiled(model, method()), *regression())


def test_statistics_come_back():
    for make in METHODS.values():
        made = make().make_statistics(None)
        again = type(made).from_config(json.loads(json.dumps(made.get_config())))
        assert again.spec == made.spec


def test_capture_for_one_method_after_the_other():
    model = mlp()
    for make in (*METHODS.values(), small.kfac):
        optimizer = make()
        keras_ngd.capture(model, optimizer)
        optimizer.build(model.trainable_variables)
        assert {block.statistics.spec[0] for block in optimizer.layout.blocks} == {
            optimizer.make_statistics(None).spec[0]
        }
    keras_ngd.release(model)
    assert not statistics(model)
