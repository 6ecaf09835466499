"""SKFAC is KFAC on the factors of one batch; what it adds is the history, the positions drawn, and the arguments."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from tf_tests import paper, small
from tf_tests.reference.running import drawn
from tf_tests.small import assert_close, captured, fit, kfac, mlp, regression, statistics, weights

pytestmark = pytest.mark.neutral


def skfac(**kwargs):
    """An `SKFAC` that does everything at every step."""
    return paper.SKFAC(**{"interval": 1, "batch_size": 8, **kwargs})


def squares(s):
    """An activation; Keras computes its own in float32 on JAX."""
    return s * s / 2


def network():
    """Layers of which a batch of eight has fewer rows than both sides, than one, and than neither."""
    arguments = {"kernel_initializer": drawn, "bias_initializer": drawn}
    return keras.Sequential(
        [
            keras.Input((3, 4, 4)),
            layers.Conv2D(18, 2, groups=2, activation=squares, **arguments),
            layers.Flatten(),
            layers.Dense(6, use_bias=False, activation=squares, kernel_initializer=drawn),
            layers.Dense(4, **arguments),
        ]
    )


def images(examples=24):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 3, 4, 4)).astype(keras.config.floatx())
    return x, x[:, 1, 1]


def train(optimizer, data, make=network, epochs=1):
    """The weights after training."""
    keras.utils.set_random_seed(0)
    model = captured(make(), optimizer)
    fit(model, *data, epochs=epochs)
    return weights(model)


SAME = {
    "reduce": ({"convolution": "reduce"}, {"weight_sharing": "reduce"}),
    "all positions": ({"convolution": "subsample", "positions": 6}, {"weight_sharing": "expand"}),
}


@pytest.mark.parametrize("kind", SAME)
def test_is_kfac_on_one_batch(kind, float64):
    ours, theirs = SAME[kind]
    shared = {"learning_rate": 2.0**-5, "damping": 2.0**-4, "kl_clip": None}
    found = train(skfac(**shared, **ours), images())
    expected = train(kfac(**shared, **theirs, factor_decay=0.0, inverse="cholesky"), images())
    assert_close(found, expected, tolerance=1e-9)


@pytest.mark.parametrize("mode", ["factor", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("pi", "sqrt"))])
def test_is_kfac_on_one_batch_in_float32(mode):
    """With the clip, momentum, and every way of damping."""
    shared = {"damping": 2.0**-3, "damping_mode": mode}
    found = train(skfac(**shared), regression(), mlp, epochs=2)
    expected = train(kfac(**shared, factor_decay=0.0, inverse="cholesky"), regression(), mlp, epochs=2)
    assert_close(found, expected, tolerance=1e-3)


def test_draws_follow_the_seed_and_the_layer():
    draws = []
    for seed in (0, 1):
        model = captured(network(), skfac(seed=seed, convolution="subsample"))
        model.optimizer.build(model.trainable_variables)
        draws += [tuple(v) for path, v in statistics(model).items() if path.endswith("draw")]
    assert len(draws) == len(set(draws)) == 6
    assert all(count == 0 for _, count in draws)


def test_trains():
    optimizer = skfac(interval=2, convolution="subsample", positions=2, history=2, learning_rate=0.02)
    losses = fit(captured(network(), optimizer), *images(), epochs=10).history["loss"]
    assert losses[-1] < 0.6 * losses[0]
    assert optimizer.factor_updates == optimizer.inverse_updates == 15
    assert optimizer.skipped_steps == optimizer.skipped_statistics == 0


@pytest.mark.skipif(small.JIT, reason="JAX compiles it anyway")
@pytest.mark.slow
def test_compiled_by_xla_it_does_the_same():
    trained = []
    for jit_compile in (True, False):
        keras.utils.set_random_seed(0)
        # Not "subsample": TensorFlow draws other numbers for the same seed where XLA compiles it.
        optimizer = skfac(history=2, damping=0.1)
        model = captured(mlp(), optimizer, jit_compile=jit_compile)
        fit(model, *regression())
        trained.append(weights(model))
    assert_close(*trained, tolerance=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"convolution": "expand"}, "`convolution` must be one of .*'reduce'.*convolution='expand'"),
        ({"convolution": None}, "convolution=None"),
        ({"positions": 0}, "`positions` must be an int of at least 1.*positions=0"),
        ({"positions": 2.0}, "positions=2.0"),
        ({"history": 0}, "`history` must be an int of at least 1.*history=0"),
        ({"history": True}, "history=True"),
        ({"factor_decay": 0}, r"`factor_decay` must be in \(0, 1\) for SKFAC.*factor_decay=0"),
        ({"factor_decay": 1.0}, "factor_decay=1.0"),
        ({"damping_mode": "exact"}, "`damping_mode` must be one of .* for SKFAC.*'exact'"),
        ({"seed": -1}, r"`seed` must be an int in \[0, 2\*\*12\).*seed=-1"),
        ({"seed": 4096}, "seed=4096"),
        ({"seed": 1.0}, "seed=1.0"),
        ({"factor_interval": 10}, "SKFAC has one `interval`, not `factor_interval`"),
        ({"inverse_interval": 10}, "SKFAC has one `interval`, not `inverse_interval`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        paper.SKFAC(**arguments)


def test_captured_for_other_positions():
    model = mlp()
    keras_ngd.capture(model, skfac(positions=2))
    with pytest.raises(ValueError, match="Layer 'hidden' was captured for another optimizer.*'positions': 2"):
        fit(small.compiled(model, skfac(positions=3)), *regression())
