"""What every method owes: a row for each method, a test for each obligation.

A new method is a line of `METHODS`; arguments that no other has go into `VALUES`, with a value that is not the default.
"""

import collections
import dataclasses
import inspect
import json
from collections.abc import Callable

import keras
import numpy as np
import pytest
from keras import layers

import keras_ngd
from keras_ngd.optimizers import NaturalGradient
from keras_ngd.optimizers.arguments import NOT_OF_ROWS, listed, taken
from tf_tests import small
from tf_tests.distributed import replicas
from tf_tests.loops import custom_step
from tf_tests.reference import eigenbasis, kronecker, low_rank, rows
from tf_tests.reference.running import close
from tf_tests.small import array, assert_close, assert_same, captured, fit, policy, regression, statistics, weights

BATCH = 8


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        kind: the class.
        every_step: the arguments with which it records and refreshes at every step.
        reference: function `(a, ghat, v, mean)` of a layer's rows and gradient in float64, and the mean eigenvalue of all layers'
            Fisher blocks: the gradient preconditioned at the default damping, for a loss of 1.
        refuses: arguments of `NaturalGradient` or of the class it builds on that it does not take, with a value.
        scaled: whether steps are in units of the loss, and bounded by it. Default True.
        values: for arguments that take others than `VALUES` has.
        tolerance: of the first step. Default 1e-4.
    """

    kind: type
    every_step: dict
    reference: Callable
    refuses: dict = dataclasses.field(default_factory=dict)
    scaled: bool = True
    values: dict = dataclasses.field(default_factory=dict)
    tolerance: float = 1e-4

    def make(self, **arguments):
        return self.kind(**{**self.every_step, **self.takes({"momentum": 0.0}), **arguments})

    def takes(self, arguments):
        """Those of `arguments` that the method has."""
        return {
            k: self.values.get(k, v) for k, v in arguments.items() if k in taken(self.kind) and k not in self.refuses
        }


def factors(a, ghat):
    return kronecker.input_factor(a)[0], kronecker.output_factor(ghat, BATCH)[0]


def by_factors(a, ghat, v, mean):
    return kronecker.dense_preconditioned(*factors(a, ghat), v, 0.5 * mean)


def by_rows_of_factors(a, ghat, v, mean):
    return kronecker.dense_preconditioned(*factors(a, ghat), v, 1.0, "relative")


def by_split_factors(a, ghat, v, mean):
    within = [np.kron(np.eye(3), np.ones((2, 2)))[: len(f), : len(f)] for f in factors(a, ghat)]
    split = [f * mask for f, mask in zip(factors(a, ghat), within, strict=True)]
    return kronecker.dense_preconditioned(*split, v, 0.5 * mean)


def by_rows(a, ghat, v, mean, apply=low_rank.dense_preconditioned):
    a, g = (r[0] for r in low_rank.example_rows(a, ghat, BATCH))
    return apply(a, g, v, 0.3 * np.trace(low_rank.kernel(a, g)) / BATCH)


def by_few_rows(a, ghat, v, mean):
    return by_rows(a, ghat, v, mean, lambda *block: low_rank.interpolated(*block, rank=3))


def by_second_moments(a, ghat, v, mean):
    """Its first step at the default decay, with `S` begun at the factors' eigenvalues."""
    inside, values = eigenbasis.rotated(v, *factors(a, ghat)), [np.linalg.eigvalsh(f) for f in factors(a, ghat)]
    second = 0.95 * np.outer(*values) + 0.05 * BATCH * inside**2
    return eigenbasis.rotated_back(inside / (second + 0.5 * mean), *factors(a, ghat))


def by_signs(a, ghat, v, mean):
    """Adam's first step, in the eigenbasis."""
    return eigenbasis.rotated_back(np.sign(eigenbasis.rotated(v, *factors(a, ghat))), *factors(a, ghat))


