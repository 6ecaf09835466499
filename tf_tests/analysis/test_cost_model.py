"""Projected times and numbers exchanged, against what is known of ResNet-50."""

import dataclasses
import subprocess
import sys

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from keras_ngd.analysis import Rates, cost_model, layer_shapes, measure_rates, plot_cost_model, received
from keras_ngd.analysis.exchanges import METHODS, STAGES
from keras_ngd.analysis.projection import SERIES
from keras_ngd.analysis.rates import fit_inverse
from keras_ngd.distributed import place

# About what a V100 and its network do: 10 of 15.7 Tflop/s in products; KAISA's 410 ms (HyLo, Figure 7) for eigenvectors of the
# largest layer of ResNet-50 are 2 Tflop/s.
V100 = Rates(product_flops=1e13, factorization_flops=2e12, bandwidth=12.5e9, latency=5e-6, row_seconds=2e-6)


def resnet50():
    """ResNet-50's layers on 224 x 224 images, convolutions without bias."""
    shapes = [(147, 64, 112**2)]
    for width, blocks, channels, side in ((64, 3, 64, 56), (128, 4, 256, 28), (256, 6, 512, 14), (512, 3, 1024, 7)):
        for block in range(blocks):
            inputs = channels if block == 0 else 4 * width
            block_shapes = [(inputs, width), (9 * width, width), (width, 4 * width)]
            block_shapes += [(inputs, 4 * width)] if block == 0 else []
            shapes += [(a, g, side**2) for a, g in block_shapes]
    return [*shapes, (2049, 1000, 1)]


RESNET50 = resnet50()


def mebibytes(method, workers, stage, **arguments):
    return received(method, RESNET50, workers, 80, **arguments)[stage] * 4 / 2**20


def in_turn(costs, workers):
    return [i % workers for i in range(len(costs))]


def test_resnet50s_sizes():
    assert len(RESNET50) == 54
    both = received("kfac", RESNET50, 2, 80, packed=False), received("kfac", RESNET50, 2, 80)
    # Of two workers each receives half of what is broadcast, and all of what is reduced.
    assert [round(counts["statistics"] / 1e6, 1) for counts in both] == [153.9, 77.0]
    assert round(both[0]["gradients"] / 1e6, 1) == 25.5
    np.testing.assert_allclose(both[0]["inverses"] * 2, both[0]["statistics"])


@pytest.mark.parametrize(
    ("workers", "method", "stage", "arguments", "expected"),
    [
        (8, "sp-ngd", "statistics", {}, 257),
        (8, "kfac", "statistics", {"packed": False}, 1027),
        (8, "kfac", "statistics", {}, 514),
        (8, "kfac", "inverses", {"eigen": True}, 599),
        (8, "kfac", "inverses", {}, 257),
        (8, "hylo-kid", "statistics", {"packed": False}, 17.7),
        (8, "hylo-kid", "inverses", {"packed": False}, 0.7),
        (64, "sp-ngd", "statistics", {}, 289),
        (64, "kfac", "statistics", {"packed": False}, 1155.5),
        (64, "kfac", "statistics", {}, 578),
        (64, "kfac", "inverses", {"eigen": True}, 673.5),
        (64, "hylo-kid", "statistics", {"packed": False}, 159),
        (64, "hylo-kid", "inverses", {"packed": False}, 53),
        (64, "sngd", "statistics", {}, 1586),
        (64, "sngd", "inverses", {"packed": False}, 5316),
    ],
)
def test_mebibytes_of_resnet50(workers, method, stage, arguments, expected):
    digits = 1 if isinstance(expected, float) else 0
    assert round(mebibytes(method, workers, stage, **arguments), digits) == expected


