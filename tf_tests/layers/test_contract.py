"""A kind of layer of one's own that presents something else than it says: errors that name the layer and the method."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ngd
from keras_ngd.layers import Captured, DenseGeometry, Part, probe, register_kind
from keras_ngd.layers.geometry import gram
from tf_tests.small import METHODS, captured, fit, kfac, regression

pytestmark = pytest.mark.neutral

INPUTS, OUTPUTS, BATCH = 4, 3, 8


class Halved(keras.layers.Dense):
    def call(self, inputs, training=None):
        return super().call(inputs, training=training) / 2


def capturing(geometry=DenseGeometry, parts=None, probed=None):
    """Registers a captured `Halved`, with this geometry or these `parts(layer)`; `probed(layer)` is what its probe is given."""

    class CapturedHalved(Captured, Halved):
        plain = Halved

        def parts(self):
            if parts is not None:
                return parts(self)
            return {"statistics": Part(geometry(*self._kernel.shape, True), [self._kernel, self.bias])}

        def call(self, inputs, training=None):
            if self.statistics is None:
                return super().call(inputs, training=training)
            x = ops.matmul(inputs, self.kernel) + self.bias
            given = self.statistics.geometry if probed is None else probed(self)
            return self.activation(probe(x, inputs, given, self.statistics)) / 2

    return register_kind(CapturedHalved)


@pytest.fixture(autouse=True)
def unregistered():
    yield
    keras_ngd.layers.CAPTURED_KINDS.pop(Halved, None)


def network():
    inputs = keras.Input((INPUTS,))
    return keras.Model(inputs, keras.layers.Dense(4, name="outputs")(Halved(OUTPUTS, name="hidden")(inputs)))


def overriding(**methods):
    """A geometry of dense layers with other methods, whose name says nothing of them."""
    return type("WrongGeometry", (DenseGeometry,), methods)


def of_parameters(geometry, select):
    return lambda layer: {"statistics": Part(geometry(layer), select(layer._kernel, layer.bias))}


def dense(layer):
    return DenseGeometry(*layer._kernel.shape, True)


# What shows when a model is captured: what is registered, and what the error says of it.
AT_CAPTURE = {
    "sizes that are not the kernel's": (
        {"geometry": lambda rows, columns, bias: DenseGeometry(rows + 1, columns, bias)},
        r"`to_matrix` of its DenseGeometry fails on the shape \[\(4, 3\), \(3,\)\]: ",
    ),
    "a bias that the matrix has no row for": (
        {"geometry": lambda rows, columns, bias: DenseGeometry(rows, columns, False)},
        r"`from_matrix` of its DenseGeometry, of \['kernel', 'bias'\], gives the shape \[\(4, 3\)\], where \[\(4, 3\), \(3,\)\]",
    ),
    "a bias that is not there": (
        {"parts": of_parameters(dense, lambda kernel, bias: [kernel])},
        "`to_matrix` of its DenseGeometry fails on the shape",
    ),
    "None for a bias": (
        {"parts": of_parameters(dense, lambda kernel, bias: [kernel, None])},
        "its `parts` gives None as a parameter of its DenseGeometry; `Part.of",
    ),
    "parameters the other way round": (
        {"parts": of_parameters(dense, lambda kernel, bias: [bias, kernel])},
        "`to_matrix` of its DenseGeometry fails on the shape",
    ),
    "a matrix the other way round": (
        {"geometry": overriding(to_matrix=lambda self, p: ops.transpose(DenseGeometry.to_matrix(self, p), (0, 2, 1)))},
        r"`to_matrix` of its WrongGeometry gives the shape \(1, 3, 5\), where \(1, 5, 3\) was expected",
    ),
    "a matrix without the axis of groups": (
        {"geometry": overriding(to_matrix=lambda self, p: DenseGeometry.to_matrix(self, p)[0])},
        r"`to_matrix` of its WrongGeometry gives the shape \(5, 3\), where \(1, 5, 3\) was expected",
    ),
    "a kernel the other way round": (
        {"geometry": overriding(from_matrix=lambda self, m: [ops.transpose(m[0, :-1]), m[0, -1]])},
        r"`from_matrix` of its WrongGeometry, of .*, gives the shape \[\(3, 4\), \(3,\)\], where \[\(4, 3\), \(3,\)\]",
    ),
    "one tensor for two": (
        {"geometry": overriding(from_matrix=lambda self, m: m)},
        r"`from_matrix` of its WrongGeometry, of .*, gives the shape \(1, 5, 3\), where \[\(4, 3\), \(3,\)\] was expected",
    ),
    "no tensor": (
        {"geometry": overriding(to_matrix=lambda self, p: None)},
        r"`to_matrix` of its WrongGeometry gives the shape None, where \(1, 5, 3\) was expected",
    ),
    "other names of parts": (
        {"parts": lambda layer: {"kernel": Part(dense(layer), [layer._kernel, layer.bias])}},
        r"its `parts` gives \['kernel'\], where a dict was expected whose first name is 'statistics'",
    ),
    "no names of parts": (
        {"parts": lambda layer: [Part(dense(layer), [])]},
        "its `parts` gives .*, where a dict was expected",
    ),
    "sizes that are not known": (
        {"parts": of_parameters(lambda layer: DenseGeometry(4, None, True), lambda *parameters: parameters)},
        "its `parts` fails: unsupported operand",
    ),
    "sizes that are none": (
        {"geometry": lambda rows, columns, bias: DenseGeometry(rows, 0, bias)},
        "`output_dim` of its DenseGeometry is 0, where an int of at least 1 was expected",
    ),
    "attributes that are not there": (
        {"parts": lambda layer: layer.matrices},
        "its `parts` fails: 'Halved' object has no attribute 'matrices'",
    ),
}


@pytest.mark.parametrize("name", AT_CAPTURE)
def test_parts_that_make_no_matrix_are_refused_when_captured(name):
    registered, message = AT_CAPTURE[name]
    capturing(**registered)
    model = network()
    with pytest.raises(ValueError, match=rf"Layer 'hidden' cannot be captured as CapturedHalved: {message}") as caught:
        keras_ngd.capture(model, kfac())
    assert "skip=['hidden']" in str(caught.value)
    assert type(model.get_layer("hidden")) is Halved
    assert len(model.weights) == 4
    assert list(keras_ngd.capture(model, kfac(), skip=["hidden"]).captured) == ["outputs"]


# What shows when the first step is traced: the method, what it gives, and what the error says of it.
AT_THE_FIRST_STEP = {
    "rows too wide": (
        "kfac",
        {"input_rows": lambda self, x: ops.pad(DenseGeometry.input_rows(self, x), [(0, 0)] * 3 + [(0, 1)])},
        r"`input_rows` of its WrongGeometry gives the shape \(1, 8, (1|None), 5\), where \(1, 8, positions, 4\) was expected",
    ),
    "rows without positions": (
        "kfac",
        {"input_rows": lambda self, x: ops.expand_dims(x, 0)},
        r"`input_rows` of its WrongGeometry gives the shape \(1, 8, 4\), where \(1, 8, positions, 4\) was expected",
    ),
    "examples as positions": (
        "skfac",
        {"input_rows": lambda self, x: ops.reshape(x, (1, 1, 8, 4))},
        r"`input_rows` of its WrongGeometry gives the shape \(1, 1, 8, 4\), where \(1, 8, positions, 4\) was expected",
    ),
    "rows of inputs for those of gradients": (
        "kfac",
        {"gradient_rows": lambda self, ds: ops.zeros((1, 8, 1, 4))},
        r"`gradient_rows` of its WrongGeometry gives the shape \(1, 8, 1, 4\), where \(1, 8, positions, 3\) was expected",
    ),
    "a factor without the bias": (
        "kfac",
        {"input_second_moment": lambda self, x, weights=None: gram(ops.reshape(x, (1, 8, 4)))},
        r"`input_second_moment` of its WrongGeometry gives the shape \(1, 4, 4\), where \(1, 5, 5\) was expected",
    ),
    "a factor that would be broadcast": (
        "kfac",
        {"gradient_second_moment": lambda self, ds: ops.ones((1, 3, 1))},
        r"`gradient_second_moment` of its WrongGeometry gives the shape \(1, 3, 1\), where \(1, 3, 3\) was expected",
    ),
    "one factor for two": (
        "kfac",
        {"second_moments": lambda self, x, ds, weights=None: [self.input_second_moment(x)]},
        r"`second_moments` of its WrongGeometry gives the shape \[\(1, 5, 5\)\], where \[\(1, 5, 5\), \(1, 3, 3\)\] was expected",
    ),
    "blocks of another size": (
        "thor",
        {"gradient_blocks": lambda self, ds, parts: [ops.ones((1, 3, 1, 1))]},
        r"`gradient_blocks` of its WrongGeometry gives the shape \[\(1, 3, 1, 1\)\], where \[\(1, 1, 2, 2\), \(1, 1, 1, 1\)\]",
    ),
    "means without the one": (
        "sngd",
        {"input_means": lambda self, x, weights=None: ops.expand_dims(x, 0)},
        r"`input_means` of its WrongGeometry gives the shape \(1, 8, 4\), where \(1, 8, 5\) was expected",
    ),
    "sums over examples": (
        "hylo",
        {"gradient_sums": lambda self, ds: ops.sum(self.gradient_rows(ds), axis=1)},
        r"`gradient_sums` of its WrongGeometry gives the shape \(1, (1|None), 3\), where \(1, 8, 3\) was expected",
    ),
    "what fails": (
        "kfac",
        {"input_rows": lambda self, x: ops.reshape(x, (1, 8, 1, 7))},
        r"`input_rows` of its WrongGeometry fails on the shape \(8, 4\): ",
    ),
}


@pytest.mark.parametrize("name", AT_THE_FIRST_STEP)
def test_rows_of_other_shapes_are_refused_at_the_first_step(name):
    method, overridden, message = AT_THE_FIRST_STEP[name]
    capturing(overriding(**overridden))
    x, y = regression(BATCH, INPUTS)
    with pytest.raises(ValueError, match=rf"Layer 'hidden' cannot be captured as CapturedHalved: {message}") as caught:
        fit(captured(network(), METHODS[method]()), x, y)
    assert "skip=['hidden']" in str(caught.value)
    # What was traced for the class as it was is not taken for that of the same name.
    capturing(overriding())
    model = captured(network(), METHODS[method]())
    fit(model, x, y)
    assert model.optimizer.factor_updates == 1


def test_eager_steps_say_the_same():
    _, overridden, message = AT_THE_FIRST_STEP["a factor without the bias"]
    capturing(overriding(**overridden))
    with pytest.raises(ValueError, match=rf"Layer 'hidden' cannot be captured as CapturedHalved: {message}"):
        fit(captured(network(), kfac(), run_eagerly=True, jit_compile=False), *regression(BATCH, INPUTS))


def test_a_mixin_is_checked_too():
    class Rows:
        def input_rows(self, x):
            return ops.expand_dims(x, 0)

    capturing(type("Mixed", (Rows, DenseGeometry), {}))
    with pytest.raises(ValueError, match=r"`input_rows` of its Mixed gives the shape \(1, 8, 4\)"):
        fit(captured(network()), *regression(BATCH, INPUTS))


def test_a_probe_that_is_given_another_geometry():
    capturing(probed=lambda layer: DenseGeometry(INPUTS, OUTPUTS, False))
    with pytest.raises(
        ValueError,
        match=r"'hidden' cannot be captured.* what its statistics make of a batch gives the shape \(1, 4, 4\), where \(1, 5, 5\)",
    ):
        fit(captured(network()), *regression(BATCH, INPUTS))


def test_what_is_right_is_looked_at_once(monkeypatch):
    """Matrices are not made again for layers of geometries that were found to agree."""
    capturing(overriding())
    keras_ngd.capture(network(), kfac())

    def fails(*_):
        raise AssertionError

    monkeypatch.setattr(keras_ngd.backend, "without_computing", fails)
    keras_ngd.capture(network(), kfac())


def test_checked_methods_compute_what_they_did():
    geometry = overriding(input_rows=lambda self, x: 2 * DenseGeometry.input_rows(self, x))(INPUTS, OUTPUTS, True)
    x = np.arange(8, dtype="float32").reshape(2, 4)
    np.testing.assert_array_equal(ops.convert_to_numpy(geometry.input_rows(x))[0, :, 0], 2 * x)