EACH = {"factor_interval": 1, "inverse_interval": 1}
ROWS = {"interval": 1, "batch_size": BATCH}
OF_WORKERS = {"factor_interval": 2, "inverse_interval": 2, "stagger": True}
OF_WORKERS |= {"gradient_worker_fraction": 0.5, "reduce_scatter": True}
assert set(OF_WORKERS) == set(NOT_OF_ROWS)
NOT_HELD_BY_ALL = {"gradient_worker_fraction": 0.5, "reduce_scatter": True}
OF_STEPS = {"damping": 0.1, "momentum": 0.5, "nesterov": True, "kl_clip": 0.1, "loss_clip": 0.5, "length_clip": 0.5}
OF_STEPS |= {"fisher_scale": None, "rest": "sgd"}

METHODS = [
    Method(keras_ngd.KFAC, EACH, by_factors),
    Method(keras_ngd.THOR, EACH | {"split": 2}, by_split_factors, {"reduce_scatter": True}),
    Method(keras_ngd.SKFAC, ROWS, by_rows_of_factors, OF_WORKERS),
    Method(keras_ngd.SNGD, ROWS, by_rows, OF_WORKERS | {"factor_decay": 0.5}),
    Method(keras_ngd.HyLo, ROWS | {"rank": 3, "mode": "kid"}, by_few_rows, OF_WORKERS | {"factor_decay": 0.5}),
    Method(keras_ngd.EKFAC, EACH, by_second_moments, NOT_HELD_BY_ALL, values={"split": 3}),
    Method(keras_ngd.EigenAdam, EACH, by_signs, NOT_HELD_BY_ALL | OF_STEPS, False, {"split": 3}, 1e-3),
]

# A value for every argument that is not its default for any method. (`shard_state` needs devices of a `keras.distribution`.)
VALUES = {
    "learning_rate": 0.03,
    "damping": 0.2,
    "damping_mode": "relative",
    "momentum": 0.8,
    "factor_decay": 0.7,
    "factor_interval": 3,
    "inverse_interval": 6,
    "interval": 7,
    "batch_size": 32,
    "inverse": "newton-schulz",
    "weight_sharing": "reduce",
    "losses_per_example": 2.0,
    "statistics_fraction": 0.5,
    "fisher": "sampled",
    "likelihood": keras_ngd.fisher.Gaussian(curvature=3.0),
    "kl_clip": 0.01,
    "loss_clip": 0.5,
    "length_clip": 0.3,
    "fisher_scale": None,
    "interval_growth": 0.2,
    "rest": "sgd",
    "rest_learning_rate": 0.01,
    "communicator": "local",
    "stagger": True,
    "gradient_worker_fraction": 0,
    "reduce_scatter": True,
    "not_captured": 3,
    "nesterov": True,
    "weight_decay": 0.01,
    "clipnorm": 2.0,
    "use_ema": True,
    "ema_momentum": 0.9,
    "ema_overwrite_frequency": 5,
    "loss_scale_factor": 8.0,
    "name": "mine",
    # THOR's
    "split": {"conv*": 9},
    "omega": (0.02, 0.001),
    "trace_damping": "full",
    "stop_patience": 3,
    # SKFAC's
    "convolution": "subsample",
    "positions": 3,
    "history": 2,
    # HyLo's
    "rank": 5,
    "mode": "random",
    "sampling": "replacement",
    "power": 1.0,
    "residual": False,
    "eta": 0.5,
    "decay_ratio": 0.5,
    "steps_per_epoch": 7,
    "seed": 9,
    # EKFAC's and EigenAdam's
    "scale": "examples",
    "basis": "gradient",
    "beta_1": 0.8,
    "beta_2": 0.99,
    "epsilon": 1e-6,
    "decomposition": "eigh",
    "basis_tolerance": 0.1,
}
# Keras takes one way of clipping.
NO_VALUES = {"shard_state", "clipvalue", "global_clipnorm"}

SCHEDULES = {
    "learning_rate": keras.optimizers.schedules.CosineDecay(0.1, 100),
    "damping": keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5),
    "factor_interval": keras.optimizers.schedules.PiecewiseConstantDecay([10], [1, 5]),
    "inverse_interval": keras_ngd.schedules.GrowingInterval(10, 1.5, 100),
    "interval": keras_ngd.schedules.GrowingInterval(10, 1.5, 100),
    "rest_learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5),
}