def test_skfac_gathers_rows_or_reduces_what_is_smaller():
    """Of 8 workers with 4 examples each; `(64, 16)`: rows of 32 examples are fewer than 64 columns, not than 16."""
    counts, k = received("skfac", [(64, 16, 1)], 8, 4), 7 / 8
    np.testing.assert_allclose(counts["statistics"], k * 32 * 64 + 2 * k * 16 * 17 / 2)
    np.testing.assert_allclose(counts["inverses"], k * (32 * 33 + 16 * 17) / 2)
    wide = [(a, g, t) for a, g, t in RESNET50 if min(a, g) > 64]
    np.testing.assert_allclose(received("skfac", wide, 8, 8)["statistics"], received("sngd", wide, 8, 8)["statistics"])


def test_bases_travel_whole_and_second_moments_with_them():
    """Of 8 workers; `(1500, 16)`: blocks of 1,024 and of 476 rows."""
    shapes, k = [(1500, 16, 1), (64, 1, 1)], 7 / 8
    blocks = (1024, 476, 16, 64)
    for method, begun in (("eigen-adam", 0), ("ekfac", 1500 * 16 + 64)):
        counts = received(method, shapes, 8, 4)
        np.testing.assert_allclose(counts["statistics"], 2 * k * (sum(b * (b + 1) / 2 for b in blocks) + 1))
        np.testing.assert_allclose(counts["inverses"], k * (sum(b**2 for b in blocks) + begun))


def test_bases_are_followed_by_products_and_gradients_rotated_thrice():
    rates = dataclasses.replace(V100, latency=0.0)
    eigen, ekfac, adam = (
        cost_model([(512, 512, 1)], [1], method, rates=rates, eigen=method == "kfac").costs[method, 1]
        for method in ("kfac", "ekfac", "eigen-adam")
    )
    assert ekfac.inversion == adam.inversion < eigen.inversion / 2
    np.testing.assert_allclose(ekfac.preconditioning, eigen.preconditioning)
    np.testing.assert_allclose(adam.preconditioning, 1.5 * ekfac.preconditioning)
    assert adam.statistics == eigen.statistics


def test_hylo_gathers_a_tenth_of_kfacs_factors():
    for method in ("hylo-kid", "hylo-kis"):
        assert mebibytes(method, 8, "statistics") < mebibytes("kfac", 8, "statistics") / 10
        assert mebibytes(method, 8, "inverses") < mebibytes("kfac", 8, "inverses") / 10


@pytest.mark.parametrize("method", METHODS)
def test_every_method_receives_the_gradients_of_sgd_or_their_like(method):
    counts, plain = received(method, RESNET50, 8, 80), received("sgd", RESNET50, 8, 80)["gradients"]
    owner_only = {"sp-ngd": plain, "kfac-mem-opt": 1.5 * plain}
    np.testing.assert_allclose(counts["gradients"] + counts["preconditioned"], owner_only.get(method, plain))
    assert set(counts) == set(STAGES)


def test_hybrid_lies_between_what_saves_messages_and_what_saves_memory():
    everywhere, half, owner = (received("kfac", RESNET50, 8, 80, fraction=f) for f in (1.0, 0.5, 1 / 8))
    assert owner == received("kfac-mem-opt", RESNET50, 8, 80)
    assert everywhere["preconditioned"] == owner["inverses"] == 0
    np.testing.assert_allclose(half["inverses"] / everywhere["inverses"], 3 / 7)
    np.testing.assert_allclose(half["preconditioned"] / owner["preconditioned"], 4 / 7)


SHAPES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(1, 20)), min_size=1, max_size=5)


@given(SHAPES, st.integers(2, 64), st.integers(1, 40), st.sampled_from(METHODS))
def test_packing_halves_matrices_and_leaves_rows(shapes, workers, batch_size, method):
    packed, whole = (received(method, shapes, workers, batch_size, packed=p) for p in (True, False))
    assert packed["gradients"] == whole["gradients"]
    for stage in ("statistics", "inverses"):
        assert whole[stage] / 2 <= packed[stage] <= whole[stage]
    if method in ("kfac", "sp-ngd"):
        sizes = sum(a + g for a, g, _ in shapes)
        full = 2 if method == "kfac" else 1
        excess = full * (workers - 1) / workers * sizes / 2
        np.testing.assert_allclose(packed["statistics"], whole["statistics"] / 2 + excess)


