"""THOR through `compile` and `fit`."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from keras_ngd.optimizers import trace_rule
from keras_ngd.statistics import statistics as statistics_module
from keras_ngd.statistics.factor_blocks import SplitStatistics
from tf_tests import paper
from tf_tests.small import array, captured, fit, kfac, mlp, regression, statistics, weights


def thor(**kwargs):
    """A `THOR` that looks at everything at every step."""
    return paper.THOR(**{"factor_interval": 1, "inverse_interval": 1, "split": 2, **kwargs})


def network():
    """Convolutions with and without groups and biases, and dense layers, the last of one output."""
    return keras.Sequential(
        [
            keras.Input((5, 5, 4)),
            layers.Conv2D(4, 3, padding="same", activation="tanh"),
            layers.Conv2D(4, 3, strides=2, groups=2, use_bias=False, activation="tanh"),
            layers.Flatten(),
            layers.Dense(3, activation="tanh"),
            layers.Dense(1),
        ]
    )


def images(examples=24):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 5, 5, 4)).astype("float32")
    return x, x[:, 2, 2, :1]


def inverses(model):
    return [array(v) for group in model.optimizer.layout.groups for v in group.curvature.variables]


def rule(model, name):
    return array(model.optimizer._rule)[trace_rule.STATE.index(name)]


@pytest.mark.neutral
def test_a_split_of_everything_is_kfac():
    trained = []
    for optimizer in (
        kfac(inverse_interval=2),
        thor(inverse_interval=2, split=None),
        thor(inverse_interval=2, split=999),
    ):
        keras.utils.set_random_seed(0)
        if isinstance(optimizer, keras_ngd.THOR):
            optimizer.omega = (0.0, 0.0)
        model = captured(network(), optimizer)
        fit(model, *images(), epochs=2)
        trained.append(weights(model))
    for other in trained[1:]:
        for found, (path, expected) in zip(other.values(), trained[0].items(), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7, err_msg=path)


@pytest.mark.neutral
@pytest.mark.parametrize("split", [1, 3, 4])
def test_trains(split):
    model = captured(network(), thor(split=split, learning_rate=0.03, damping=0.03))
    losses = fit(model, *images(), epochs=8).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    assert model.optimizer.skipped_steps == 0


@pytest.mark.neutral
def test_every_layer_has_its_own_split():
    names = {layer.name: layer for layer in network().layers}
    dense = [name for name in names if name.startswith("dense")]
    for split in (
        {dense[0]: 5, "conv2d*": 2, "*": 3},
        lambda layer: 5 if layer.name == dense[0] else 2 if layer.name.startswith("conv") else 3,
    ):
        keras.backend.clear_session()
        model, optimizer = network(), thor(split=split)
        keras_ngd.capture(model, optimizer)
        found = [la.statistics.split for la in model.layers if hasattr(la, "statistics")]
        assert found == [2, 2, 5, 3]
        again = keras_ngd.THOR.from_config(optimizer.get_config())
        captured(model, again)
        assert [la.statistics.split for la in model.layers if hasattr(la, "statistics")] == found
        fit(model, *images(8))


def test_unmatched_layers_of_a_dict_have_the_default():
    model = network()
    keras_ngd.capture(model, thor(split={"nothing": 5}))
    assert model.layers[0].statistics.split == 128


def test_the_report_counts_blocks():
    """9 x 4 inputs and a bias in blocks of 4, 4 outputs: averages and inverses."""
    report = keras_ngd.capture(network(), thor(split=4), skip="dense*")
    assert report.layers[0].shapes == ((9, 4, 4), (1, 1, 1), (1, 4, 4))
    assert report.layers[0].bytes == 2 * 4 * (9 * 16 + 1 + 16)
    whole = keras_ngd.capture(network(), thor(split=None), skip="dense*")
    assert whole.layers[0].bytes == 2 * 4 * (37 * 37 + 16)


@pytest.mark.parametrize("split", [None, 3])
def test_the_report_counts_what_is_stored(split):
    model, optimizer = network(), thor(split=split)
    report = keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    averages = [v for block in optimizer.layout.blocks for v in block.statistics.averages]
    stored = averages + [v for group in optimizer.layout.groups for v in group.curvature.variables]
    assert report.bytes == sum(array(v).nbytes for v in stored)


@pytest.mark.neutral
class TestTraceRule:
    def test_keeps_what_hardly_changed(self):
        model = captured(mlp(), thor(omega=(1e6, 0.0), factor_decay=0.0))
        x, y = regression()
        fit(model, x[:8], y[:8])
        first = inverses(model)
        assert set(rule(model, "decision")) == {trace_rule.UPDATE}
        fit(model, x, y)
        assert set(rule(model, "decision")) == {trace_rule.KEEP}
        assert all(np.array_equal(a, b) for a, b in zip(first, inverses(model), strict=True))
        assert np.all(rule(model, "change_rate") > 0)

    def test_follows_the_traces_of_the_averages(self):
        model = captured(mlp(), thor())
        fit(model, *regression())
        expected = []
        for layer in (model.get_layer("hidden"), model.get_layer("outputs")):
            averages = [array(v) for v in layer.statistics.averages]
            parts = layer.statistics.input_parts
            traces = [
                sum(np.trace(p, axis1=2, axis2=3).sum() for p in side) for side in (averages[:parts], averages[parts:])
            ]
            expected.append(traces[0] * traces[1])
        np.testing.assert_allclose(rule(model, "trace"), expected, rtol=1e-5)

    def test_full_damping_counts(self):
        found = []
        for trace_damping in ("none", "full"):
            keras.utils.set_random_seed(0)
            model = captured(mlp(), thor(trace_damping=trace_damping, damping=0.5))
            x, y = regression()
            fit(model, x[:8], y[:8])
            found.append(rule(model, "trace"))
        np.testing.assert_allclose(found[1] - found[0], 0.5 * 5 * 4, rtol=1e-5)

    def test_a_stopped_layer_is_left_alone(self):
        """Its gate closes for good: averages and inverses stay to the last bit, while its kernel trains on."""
        model = captured(mlp(), thor(omega=(0.9, 0.9)))
        x, y = regression()
        fit(model, x[:16], y[:16])
        assert set(rule(model, "stopped")) == {1.0}
        before, state = statistics(model), inverses(model)
        kernel, updates = array(model.get_layer("hidden").kernel), model.optimizer.factor_updates
        fit(model, x, y, epochs=3)
        after = statistics(model)
        gates = [value for path, value in after.items() if path.endswith("gate")]
        assert gates == [0.0, 0.0]
        for path in before:
            if "blocks" in path:
                np.testing.assert_array_equal(after[path], before[path], err_msg=path)
        assert all(np.array_equal(a, b) for a, b in zip(state, inverses(model), strict=True))
        assert not np.array_equal(array(model.get_layer("hidden").kernel), kernel)
        assert model.optimizer.factor_updates == updates
        assert model.optimizer.skipped_statistics == 0

    def test_the_statistics_of_a_stopped_layer_are_not_computed(self, monkeypatch):
        """Counted where they run, inside the compiled step."""
        observe, counts = SplitStatistics.observe, {"conv": 0, "dense": 0}

        def counted(self, rows, x, ds, weights, controls, dtype):
            kind = "conv" if hasattr(rows, "kernel") else "dense"

            def count(_):
                counts[kind] += 1
                return np.float32(0)

            if keras.backend.backend() == "jax":
                import jax

                jax.debug.callback(lambda t: count(t) and None, ds)
            else:
                import tensorflow as tf

                zero = tf.numpy_function(count, [ds], tf.float32)
                ds = ds + tf.ensure_shape(zero, ())
            return observe(self, rows, x, ds, weights, controls, dtype)

        monkeypatch.setattr(SplitStatistics, "observe", counted)
        monkeypatch.setattr(statistics_module, "_EMISSIONS", {})
        model = keras.Sequential(
            [keras.Input((4, 3)), layers.Conv1D(2, 2, activation="tanh"), layers.Flatten(), layers.Dense(1)]
        )
        optimizer = thor()
        captured(model, optimizer)
        x = np.random.default_rng(0).normal(size=(32, 4, 3)).astype("float32")
        y = x[:, 0, :1]
        fit(model, x, y)
        assert counts == {"conv": 4, "dense": 4}
        stopped = array(optimizer._rule)
        position = [block.layer.split("/")[-1].startswith("conv") for block in optimizer.layout.blocks].index(True)
        stopped[trace_rule.STATE.index("stopped"), position] = 1
        optimizer._rule.assign(stopped)
        fit(model, x, y, epochs=2)
        # The gate that was open when the layer stopped lets one more batch through.
        assert counts == {"conv": 5, "dense": 12}

    def test_stopping_takes_patience(self):
        model = captured(mlp(), thor(omega=(0.9, 0.9), stop_patience=3))
        x, y = regression()
        fit(model, x[:24], y[:24])
        assert set(rule(model, "stopped")) == {0.0}
        assert set(rule(model, "stop_hits")) == {2.0}
        fit(model, x[24:], y[24:])
        assert set(rule(model, "stopped")) == {1.0}

    def test_the_report_has_every_layer(self):
        optimizer = thor()
        assert optimizer.trace_report() == {}
        model = captured(mlp(), optimizer)
        fit(model, *regression())
        report = optimizer.trace_report()
        assert list(report) == [block.layer for block in optimizer.layout.blocks]
        for entry in report.values():
            assert entry["decision"] in ("keep", "update", "stop")
            assert entry["trace"] > 0
            assert np.isfinite(entry["change_rate"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": 0}, "`split` must be an int of at least 1.*split=0"),
        ({"split": -3}, "split=-3"),
        ({"split": 2.5}, "split=2.5"),
        ({"split": True}, "split=True"),
        ({"split": "large"}, "'large'"),
        ({"split": {"dense": 0}}, "split\\['dense'\\]"),
        ({"omega": (0.001, 0.01)}, "omega2 <= omega1.*omega=\\(0.001, 0.01\\)"),
        ({"omega": 0.01}, "two numbers"),
        ({"omega": (0.01, -1)}, "two numbers"),
        ({"trace_damping": "half"}, "`trace_damping`"),
        ({"stop_patience": 0}, "`stop_patience`"),
        ({"inverse": "eigen"}, "for THOR"),
        ({"damping_mode": "exact"}, "damping_mode"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        paper.THOR(**arguments)


def test_a_function_that_gives_no_split():
    with pytest.raises(ValueError, match="split of layer 'hidden'.*Received.*=0"):
        keras_ngd.capture(mlp(), thor(split=lambda layer: 0))


def test_captured_for_another_split():
    model = mlp()
    keras_ngd.capture(model, thor(split=2))
    model.compile(optimizer=thor(split=3), loss="mse")
    with pytest.raises(ValueError, match="captured for another optimizer"):
        fit(model, *regression())


class TestAutomaticSplit:
    def test_is_measured_at_capture(self):
        optimizer = thor(split="auto")
        model = network()
        keras_ngd.capture(model, optimizer, data=images()[0])
        assert optimizer.split in (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
        assert optimizer.get_config()["split"] == optimizer.split
        assert model.layers[0].statistics.split == optimizer.split

    def test_needs_data(self):
        with pytest.raises(ValueError, match="data=x"):
            keras_ngd.capture(mlp(), thor(split="auto"))