# With these, every kind of state is half done after four steps: intervals, a history that is not full, draws, the sum of an
# epoch's gradients, changes of a trace, momenta.
HALFWAY = {
    "learning_rate": keras.optimizers.schedules.ExponentialDecay(0.05, 4, 0.9),
    "damping": keras.optimizers.schedules.PolynomialDecay(1.0, 10, 0.5),
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "factor_decay": 0.5,
    "factor_interval": 3,
    "inverse_interval": 3,
    "interval": 3,
    "interval_growth": None,
    "split": 3,
    "omega": (0.3, 0.01),
    "convolution": "subsample",
    "positions": 2,
    "history": 3,
    "mode": "switch",
    "eta": 0.4,
    "steps_per_epoch": 3,
    "seed": 7,
}


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.kind.__name__)
def method(request):
    return request.param


def network():
    """A frozen layer and two of one shape that are captured."""
    keras.utils.set_random_seed(1)
    h = inputs = keras.Input((4,))
    for name in ("frozen", "hidden", "outputs"):
        h = layers.Dense(4, activation=None if name == "outputs" else "tanh", name=name, trainable=name != "frozen")(h)
    return keras.Model(inputs, h)


def images():
    """A convolution and a dense layer, whose rows are fewer than both of their sides and more than one."""
    return keras.Sequential(
        [
            keras.Input((3, 4, 4)),
            layers.Conv2D(4, 3, padding="same", activation="tanh"),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )


def image_data():
    x = np.random.default_rng(0).normal(size=(4 * BATCH, 3, 4, 4)).astype("float32")
    return x, x[:, 1, 1]


def curvature(model):
    """Copies of what was recorded, and of what was made of it."""
    blocks, groups = model.optimizer.layout.blocks, model.optimizer.layout.groups
    found = [v for block in blocks for v in block.statistics.averages]
    found += [v for group in groups for v in group.curvature.variables]
    return {f"{i} {v.path}": array(v) for i, v in enumerate(found)}


def everything(model):
    return {f"{i} {v.path}": array(v) for i, v in enumerate(model.weights + model.optimizer.variables)}


@dataclasses.dataclass
class Trained:
    """A captured network, and what it was like after each of two batches and after one that is not finite."""

    model: keras.Model
    traces: list
    weights: list
    curvature: list
    counts: list

    @property
    def optimizer(self):
        return self.model.optimizer


@pytest.fixture(scope="module")
def trained(method):
    """One compiled step serves several obligations."""
    with pytest.MonkeyPatch.context() as patch:
        apply, traces = NaturalGradient.apply, []

        def counted(self, *args, **kwargs):
            traces.append(self)
            return apply(self, *args, **kwargs)

        patch.setattr(NaturalGradient, "apply", counted)
        model = captured(network(), method.make())
        found = Trained(model, traces, [weights(model)], [{}], [])

        def train(x, y, **arguments):
            fit(model, x, y, **arguments)
            found.weights.append(weights(model))
            found.curvature.append(curvature(model))
            optimizer = model.optimizer
            found.counts.append((optimizer.factor_updates, optimizer.skipped_statistics, optimizer.skipped_steps))

        x, y = regression(2 * BATCH)
        for i in range(2):
            train(x[i * BATCH : (i + 1) * BATCH], y[i * BATCH : (i + 1) * BATCH])
        bad = x[:BATCH].copy()
        bad[2, 1] = np.nan
        train(bad, y[:BATCH])
        train(x, y, epochs=2, validation_data=(x, y))
        model.predict(x, verbose=0)
    return found


# Training


def clipped(method, loss):
    """What is left of a step by the bound at defaults, of the loss in units of the step's squared length."""
    return min(1.0, np.sqrt(0.4 * loss) if "factor_interval" in method.every_step else loss)


def first_step(method, start):
    """What the first step adds to the kernels and biases of both captured layers at a learning rate of 1, in float64."""
    w0, b0, w1, b1, w2, b2 = (v.astype("float64") for v in start.values())
    x, y = regression(2 * BATCH)
    x, y = x[:BATCH].astype("float64"), y[:BATCH].astype("float64")
    before = np.tanh(x @ w0 + b0)
    hidden = np.tanh(before @ w1 + b1)
    error = hidden @ w2 + b2 - y
    upstream = 2 * error / y.size
    found, length, loss = [], 0.0, np.mean(error**2)
    blocks = [
        (rows.append_ones(rows.dense_rows(inputs)), rows.dense_rows(gradients))
        for inputs, gradients in ((before, upstream @ w2.T * (1 - hidden**2)), (hidden, upstream))
    ]
    vs = [np.einsum("knti,knto->io", a, ghat) for a, ghat in blocks]
    mean = sum(np.prod([np.trace(f) for f in factors(*block)]) for block in blocks) / sum(v.size for v in vs)
    for (a, ghat), v in zip(blocks, vs, strict=True):
        direction = method.reference(a, ghat, v, mean)
        if not method.scaled:
            found.append(direction)
            continue
        direction = loss * direction
        # The clip bounds the step of each block, then that of all.
        share = clipped(method, loss / np.sum(direction * v))
        found.append(direction * share)
        length += share * np.sum(direction * v)
    shortened = clipped(method, loss / length) if method.scaled else 1.0
    return [-shortened * part for p in found for part in (p[:-1], p[-1])]


def test_the_first_step_is_that_of_the_reference(method, trained):
    rate = float(array(trained.optimizer.learning_rate))
    before, after = ([*w.values()] for w in trained.weights[:2])
    for old, new, expected in zip(before[2:], after[2:], first_step(method, trained.weights[0]), strict=True):
        close(new - old, rate * expected, method.tolerance)


def test_one_trace_serves_all_of_fit(trained):
    assert trained.traces == [trained.optimizer]


def test_a_batch_that_is_not_finite_changes_nothing_and_is_counted(trained):
    assert trained.counts == [(1, 0, 0), (2, 0, 0), (2, 1, 1), (6, 1, 1)]
    assert_same(trained.weights[3], trained.weights[2])
    assert_same(trained.curvature[3], trained.curvature[2])
    assert all(np.isfinite(v).all() for v in (*trained.weights[4].values(), *trained.curvature[4].values()))
    assert any(np.any(v != trained.weights[3][path]) for path, v in trained.weights[4].items())


def test_a_frozen_layer_stays_as_it_is(trained):
    assert not hasattr(trained.model.get_layer("frozen"), "statistics")
    assert [block.layer for block in trained.optimizer.layout.blocks] == ["hidden", "outputs"]
    for path, value in trained.weights[4].items():
        assert np.array_equal(value, trained.weights[0][path]) == path.startswith("frozen"), path


def test_a_clone_has_statistics_of_its_own(trained):
    model, clone = trained.model, keras.models.clone_model(trained.model)
    for name in ("hidden", "outputs"):
        own, other = (m.get_layer(name).statistics for m in (model, clone))
        assert other.spec == own.spec
        assert not {id(v) for v in own.weights} & {id(v) for v in other.weights}
        # Averages of the input side and of the output side.
        assert [array(v).any() for v in own.averages[:2]] == [True, True]
        assert [array(v).any() for v in other.averages[:2]] == [False, False]
    assert type(clone.get_layer("frozen")) is layers.Dense
    clone.set_weights(model.get_weights())
    assert_same(statistics(clone), statistics(model))


def test_a_clone_compiled_by_xla_takes_the_same_steps(method, trained):
    """With an optimizer of the same configuration."""
    clone, before = keras.models.clone_model(trained.model), weights(trained.model)
    optimizer = method.kind.from_config(trained.optimizer.get_config())
    for variable, value in zip(keras_ngd.trainable_weights(clone), [*trained.weights[0].values()][2:], strict=True):
        variable.assign(value)
    clone.get_layer("frozen").set_weights([*trained.weights[0].values()][:2])
    clone.compile(optimizer=optimizer, loss="mse", jit_compile=True)
    fit(clone, *regression(2 * BATCH))
    assert optimizer.factor_updates == 2
    assert_close(weights(clone), trained.weights[2], tolerance=1e-4)
    assert_same(weights(trained.model), before)


def test_a_loop_of_ones_own_takes_the_same_steps(method, trained):
    model, optimizer = network(), method.make()
    keras_ngd.capture(model, optimizer)
    step = custom_step(model, optimizer, scaled=True)
    x, y = regression(2 * BATCH)
    for i in range(2):
        step(x[i * BATCH : (i + 1) * BATCH], y[i * BATCH : (i + 1) * BATCH])
    assert optimizer.factor_updates == 2
    assert_close(weights(model), trained.weights[2])


def test_trains_in_mixed_bfloat16(method):
    with policy("mixed_bfloat16"):
        model = captured(network(), method.make())
    x, y = regression()
    before = model.evaluate(x, y, verbose=0)
    assert fit(model, x, y, epochs=3).history["loss"][-1] < before
    assert model.optimizer.factor_updates == 12
    assert model.optimizer.skipped_steps == model.optimizer.skipped_statistics == 0
    assert model.get_layer("hidden").compute_dtype == "bfloat16"
    assert {v.dtype for v in model.get_layer("hidden").statistics.weights} == {"float32"}


def test_training_that_was_saved_goes_on_to_the_same_bits(method, tmp_path):
    model = captured(images(), method.make(**method.takes(HALFWAY)))
    fit(model, *image_data())
    updates = model.optimizer.factor_updates
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert_same(everything(loaded), everything(model))
    for each in (model, loaded):
        fit(each, *image_data())
    assert_same(everything(loaded), everything(model))
    assert model.optimizer.factor_updates > updates


@pytest.fixture(scope="module")
def on_two_replicas(tmp_path_factory):
    return replicas.mirrored("obligations", 2, tmp_path_factory.mktemp("two"))


def with_all_rows(method):
    """A captured and compiled network. Replicas that choose a few of their own rows would choose others."""
    return captured(network(), method.make(**method.takes({"rank": 1.0})))


@pytest.mark.slow
@pytest.mark.skipif(small.JIT, reason="tf.distribute serves the TensorFlow backend")
def test_two_replicas_take_the_same_steps(method, on_two_replicas):
    found, model = on_two_replicas[method.kind.__name__], with_all_rows(method)
    fit(model, *regression(5 * BATCH))
    assert small.relative_distance(found["weights"], weights(model)) < 1e-5
    assert found["same"]


# Arguments


def test_without_capture_there_is_an_error(method):
    name = method.kind.__name__
    with pytest.raises(ValueError, match=rf"{name} found no captured.*`keras_ngd.capture\(model, optimizer\)` before"):
        fit(small.compiled(network(), method.make()), *regression(BATCH))


def test_what_it_does_not_take_is_refused_by_name(method):
    for name, value in {**method.refuses, "gradient_accumulation_steps": 2}.items():
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            method.kind(**{name: value})


def test_the_docstring_lists_all_arguments_and_no_others(method):
    found = collections.Counter(listed(inspect.getdoc(method.kind), indentation=4))
    assert found == dict.fromkeys(set(taken(method.kind)) - set(method.refuses), 1)
    # Not by the library's own list of what is taken.
    bases = (method.kind, NaturalGradient, keras.optimizers.SGD)
    names = {name for kind in bases for name in inspect.signature(kind).parameters}
    assert names - {"kwargs", "gradient_accumulation_steps"} - set(method.refuses) <= set(found)


@pytest.mark.parametrize("values", [VALUES, SCHEDULES], ids=["values", "schedules"])
def test_every_argument_comes_back_from_the_configuration(values, method):
    assert set(taken(method.kind)) <= set(VALUES) | NO_VALUES
    arguments = method.takes(values)
    optimizer = method.kind(**arguments)
    config = json.dumps(keras.saving.serialize_keras_object(optimizer))
    again = keras.saving.deserialize_keras_object(json.loads(config))
    assert type(again) is method.kind
    assert again.get_config() == optimizer.get_config()
    assert method.kind.from_config(json.loads(json.dumps(optimizer.get_config()))).get_config() == again.get_config()
    # Which mode is the default depends on whether there is a damping.
    plain = json.loads(json.dumps(method.kind(**method.takes({"damping": 0.3})).get_config()))
    given = json.loads(json.dumps(arguments, default=keras.saving.serialize_keras_object))
    for name, value in given.items():
        found = json.loads(config)["config"][name]
        assert found == (pytest.approx(value) if isinstance(value, float) else value), name
        assert found != plain.get(name), name
