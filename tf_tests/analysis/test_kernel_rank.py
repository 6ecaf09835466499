"""Numerical ranks of kernel matrices."""

import numpy as np
import pytest

import keras_ngd
from keras_ngd.analysis import kernel_rank, plot_kernel_ranks
from keras_ngd.analysis.kernel_ranks import KernelRanks, numerical_rank
from keras_ngd.analysis.layer_rows import layer_rows
from tf_tests.small import assert_same, compiled, mlp, regression, weights


@pytest.mark.parametrize(
    ("values", "share", "rank"),
    [
        ([9.0, 1.0], 0.9, 1),  # just reached
        ([8.9, 1.1], 0.9, 2),
        ([1.0] * 10, 0.9, 9),
        ([1.0, 4.0, 5.0], 0.5, 1),  # in any order
        ([1.0, -1e-17, 1e-17], 0.9999, 1),  # rounding
        ([0.0, 0.0], 0.9, 0),
    ],
)
def test_numerical_rank(values, share, rank):
    assert numerical_rank(values, share) == rank


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_ranks_are_those_of_the_outer_products(share):
    x, y = regression(examples=12)
    model = compiled(mlp(), "sgd")
    before = weights(model)
    found = kernel_rank(model, x, y, share=share)
    assert_same(weights(model), before)
    for rows, rank in zip(layer_rows(model, x, y), found.ranks, strict=True):
        outer = np.einsum("ni,no->nio", rows.a.astype("float64"), rows.g.astype("float64")).reshape(12, -1)
        # Squared singular values of `U` are eigenvalues of `U U^T`.
        shares = np.cumsum(np.linalg.svd(outer, compute_uv=False) ** 2)
        assert rank == 1 + np.sum(shares / shares[-1] < share)


def test_repeated_examples_add_nothing():
    x, y = regression(examples=3)
    model = mlp()
    once = kernel_rank(model, x, y, "mse", share=0.999)
    often = kernel_rank(model, np.tile(x, (4, 1)), np.tile(y, (4, 1)), "mse", share=0.999)
    assert once.ranks == often.ranks
    assert max(often.ranks) <= 3
    assert often.fractions == [rank / 12 for rank in often.ranks]


def test_table_and_figures(tmp_path):
    results = [KernelRanks(("first", "second", "third"), (2 * n, 3 * n, 7 * n), 16 * n, 0.9) for n in (1, 2, 4)]
    assert results[0].median == 3
    assert "median rank 3, 18.8% of the batch of 16" in str(results[0])
    assert str(results[0]).count("\n") == 5
    results[0].plot(tmp_path / "one.png")
    plot_kernel_ranks(results, tmp_path / "sizes.png")
    keras_ngd.analysis.plot_kernel_ranks(results[:2], tmp_path / "epochs.png", labels=["epoch 0", "epoch 5"])
    for name in ("one", "sizes", "epochs"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="`results`"):
        plot_kernel_ranks([], tmp_path / "none.png")
    with pytest.raises(ValueError, match="`labels`"):
        plot_kernel_ranks(results, tmp_path / "none.png", labels=["one"])


@pytest.mark.parametrize("share", [0, 1, -0.5, "0.9", None])
def test_bad_shares(share):
    with pytest.raises(ValueError, match="`share`"):
        kernel_rank(mlp(), *regression(), "mse", share=share)


def test_bad_batches():
    with pytest.raises(ValueError, match="not compiled with a loss"):
        kernel_rank(mlp(), *regression())
    with pytest.raises(ValueError, match="`y` must be one batch"):
        kernel_rank(mlp(), regression()[0], None, "mse")