@given(SHAPES, st.integers(1, 40), st.sampled_from(METHODS))
def test_alone_nothing_is_received_and_nothing_waits(shapes, batch_size, method):
    assert set(received(method, shapes, 1, batch_size).values()) == {0}
    cost = cost_model(shapes, (1,), method, batch_size, V100).costs[method, 1]
    assert cost.sent_gradients == cost.sent_statistics == cost.sent_inverses == cost.sent_preconditioned == 0


@given(SHAPES, st.integers(1, 8))
def test_undivided_blocks_are_kfacs_factors(shapes, workers):
    assert received("thor", shapes, workers, 4, split=300) == received("kfac", shapes, workers, 4)
    thor, kfac = (cost_model(shapes, (workers,), m, 4, V100, split=300).costs[m, workers] for m in ("thor", "kfac"))
    assert thor.statistics == kfac.statistics
    assert thor.inversion <= kfac.inversion * (1 + 1e-9)


def test_packing_makes_half_of_resnet50s_factors():
    ratio = mebibytes("kfac", 8, "statistics") / mebibytes("kfac", 8, "statistics", packed=False)
    assert round(ratio, 4) == 0.5003


def test_collectives():
    rates = Rates(1, 1, bandwidth=4, latency=0.5)
    times = [rates.collective(kind, 8, 4) for kind in ("all_reduce", "reduce_scatter", "all_gather", "broadcast")]
    assert times == [15.0, 7.5, 7.5, 17.0]
    assert rates.collective("broadcast", 8, 5) == 25.5
    assert {rates.collective(kind, 8, 1) for kind in ("all_reduce", "all_gather", "broadcast")} == {0}


def test_largest_layer_bounds_the_inversion():
    times = cost_model(RESNET50, (1, 2, 4, 8, 64, 1024), "kfac", 80, V100).seconds("kfac", "inversion")
    largest = V100.inverse(4608) + V100.inverse(512)
    assert times[0] > 2 * times[2] > 2 * times[3]
    np.testing.assert_allclose(times[-3:], largest)


def test_steps_share_updates():
    arguments = {"workers": (8,), "methods": ("sgd", "kfac", "hylo-kis"), "batch_size": 80, "rates": V100}
    costs = cost_model(RESNET50, **arguments, factor_interval=5, inverse_interval=50, gradient_seconds=0.1).costs
    kfac, hylo, sgd = costs["kfac", 8], costs["hylo-kis", 8], costs["sgd", 8]
    assert sgd.update == 0
    assert sgd.step == 0.1 + sgd.sent_gradients
    rarely = (kfac.statistics + kfac.sent_statistics) / 5 + (kfac.inversion + kfac.sent_inverses) / 50
    np.testing.assert_allclose(kfac.step, sgd.step + kfac.preconditioning + rarely)
    np.testing.assert_allclose(hylo.step, sgd.step + hylo.preconditioning + hylo.update / 5)


def test_hylos_figure_3():
    """KFAC (KAISA's) and SNGD against HyLo on ResNet-50, batches of 80 on each of 8 to 64 workers."""
    methods = ("kfac", "sngd", "hylo-kid", "hylo-kis")
    projected = cost_model(RESNET50, (8, 16, 32, 64), methods, 80, V100, eigen=True, packed=False)
    kfac, sngd, kid, kis = (np.array(projected.seconds(method, "update")) for method in methods)
    # "SNGD's running time is significantly less than KFAC on 8 and 16 GPUs, it fails to scale on 64 GPUs".
    assert (sngd[:2] < kfac[:2] / 2).all()
    assert sngd[3] > 10 * sngd[0]
    assert sngd[3] > kfac[3] / 2
    # "Running time of KFAC and SNGD grows at scale."
    assert (np.diff(kfac) > 0).all()
    assert (np.diff(sngd) > 0).all()
    # "HyLo outperforms both KFAC and SNGD on all settings", by 28 and 20 times overall.
    for hylo in (kid, kis):
        assert (hylo < np.minimum(kfac, sngd)).all()
        assert kfac[3] / hylo[3] > 10
        assert sngd[3] / hylo[3] > 10
    assert (kis < kid).all()


