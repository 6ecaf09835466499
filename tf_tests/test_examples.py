"""The examples' data, and the examples themselves where nothing else runs them."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from examples import datasets

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def test_drawn_shapes_fill_their_classes(tmp_path):
    images, labels = datasets.arrays("shapes32", "test", tmp_path, scale=255.0)
    assert images.shape == (1024, 32, 32, 3)
    assert 0 <= images.min() < 0.05
    assert 0.95 < images.max() <= 1
    np.testing.assert_array_equal(np.bincount(labels), [103, 103, 103, 103] + [102] * 6)


def test_drawn_shapes_are_the_same_every_time():
    np.testing.assert_array_equal(datasets.draw_shape(3, 5), datasets.draw_shape(3, 5))
    assert (datasets.draw_shape(3, 5) != datasets.draw_shape(4, 5)).mean() > 0.5


@pytest.mark.slow
def test_cifar_resnet_runs(tmp_path):
    command = [sys.executable, EXAMPLES / "cifar_resnet.py", "--width=2", "--epochs=1", "--batch_size=512"]
    command += ["--method=momentum", "--method=thor_stop", "--first_interval=2", "--split=9", f"--data_dir={tmp_path}"]
    command += [f"--output={tmp_path / 'plot.png'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "thor_stop: 21 layers captured" in done.stdout
    assert "test accuracy" in done.stdout
    assert (tmp_path / "plot.png").stat().st_size > 10_000
