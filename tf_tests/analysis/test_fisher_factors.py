"""The factors of a model on data, of either Fisher matrix."""

import keras
import numpy as np
import pytest

import keras_ngd
from tf_tests import small
from tf_tests.fisher import forms


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    made = forms.network(shape=(forms.TIME, 4), units=2)()
    made.compile("sgd", "mse")
    return made


def test_of_squared_errors_they_are_known(model):
    """The Hessian with respect to predictions is `2 / D` at each position, whatever these are."""
    x, y = forms.SEQUENCES, forms.NUMBERS_OF_EACH
    before = small.weights(model)
    hidden, outputs = keras_ngd.analysis.fisher(model, x, y, draws=50)
    assert [hidden.layer.split("/")[-1], outputs.layer.split("/")[-1]] == ["hidden", "outputs"]
    np.testing.assert_allclose(outputs.g, np.eye(2), atol=0.15)
    ones = np.ones((*x.shape[:2], 1))
    a = np.concatenate([x, ones], axis=-1).reshape(-1, 5)
    np.testing.assert_allclose(hidden.a, a.T @ a / len(a), rtol=1e-5, atol=1e-6)
    assert hidden.trace == pytest.approx(np.trace(hidden.a) * np.trace(hidden.g))
    small.assert_same(small.weights(model), before)


def test_of_the_data_they_fall_with_the_residuals(model):
    x = forms.SEQUENCES
    y = model.predict(x, verbose=0) + 1e-3
    empirical, sampled = (keras_ngd.analysis.fisher(model, x, y, kind, draws=4) for kind in ("empirical", "sampled"))
    for found, true in zip(empirical, sampled, strict=True):
        assert found.trace < 1e-4 * true.trace
    # Gradients of residuals that are all the same.
    np.testing.assert_allclose(empirical[1].g, np.full((2, 2), 1e-6), rtol=1e-2)


def test_the_plot(model, tmp_path):
    pytest.importorskip("matplotlib")
    x, y = forms.SEQUENCES, forms.NUMBERS_OF_EACH
    found = {kind: keras_ngd.analysis.fisher(model, x, y, kind, draws=1) for kind in ("empirical", "sampled")}
    figure = keras_ngd.analysis.plot_fisher({0: found, 5: found}, str(tmp_path / "fisher.png"))
    assert len(figure.axes) == 2
    assert (tmp_path / "fisher.png").stat().st_size > 0
    with pytest.raises(ValueError, match="`measured` is empty"):
        keras_ngd.analysis.plot_fisher({})


def test_bad_input(model):
    with pytest.raises(ValueError, match="`kind` must be one of .*kind='true'"):
        keras_ngd.analysis.fisher(model, forms.SEQUENCES, forms.NUMBERS_OF_EACH, "true")
    with pytest.raises(ValueError, match="is not compiled with a loss"):
        keras_ngd.analysis.fisher(forms.network()(), forms.INPUTS, forms.NUMBERS)