def iteration_times(placement, rates=V100):
    """Of SP-NGD that renews all at every step, 32 examples on each worker, as Osawa et al. timed it on ResNet-50."""
    arguments = {"factor_interval": 1, "inverse_interval": 1, "placement": placement}
    projected = cost_model(RESNET50, methods="sp-ngd", batch_size=32, rates=rates, **arguments)
    return dict(zip(projected.workers, projected.seconds("sp-ngd"), strict=True))


@pytest.mark.parametrize("changes", [{}, {"latency": 1e-6}, {"latency": 2e-5}, {"bandwidth": 25e9}])
def test_sp_ngd_is_fastest_where_every_worker_has_one_layer(changes):
    """Osawa et al. found 64 workers to be best. So they are for 54 layers dealt out in turn: then only messages are added."""
    times = iteration_times(in_turn, dataclasses.replace(V100, **changes))
    workers = list(times)
    best = min(times, key=times.get)
    assert 32 <= best <= 128
    assert all(times[p] > times[2 * p] for p in workers if 2 * p <= best)
    assert all(times[p] < times[2 * p] for p in workers if best <= p < workers[-1])


def test_balanced_owners_reach_that_with_fewer_workers():
    """Then the largest layer, a seventh of all the work, is one worker's alone from 8 workers on."""
    times, dealt = iteration_times(place), iteration_times(in_turn)
    assert all(times[p] <= dealt[p] * (1 + 1e-9) for p in times)
    np.testing.assert_allclose([times[p] for p in (64, 1024)], [dealt[p] for p in (64, 1024)])
    assert min(times, key=times.get) == 8
    assert min(dealt, key=dealt.get) == 64
    assert 0.95 < min(times.values()) / min(dealt.values()) < 1


def test_layer_shapes():
    inputs = keras.Input((9, 9, 4))
    x = layers.Conv2D(6, 3, use_bias=False)(inputs)
    x = layers.Conv2D(6, 3, strides=2, groups=2)(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3)(x)
    x = keras.Sequential([layers.Reshape((1, 6)), layers.Conv1D(5, 1)])(x)
    outputs = layers.Dense(2)(layers.Dense(7)(x)[:, 0])
    model = keras.Model(inputs, outputs)
    expected = [(36, 6, 49), (28, 3, 9), (28, 3, 9), *6 * [(10, 1, 1)], (7, 5, 1), (6, 7, 1), (8, 2, 1)]
    assert layer_shapes(model) == expected
    assert cost_model(model, (1, 2), "kfac", 4, V100).costs == cost_model(expected, (1, 2), "kfac", 4, V100).costs


def test_shapes_of_several_parts_and_of_pixels():
    inputs = keras.Input((5, 4, 2))
    x = layers.SeparableConv2D(3, 2, depth_multiplier=2)(inputs)
    model = keras.Model(inputs, layers.Conv2DTranspose(5, (2, 3), strides=2)(x))
    assert layer_shapes(model) == [(4, 2, 12), (4, 2, 12), (5, 3, 12), (3, 30, 12)]


def test_shapes_of_tokens_and_time_steps():
    """Tables have no factors of the vocabulary's size, and heads are no positions."""
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(1000, 6)(tokens)
    x = layers.MultiHeadAttention(2, 3)(x, x)
    model = keras.Model(tokens, layers.Dense(2)(layers.LSTM(4)(x)))
    assert layer_shapes(model) == [*4 * [(7, 6, 5)], (11, 16, 5), (5, 2, 1)]


def test_unknown_positions():
    model = keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(2, 3, name="wide")])
    with pytest.raises(ValueError, match="wide' has an unknown number of output positions"):
        layer_shapes(model)
    with pytest.raises(ValueError, match="`model` has no layer"):
        layer_shapes(keras.Sequential([keras.Input((3,)), layers.ReLU()]))


