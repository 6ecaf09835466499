"""Choosing THOR's block size."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

import keras_ngd
from keras_ngd.analysis import split_dimension
from keras_ngd.analysis.factors import input_factors
from keras_ngd.analysis.split_choice import CANDIDATES, SplitChoice, choose, information_loss
from tf_tests.reference import kronecker
from tf_tests.reference import rows as reference
from tf_tests.small import mlp, regression

# The THOR paper's Table 1: ResNet-50's 54 input factors on an Ascend 910.
COUNTS = (4, 4, 5, 9, 13, 23, 32, 46, 48)
MICROSECONDS = (35, 59, 83, 121, 212, 534, 1418, 3738, 9824)


def test_table_1_gives_the_papers_choice():
    kept, performance = [count / 54 for count in COUNTS], [MICROSECONDS[0] / p for p in MICROSECONDS]
    split, (size, share) = choose(CANDIDATES, kept, performance)
    assert split == 128
    # The paper reads (106, 0.21) off its figure; from its rounded numbers it is (103.6, 0.2125).
    np.testing.assert_allclose((size, share), (103.6, 0.2125), atol=0.05)
    assert (round(size / 5), round(share, 2)) == (21, 0.21)


def test_table_1_as_a_result():
    losses = np.array([[0.0 if i < count else 0.5 for count in COUNTS] for i in range(54)])
    choice = SplitChoice(CANDIDATES, losses, tuple(p * 1e-6 for p in MICROSECONDS), 0.01, "Ascend 910")
    assert choice.counts == list(COUNTS)
    np.testing.assert_allclose(
        choice.kept, [0.0741, 0.0741, 0.0926, 0.1667, 0.2407, 0.4259, 0.5926, 0.8519, 0.8889], atol=5e-5
    )
    assert choice.split == 128
    assert "split 128" in str(choice)
    assert str(choice).count("\n") == 11


@pytest.mark.parametrize(
    ("kept", "performance", "expected"),
    [
        ([0.9, 1.0], [0.5, 0.4], 16),  # keeping everything from the start
        ([0.0, 0.1], [1.0, 0.9], 32),  # never worth it: the larger is closer
        ([0.0, 1.0], [1.0, 0.0], 16),  # half way: the first of two equally near
    ],
)
def test_without_a_crossing_the_nearer_end(kept, performance, expected):
    assert choose((16, 32), kept, performance)[0] == expected


@st.composite
def factors(draw):
    size, rank = draw(st.integers(2, 12)), draw(st.integers(1, 12))
    rows = np.random.default_rng(draw(st.integers(0, 99))).normal(size=(rank, size)) + draw(st.sampled_from([0.0, 1.0]))
    return rows.T @ rows, draw(st.integers(1, 12))


@given(factors())
def test_information_loss(case):
    factor, split = case
    blocks = range(0, len(factor), split)
    largest = max(np.linalg.eigvalsh(factor[i : i + split, i : i + split])[-1] for i in blocks)
    loss = information_loss(factor, split)
    np.testing.assert_allclose(loss, 1 - largest / np.linalg.eigvalsh(factor)[-1], atol=2e-3)
    assert 0 <= loss <= 1 - 1 / len(blocks) + 1e-6


def test_information_loss_at_its_bounds():
    np.testing.assert_allclose(information_loss(np.ones((8, 8)), 2), 0.75)
    assert information_loss(np.ones((8, 8)), 8) == 0
    assert information_loss(np.zeros((8, 8)), 2) == 0


def test_factors_are_the_models_own():
    x = np.random.default_rng(0).normal(size=(5, 6, 6, 2)).astype("float32")
    model = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(3, 3), layers.BatchNormalization(), layers.Flatten(), layers.Dense(2)]
    )
    before = model.get_weights()
    first, second = input_factors(model, x)
    np.testing.assert_allclose(
        first, kronecker.input_factor(reference.layer_rows(model.layers[0], x))[0], rtol=1e-5, atol=1e-6
    )
    assert second.shape == (49, 49)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not hasattr(model.layers[0], "statistics")


def test_several_batches_are_averaged():
    x, y = regression(examples=8)
    model = mlp()

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return x[4 * index : 4 * index + 4], y[4 * index : 4 * index + 4]

    parts = [input_factors(model, (x[i : i + 4], None)) for i in (0, 4)]
    for found, first, second in zip(input_factors(model, Batches()), *parts, strict=True):
        np.testing.assert_allclose(found, (first + second) / 2, rtol=1e-5, atol=1e-7)


def test_measures_and_draws(tmp_path):
    x, _ = regression(inputs=4)
    choice = split_dimension(mlp(), x, candidates=(1, 2, 4, 64))
    assert choice.split in (1, 2, 4, 64)
    assert choice.losses.shape == (2, 4)
    assert choice.kept[-1] == choice.performance[0] == 1
    assert choice.losses[0, -1] == 0
    assert all(s > 0 for s in choice.seconds)
    choice.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": None}, "`data` is missing"),
        ({"data": np.zeros((0, 4), "float32")}, "`data` is empty"),
        ({"candidates": (4, 2)}, "increasing"),
        ({"candidates": (4,)}, "at least two"),
        ({"candidates": (0, 4)}, "`candidates`"),
        ({"tolerance": 0}, "`tolerance`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_ngd.analysis.split_dimension(**{"model": mlp(), "data": regression()[0], **arguments})


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="one backend shows that it runs")
@pytest.mark.slow
def test_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "keras_ngd.analysis",
        "split_dimension",
        "--model=mobilenetv3small",
        "--image_size=32",
    ]
    command += ["--batch_size=4", "--candidates=1,8,16,64", f"--output={tmp_path / 'figure.png'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "split dimension" not in done.stdout
    assert " factors, " in done.stdout
    assert (tmp_path / "figure.png").exists()
