"""HyLo where it must be SNGD, its modes' samples and interpolations in training, and its arguments."""

import functools

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests import paper, small
from tf_tests.optimizers.test_sngd import BATCH, Steps, gradient, preconditioned
from tf_tests.reference import low_rank
from tf_tests.reference.running import close, drawn, error
from tf_tests.small import array, assert_close, assert_same, captured, fit, mlp, regression, statistics, weights

pytestmark = pytest.mark.neutral


def squares(s):
    """An activation; Keras computes its own in float32 on JAX."""
    return s * s / 2


def network():
    return keras.Sequential(
        [
            keras.Input((4, 2)),
            layers.Conv1D(4, 2, activation=squares, kernel_initializer=drawn, bias_initializer=drawn),
            layers.Flatten(),
            layers.Dense(4, kernel_initializer=drawn, bias_initializer=drawn),
        ]
    )


def signals(repeated=1):
    """Three batches of eight, or of fewer that are repeated in each."""
    x = np.random.default_rng(0).normal(size=(3, 8 // repeated, 4, 2))
    x = np.tile(x, (1, repeated, 1, 1)).reshape(24, 4, 2)
    return x, np.concatenate([x[:, 0], np.sin(x[:, 1])], axis=1)


ARGUMENTS = {"learning_rate": 2.0**-4, "damping": 2.0**-4, "kl_clip": None, "batch_size": 8}


@functools.cache
def sngd_weights(repeated=1):
    keras.utils.set_random_seed(0)
    model = captured(network(), paper.SNGD(**ARGUMENTS))
    fit(model, *signals(repeated))
    return weights(model)


@pytest.mark.parametrize(
    ("arguments", "repeated"),
    [
        pytest.param({"mode": "kid", "rank": 1.0}, 1, id="KID of all rows"),
        pytest.param({"mode": "kid", "rank": 5}, 2, id="KID of more than differ"),
        pytest.param(
            {"mode": "kid", "rank": 4, "residual": False}, 2, id="KID without residual", marks=pytest.mark.slow
        ),
        pytest.param({"mode": "kis", "rank": 8}, 1, id="KIS of all rows"),
        pytest.param(
            {"mode": "kis", "rank": 1.0, "sampling": "paper", "power": 1.0},
            1,
            id="the paper's KIS of all rows",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_is_sngd(arguments, repeated, float64):
    """A whole training, to rounding."""
    model = captured(network(), paper.HyLo(interval=1, **ARGUMENTS, **arguments))
    fit(model, *signals(repeated))
    assert_close(weights(model), sngd_weights(repeated), tolerance=1e-8)
    assert model.optimizer.inverse_updates == 3


@pytest.mark.parametrize("residual", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_steps_are_the_papers(residual, float64):
    """KID of three rows of eight, from the rows and the definition; what it leaves out is divided by the damping alone."""
    damping = 2.0**-2
    steps = Steps(
        paper.HyLo(
            1.0,
            damping,
            momentum=0.0,
            interval=1,
            batch_size=BATCH,
            rank=3,
            mode="kid",
            residual=residual,
            kl_clip=None,
        )
    )
    for found, a, ghat in steps.step(*steps.batch(seed=0)):
        rows = zip(*low_rank.example_rows(a, ghat, BATCH), gradient(a, ghat), strict=True)
        expected = np.stack([low_rank.interpolated(*block, damping, 3, residual) for block in rows])
        close(found, expected, 1e-8)
        assert error(found, preconditioned(a, ghat, damping)) > 1e-3


def test_the_probe_knows_the_damping_of_its_step():
    """It interpolates with the damping that the step's gradients will be preconditioned with."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.5, 0.25, 0.125])
    model = captured(mlp(), paper.HyLo(damping=schedule, interval=1, batch_size=8, rank=4, mode="kid"))
    x, y = regression(8)
    for expected in (0.5, 0.25, 0.125):
        model.train_on_batch(x, y)
        assert [float(array(layer.statistics.averages[3])[0]) for layer in model.layers[1:]] == [expected] * 2
        used = [array(v) for group in model.optimizer.layout.groups for v in group.curvature.variables[1:]]
        np.testing.assert_array_equal(np.concatenate(used), [expected] * 2)


def test_trains():
    optimizer = paper.HyLo(
        learning_rate=0.03, damping=0.1, interval=2, batch_size=8, rank=0.5, steps_per_epoch=4, eta=1e9
    )
    losses = fit(captured(mlp(), optimizer), *regression(), epochs=10).history["loss"]
    assert losses[-1] < 0.6 * losses[0]
    assert optimizer.skipped_steps == optimizer.skipped_statistics == 0
    assert optimizer.switch_report()["mode"] == "kis"


def everything(model):
    return {f"{i} {v.path}": array(v) for i, v in enumerate(model.weights + model.optimizer.variables)}


@pytest.mark.slow
def test_coins_survive_saving(tmp_path):
    """In the middle of an epoch: loaded, training goes on to the same bits."""
    optimizer = paper.HyLo(interval=2, batch_size=8, rank=3, mode="random", damping=0.1, steps_per_epoch=3, seed=7)
    model = captured(mlp(), optimizer)
    fit(model, *regression(), epochs=2)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == optimizer.get_config()
    for each in (model, loaded):
        fit(each, *regression(), epochs=2)
    assert_same(everything(loaded), everything(model))
    assert loaded.optimizer.switch_report() == optimizer.switch_report()
    assert optimizer.switch_report()["epochs"] == 5


def test_draws_follow_the_seed_and_the_layer():
    draws = []
    for seed in (0, 1, 4095):
        model = captured(mlp(), paper.HyLo(batch_size=8, mode="kis", seed=seed))
        model.optimizer.build(model.trainable_variables)
        draws += [tuple(v) for path, v in statistics(model).items() if path.endswith("draw")]
    assert len(draws) == len(set(draws)) == 6


@pytest.mark.skipif(small.JIT, reason="JAX without jit is very slow")
def test_run_eagerly_it_does_the_same():
    """From the first step: its damping, its seed, and a number for each layer to draw by."""
    found = []
    for run_eagerly in (True, False):
        keras.utils.set_random_seed(0)
        optimizer = paper.HyLo(interval=1, batch_size=8, rank=3, mode="kis", damping=0.5, seed=5)
        model = captured(mlp(), optimizer, run_eagerly=run_eagerly)
        fit(model, *regression(16))
        found.append(statistics(model))
    small.assert_close(*found, tolerance=1e-4)


@pytest.mark.skipif(small.JIT, reason="JAX compiles it anyway")
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["switch", "random"])
def test_compiled_by_xla_it_switches(mode):
    optimizer = paper.HyLo(
        interval=1, batch_size=8, rank=4, damping=0.1, steps_per_epoch=4, eta=1e9, learning_rate=0.02, mode=mode
    )
    model = captured(mlp(), optimizer, jit_compile=True)
    losses = fit(model, *regression(), epochs=4).history["loss"]
    assert losses[-1] < losses[0]
    assert optimizer.switch_report()["epochs"] == 4
    if mode == "switch":
        assert optimizer.switch_report()["mode"] == "kis"


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "`rank` must be an int from 1 to the batch size.*rank=0"),
        ({"rank": -1}, "rank=-1"),
        ({"rank": 0.0}, r"a float in \(0, 1\].*rank=0.0"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"rank": float("nan")}, "rank=nan"),
        ({"rank": True}, "rank=True"),
        ({"rank": "all"}, "'all'"),
        ({"rank": 9, "batch_size": 8}, "`rank` must not exceed the batch size.*rank=9, batch_size=8"),
        ({"mode": "both"}, "`mode` must be one of .*'switch'.*mode='both'"),
        ({"sampling": "uniform"}, "`sampling` must be one of .*'priority'.*sampling='uniform'"),
        ({"power": 0}, "`power` must be a number above 0.*power=0"),
        ({"residual": 1}, "`residual` must be True or False.*residual=1"),
        ({"eta": -0.1}, "`eta` must be a number above 0.*eta=-0.1"),
        ({"decay_ratio": 1.0}, r"`decay_ratio` must be in \(0, 1\).*decay_ratio=1.0"),
        ({"decay_ratio": 0}, "decay_ratio=0"),
        ({"steps_per_epoch": 0}, "`steps_per_epoch` must be an int of at least 1.*steps_per_epoch=0"),
        ({"seed": -1}, r"`seed` must be an int in \[0, 2\*\*12\).*seed=-1"),
        ({"seed": 4096}, "seed=4096"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        paper.HyLo(**arguments)


@pytest.mark.parametrize(
    ("rank", "rows"), [(1, 1), (0.1, 1), (0.25, 2), (0.3, 2), (0.5, 4), (1.0, 8), (np.int64(8), 8)]
)
def test_rank_is_rows_or_a_share(rank, rows):
    optimizer = paper.HyLo(batch_size=8, rank=rank, mode="kis")
    model = mlp()
    keras_ngd.capture(model, optimizer)
    assert model.layers[1].statistics.averages[0].shape == (1, rows, 5)
    assert keras_ngd.HyLo.from_config(optimizer.get_config()).rows == rows


def test_a_rank_above_a_batch_size_that_capture_finds():
    model, optimizer = mlp(), paper.HyLo(rank=9, mode="kid")
    with pytest.raises(ValueError, match="`rank` must not exceed the batch size.*rank=9, batch_size=8"):
        keras_ngd.capture(model, optimizer, data=regression(8)[0])
    assert not small.statistics(model)


@pytest.mark.parametrize("mode", ["kid", "kis"])
def test_one_mode_for_good_needs_no_steps_per_epoch(mode):
    keras_ngd.capture(mlp(), paper.HyLo(mode=mode, batch_size=8))