@given(st.floats(1e9, 1e14), st.floats(1e-9, 1e-5))
def test_rates_fit_the_times_they_come_from(flops, row_seconds):
    rates = Rates(1e12, flops, row_seconds=row_seconds)
    found = fit_inverse((128, 1024), [rates.inverse(size) for size in (128, 1024)])
    np.testing.assert_allclose(found, (flops, row_seconds), rtol=1e-3, atol=1e-15)


def test_times_that_do_not_fit():
    assert fit_inverse((1, 10), (2.0, 4.0)) == (250.0, 0.0)
    assert fit_inverse((1, 10), (1e-9, 4.0)) == (250.0, 0.0)


def test_measures_and_draws(tmp_path):
    rates = measure_rates(1e9, 1e-4, sizes=(16, 64))
    assert rates.product_flops > 0
    assert rates.factorization_flops > 0
    assert (rates.bandwidth, rates.latency) == (1e9, 1e-4)
    result = cost_model(RESNET50, batch_size=80, rates=rates)
    assert all(len(result.seconds(method, what)) == 11 for method in METHODS for what in SERIES)
    assert all(name in str(result) for name in METHODS)
    plot_cost_model(result, tmp_path / "function.png")
    result.plot(tmp_path / "method.png")
    assert min((tmp_path / f"{name}.png").stat().st_size for name in ("function", "method")) > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ("kfac", "shampoo")}, "`methods`.*methods='shampoo'"),
        ({"methods": ()}, "at least one"),
        ({"workers": (2, 0)}, "workers=0"),
        ({"workers": (-4,)}, "workers=-4"),
        ({"workers": (1.5,)}, "workers=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"rates": 1e12}, "`rates`"),
        ({"factor_interval": 0}, "factor_interval=0"),
        ({"inverse_interval": 2.5}, "inverse_interval=2.5"),
        ({"split": 0}, "split=0"),
        ({"rank": 0.0}, "rank=0.0"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"gradient_seconds": -1}, "gradient_seconds=-1"),
        ({"workers": (8,), "fraction": 0.3}, "fraction=0.3 of workers=8"),
        ({"workers": (8,), "fraction": 3 / 8}, "fraction=0.375 of workers=8"),
        ({"fraction": 0}, "fraction=0 "),
        ({"model_or_shapes": []}, r"shapes=\[\]"),
        ({"model_or_shapes": [(3, 0, 1)]}, r"shapes=\[\(3, 0, 1\)\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        cost_model(**{"model_or_shapes": RESNET50, "rates": V100, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bandwidth": 0}, "`bandwidth`.*bandwidth=0"),
        ({"bandwidth": -1.0}, "bandwidth=-1.0"),
        ({"latency": -1e-6}, "`latency`.*latency=-1e-06"),
        ({"product_flops": float("inf")}, "product_flops=inf"),
        ({"factorization_flops": None}, "factorization_flops=None"),
        ({"row_seconds": "1"}, "row_seconds='1'"),
    ],
)
def test_bad_rates(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rates(**{"product_flops": 1e12, "factorization_flops": 1e11, **arguments})


def test_bad_names():
    with pytest.raises(ValueError, match="`method`.*method='adam'"):
        received("adam", RESNET50, 8, 80)
    with pytest.raises(ValueError, match="`sizes`"):
        measure_rates(sizes=(64, 16))
    with pytest.raises(ValueError, match="`bandwidth`"):
        measure_rates(bandwidth=0)
    result = cost_model(RESNET50, (1,), "kfac", rates=V100)
    with pytest.raises(ValueError, match="method='thor'"):
        result.seconds("thor")
    with pytest.raises(ValueError, match="what='all'"):
        result.seconds("kfac", "all")


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="one backend shows that it runs")
@pytest.mark.slow
def test_command_line(tmp_path):
    command = [sys.executable, "-m", "keras_ngd.analysis", "cost_model", "--model=mobilenetv3small", "--image_size=32"]
    command += ["--workers=1,8", "--batch_size", "8", "--bandwidth", "12.5", "--latency", "5e-6"]
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'figure.png'}"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "hylo-kid" in done.stdout
    assert (tmp_path / "figure.png").exists()
