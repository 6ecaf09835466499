"""Each private name of Keras that the library uses is as it expects, and no other is used."""

import ast
import functools
import importlib
import inspect
import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_ngd import keras_private
from keras_ngd.keras_private import INHERITED, OVERRIDDEN
from tf_tests.small import JIT
from tf_tests.sources import imports, modules

TENSORFLOW = keras.backend.backend() == "tensorflow"


def small(units=2):
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(units, name="inner"), keras.layers.Dense(1)])


def trained(**arguments):
    """A model after a step of SGD, which has built all that a trainer builds."""
    model = small()
    model.compile(keras.optimizers.SGD(0.1, **arguments), "mse", jit_compile=JIT)
    model.train_on_batch(np.ones((2, 3)), np.ones((2, 1)))
    return model


# The functions


def flatten_layers():
    inner = small()
    outer = keras.Sequential([keras.Input((3,)), inner])
    found = keras_private.flatten_layers(outer)
    assert all(any(layer is f for f in found) for layer in (outer, inner, *inner.layers))


def sub_layers():
    inner = keras.layers.Dense(2)
    wrapper = keras.layers.TimeDistributed(inner)
    assert any(layer is inner for layer in keras_private.sub_layers(wrapper))


def unlocked():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    with pytest.raises(ValueError, match="lock|track|built|variables"):
        layer.further = keras.layers.Dense(1)
    with keras_private.unlocked(layer):
        layer.further = keras.layers.Dense(1)
    with pytest.raises(ValueError, match="lock|track|built|variables"):
        layer.another = keras.layers.Dense(1)


def forget_sub_layer():
    layer, sub = keras.layers.Dense(2), keras.layers.Dense(1)
    layer.build((None, 3))
    with keras_private.unlocked(layer):
        layer.further = sub
        sub.build((None, 1))
        assert len(layer.weights) == 4
        keras_private.forget_sub_layer(layer, sub)
        layer.further = None
    assert len(layer.weights) == 2


def forget_weight():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    keras_private.forget_weight(layer, layer.bias)
    assert len(layer.weights) == 1
    with pytest.raises(ValueError, match="lock|track|built|variables"):
        layer.further = keras.layers.Dense(1)


def own_weights():
    layer = keras.layers.BatchNormalization()
    layer.build((None, 3))
    assert {id(v) for v in keras_private.own_weights(layer)} == {id(v) for v in layer.weights}
    assert keras_private.own_weights(small()) == []


def kernel_of():
    for layer, shape in ((keras.layers.Dense(2), (None, 3)), (keras.layers.Conv2D(2, 1), (None, 4, 4, 3))):
        layer.build(shape)
        assert keras_private.kernel_of(layer) is layer.weights[0]
        assert keras_private.kernel_of(layer).trainable


def embeddings_of():
    layer = keras.layers.Embedding(3, 2)
    layer.build()
    assert keras_private.embeddings_of(layer) is layer.weights[0]
    assert keras_private.embeddings_of(layer).trainable


def causal_padding():
    layer = keras.layers.Conv1D(2, 3, dilation_rate=2, padding="causal")
    layer.build((None, 8, 1))
    assert [list(axis) for axis in keras_private.causal_padding(layer)] == [[0, 0], [4, 0], [0, 0]]


def inputs_and_outputs():
    model = keras.Model(x := keras.Input((3,)), keras.layers.Dense(2)(x))
    inputs, outputs = keras_private.inputs_and_outputs(model)
    assert keras.tree.flatten(inputs)[0].shape == (None, 3)
    assert keras.tree.flatten(outputs)[0].shape == (None, 2)


def compile_arguments():
    model = small()
    assert keras_private.compile_arguments(model) == {}
    loss = keras.losses.MeanAbsoluteError()
    model.compile("sgd", loss, loss_weights=[2.0], metrics=["mae"])
    found = keras_private.compile_arguments(model)
    assert found["loss"] is loss
    assert found["loss_weights"] == [2.0]
    assert found["metrics"] == ["mae"]
    assert "weighted_metrics" in found
    # Ours is put in its place where a model is released.
    assert "optimizer" in found
    keras.Model.compile(model, **found)


def build_for_training():
    model = small()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", metrics=["mae"])
    keras_private.build_for_training(model, (np.ones((2, 3), "float32"), np.ones((2, 1), "float32")))
    assert model.optimizer.built
    assert model.metrics_variables


def write_back_state():
    steps = []

    class Reading(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            keras_private.write_back_state(self.model)
            steps.append(int(ops.convert_to_numpy(self.model.optimizer.iterations)))

    model = small()
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=JIT)
    model.fit(np.ones((6, 3)), np.ones((6, 1)), batch_size=2, verbose=0, callbacks=[Reading()])
    assert steps == [1, 2, 3]


def strategy_of_model():
    if not TENSORFLOW:
        assert keras_private.strategy_of_model(small()) is None
        return
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = small()
    assert keras_private.strategy_of_model(model) is strategy
    assert keras_private.strategy_of_model(small()) is None


def strategy_of_optimizer():
    if not TENSORFLOW:
        pytest.skip("of TensorFlow's optimizers alone")
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        optimizer = keras.optimizers.SGD()
    assert keras_private.strategy_of_optimizer(optimizer) is strategy
    assert keras_private.strategy_of_optimizer(keras.optimizers.SGD()) is tf.distribute.get_strategy()


def compiled_loss():
    model = small()
    assert keras_private.compiled_loss(model) is None
    model.compile("sgd", "mse")
    compile_loss = keras_private.compiled_loss(model)
    assert not compile_loss.built
    compile_loss.build(ops.ones((2, 1)), ops.ones((2, 1)))
    assert compile_loss.built


def compiled_metrics():
    model = small()
    assert keras_private.compiled_metrics(model) is None
    model.compile("sgd", "mse", metrics=["mae"])
    metrics = keras_private.compiled_metrics(model)
    assert not metrics.built
    metrics.build(ops.ones((2, 1)), ops.ones((2, 1)))
    assert metrics.built


def flat_losses():
    loss = keras_private.compiled_loss(trained())
    [entry] = keras_private.flat_losses(loss)
    assert isinstance(entry.loss, keras.losses.Loss)
    assert entry.loss_weights is None


def replace_flat_losses():
    loss = keras_private.compiled_loss(trained())
    entries = keras_private.flat_losses(loss)
    keras_private.replace_flat_losses(loss, [e._replace(loss=lambda *arguments: ops.ones(()) * 7) for e in entries])
    assert float(loss(ops.ones((2, 1)), ops.ones((2, 1)))) == 7


def masked_weight():
    mask = ops.convert_to_tensor([1.0, 0.0])
    assert list(ops.convert_to_numpy(keras_private.masked_weight(None, mask, "sum"))) == [1, 0]
    weight = ops.convert_to_tensor([3.0, 5.0])
    # A mean is taken over what is not hidden.
    assert list(ops.convert_to_numpy(keras_private.masked_weight(weight, mask, "mean"))) == [6, 0]


def loss_function():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=3)
    function, arguments = keras_private.loss_function(loss)
    assert function is keras.losses.sparse_categorical_crossentropy
    assert arguments["from_logits"] is True
    assert arguments["ignore_class"] == 3

    class Other(keras.losses.MeanSquaredError):
        def call(self, y_true, y_pred):
            return 2 * super().call(y_true, y_pred)

    assert keras_private.loss_function(Other()) is None
    assert keras_private.loss_function(keras.losses.CosineSimilarity()) is not None


def logits_behind():
    if not TENSORFLOW:
        return
    logits = ops.convert_to_tensor([[1.0, 2.0]])
    assert keras_private.logits_behind(keras.activations.softmax(logits), "Softmax") is logits
    assert keras_private.logits_behind(ops.softmax(logits) * 1, "Softmax") is None


def set_logits():
    if not TENSORFLOW:
        return
    logits, probabilities = ops.convert_to_tensor([[1.0, 2.0]]), ops.convert_to_tensor([[0.5, 0.5]])
    keras_private.set_logits(probabilities, logits)
    loss = keras.losses.CategoricalCrossentropy()(ops.convert_to_tensor([[1.0, 0.0]]), probabilities)
    assert float(loss) == pytest.approx(float(np.log1p(np.e)), rel=1e-5)


def same_rank():
    values, weight = keras_private.same_rank(ops.ones((2, 3)), ops.ones((2, 3, 1)))
    assert values.shape == weight.shape == (2, 3)


def call_context():
    found = []

    class Asking(keras.layers.Layer):
        def call(self, x):
            found.append(keras_private.call_context())
            return x

    model = keras.Sequential([Asking()])
    assert keras_private.call_context() is None
    model(np.ones((2, 3)), training=True)
    assert found[-1].entry_layer is model
    assert found[-1].training is True


def keep_message():
    class Failing(keras.layers.Layer):
        def call(self, inputs):
            error = ValueError("as it is")
            keras_private.keep_message(error)
            raise error

    with pytest.raises(ValueError, match="^as it is$"):
        Failing()(np.ones((2, 3)))


def is_stateless():
    assert not keras_private.is_stateless()
    with keras.StatelessScope():
        assert keras_private.is_stateless()


def over_time():
    def step(inputs, states):
        x, weight = inputs
        total = states[0] + weight * x
        return total, [total]

    x, weights = np.arange(6, dtype="float32").reshape(1, 3, 2), np.array([[[1.0], [10.0], [100.0]]], "float32")
    mask, start = ops.convert_to_tensor([[True, False, True]]), ops.zeros((1, 2))
    for unroll in (False, True):
        last, outputs, states = keras_private.over_time(
            step,
            tuple(map(ops.convert_to_tensor, (x, weights))),
            [start],
            go_backwards=True,
            mask=mask,
            unroll=unroll,
            input_length=3,
            zero_output_for_mask=False,
            return_all_outputs=True,
        )
        np.testing.assert_array_equal(outputs, [[[400.0, 500.0], [400.0, 500.0], [400.0, 501.0]]])
        np.testing.assert_array_equal(last, [[400.0, 501.0]])
        np.testing.assert_array_equal(states[0], [[400.0, 501.0]])


def mask_of():
    found = keras.layers.Masking()(ops.convert_to_tensor([[[0.0], [1.0]]]))
    assert ops.convert_to_numpy(keras_private.mask_of(found)).tolist() == [[False, True]]
    assert keras_private.mask_of(ops.ones((1,))) is None


def set_mask():
    tensor = ops.convert_to_tensor([[1.0, 2.0]])
    keras_private.set_mask(tensor, None)
    assert keras_private.mask_of(tensor) is None
    keras_private.set_mask(tensor, ops.convert_to_tensor([True, False]))
    assert ops.convert_to_numpy(keras_private.mask_of(tensor)).tolist() == [True, False]


def layout_of():
    assert keras_private.layout_of(keras.Variable([1.0])) is None
    if TENSORFLOW:
        return
    mesh = keras.distribution.DeviceMesh((1,), ["batch"], keras.distribution.list_devices()[:1])
    keras.distribution.set_distribution(keras.distribution.DataParallel(device_mesh=mesh, auto_shard_dataset=False))
    try:
        variable = keras.Variable([1.0])
        layout = keras_private.layout_of(variable)
        layout = layout.backend_layout if isinstance(layout, keras.distribution.TensorLayout) else layout
        assert layout.mesh == mesh.backend_mesh
    finally:
        keras.distribution.set_distribution(None)


def set_layout():
    variable = keras.Variable([1.0])
    keras_private.set_layout(variable, "a layout")
    assert keras_private.layout_of(variable) == "a layout"
    if not TENSORFLOW:
        # On one device all layouts are the same, but one that is none is found out.
        with pytest.raises((TypeError, ValueError)):
            variable.assign([2.0])


FUNCTIONS = [
    name
    for name, value in vars(keras_private).items()
    if inspect.isfunction(value) and inspect.getmodule(inspect.unwrap(value)) is keras_private
]


def still_works(name, check, what):
    try:
        check()
    except (AttributeError, AssertionError, ImportError, KeyError, TypeError, ValueError) as error:
        pytest.fail(f"With Keras {keras.__version__} `keras_private` has to be mended: {name} ({what}): {error!r}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    function = getattr(keras_private, name)
    still_works(name, globals()[name], inspect.getdoc(function).splitlines()[0])


# The tables


def called(kind, name, step):
    """How often Keras calls a method of an optimizer under its name in `step`."""
    count = []

    def counting(self, *args, **kwargs):
        count.append(name)
        return getattr(super(own, self), name)(*args, **kwargs)

    own = type("Own", (kind,), {name: counting})
    step(own)
    return len(count)


def one_step(kind):
    model = small()
    model.compile(kind(0.1), "mse", jit_compile=JIT)
    model.train_on_batch(np.ones((2, 3)), np.ones((2, 1)))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in OVERRIDDEN.items() for name in names])
def test_overridden_method_is_called(kind, name):
    assert kind is keras.optimizers.Optimizer
    if name == "_all_reduce_sum_gradients" and not TENSORFLOW:
        pytest.skip("of TensorFlow's optimizers alone")
    why = f"{name} ({OVERRIDDEN[kind][name]})"
    assert hasattr(keras.optimizers.SGD, name), f"Keras {keras.__version__} has no longer {why}"
    assert called(keras.optimizers.SGD, name, one_step), f"Keras {keras.__version__} no longer calls {why}"


def index_of(optimizer, model):
    return [optimizer._get_variable_index(v) for v in model.trainable_variables]


# What each inherited name has to be, of the optimizer of a model that was trained for a step with `use_ema`.
EXPECTED = {
    "_trainable_variables": lambda o, m: (
        [id(v) for v in o._trainable_variables] == [id(v) for v in m.trainable_variables]
    ),
    "_model_variables_moving_average": lambda o, m: (
        [tuple(v.shape) for v in o._model_variables_moving_average] == [tuple(v.shape) for v in m.trainable_variables]
    ),
    "_trainable_variables_indices": lambda o, m: (
        [o._trainable_variables_indices[o._var_key(v)] for v in m.trainable_variables] == [0, 1, 2, 3]
    ),
    "_var_key": lambda o, m: len({o._var_key(v) for v in m.weights}) == len(m.weights),
    "_get_variable_index": lambda o, m: index_of(o, m) == [0, 1, 2, 3],
    "_overwrite_variable_with_gradient": lambda o, m: not any(map(o._overwrite_variable_with_gradient, m.weights)),
    "_iterations": lambda o, m: o._iterations is o.iterations and int(o.iterations) == 1,
    "_learning_rate": lambda o, m: float(ops.convert_to_numpy(o._learning_rate)) == np.float32(0.1),
}


@pytest.mark.parametrize("name", INHERITED[keras.optimizers.Optimizer])
def test_inherited_of_optimizers(name):
    model = trained(use_ema=True)

    def check():
        assert EXPECTED[name](model.optimizer, model), "is no longer what it was"

    still_works(name, check, INHERITED[keras.optimizers.Optimizer][name])


def test_a_weight_that_is_overwritten_is_told():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    weight = keras.layers.Layer().add_weight(name="w", shape=(), initializer="zeros", overwrite_with_gradient=True)
    optimizer = keras.optimizers.SGD(use_ema=True)
    assert optimizer._overwrite_variable_with_gradient(weight)
    assert not optimizer._overwrite_variable_with_gradient(layer.kernel)
    optimizer.build([layer.kernel, weight])
    # Averages pair with variables by position.
    assert optimizer._model_variables_moving_average[1] is None


def test_a_schedule_is_kept_as_such():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    assert keras.optimizers.SGD(schedule)._learning_rate is schedule


@pytest.mark.parametrize("name", INHERITED[keras.optimizers.Adam])
def test_adam_reads_its_moments(name):
    """`Adam.update_step` of an object that has the moments alone, and all else from another optimizer."""
    variable = keras.Variable([1.0])
    sgd = keras.optimizers.SGD(0.1)
    sgd.build([variable])

    class Standing:
        beta_1, beta_2, epsilon, amsgrad = 0.9, 0.999, 1e-7, False
        _momentums, _velocities = [keras.Variable([0.0])], [keras.Variable([0.0])]

        def __getattr__(self, name):
            return getattr(sgd, name)

    standing = Standing()

    def check():
        keras.optimizers.Adam.update_step(standing, ops.ones((1,)), variable, 0.1)
        assert float(getattr(standing, name)[0][0]) > 0, "is not what Adam keeps its moments in"

    still_works(name, check, INHERITED[keras.optimizers.Adam][name])


# No others


# Classes of Keras's whose objects the library's classes extend or hold.
HELD = (
    keras.Model,
    keras.Sequential,
    keras.Variable,
    keras.callbacks.Callback,
    keras.layers.Conv3D,
    keras.layers.Conv1D,
    keras.layers.Dense,
    keras.losses.MeanSquaredError,
    keras.optimizers.Adam,
    keras.optimizers.SGD,
    keras.optimizers.schedules.CosineDecay,
)


def private(names):
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def keras_classes(kind):
    """A class and all that it extends, as far as they are Keras's."""
    return [base for base in kind.__mro__ if base.__module__.startswith("keras.")]


@functools.cache
def private_names(kind):
    """The private names of a class of Keras's: what it defines, and what its source has of `self`."""
    return private({*vars(kind), *re.findall(r"\bself\.(\w+)", inspect.getsource(kind))})


@functools.cache
def of_keras():
    """The private names that any of `HELD`, or a compiled loss, has."""
    model = small()
    model.compile("sgd", "mse")
    held = (*HELD, type(keras_private.compiled_loss(model)), type(keras.Model(x := keras.Input((3,)), x + 1)))
    return frozenset(name for kind in held for base in keras_classes(kind) for name in private_names(base))


def named(tree):
    """Private names that a piece of source names, as attributes, as keywords or in strings; those of definitions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return private(found)


def defined(tree):
    """Private names of methods, and of what is assigned in the body, of a class."""
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            found |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return private(found)


def assigned(tree):
    """Private names that a class gives its own objects: methods, attributes of the class, and what is set on `self`."""
    found = defined(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return private(found)


def classes(name):
    """Pairs of the syntax tree and the class, of each that a module of the library defines."""
    module = importlib.import_module("keras_ngd." + name.removesuffix(".py").replace("/", "."))
    return [(node, getattr(module, node.name)) for node in modules()[name].body if isinstance(node, ast.ClassDef)]


@functools.cache
def own_classes():
    skipped = (
        set() if TENSORFLOW else {"distributed/horovod.py", "distributed/multi_worker.py", "distributed/replicas.py"}
    )
    # Modules that run when they are imported, or are packages.
    return {
        name: classes(name)
        for name in modules()
        if name not in skipped and not name.endswith(("__init__.py", "__main__.py"))
    }


def of_bases(kind):
    """The private names of Keras's that objects of a class of ours have, or of one made with it."""
    relatives = [other for found in own_classes().values() for _, other in found if issubclass(other, kind)]
    return {name for relative in relatives for base in keras_classes(relative) for name in private_names(base)}


def allowed():
    return {name for table in (OVERRIDDEN, INHERITED) for names in table.values() for name in names}


@pytest.mark.parametrize("name", [name for name in modules() if name != "keras_private.py"])
def test_no_other_private_name_of_keras(name):
    tree = modules()[name]
    assert not [i for i in imports(tree) if i.startswith("keras.src")], "`keras.src` is for `keras_private` alone"
    inside = set()
    for node, kind in own_classes().get(name, []):
        used = named(node)
        # Of its own objects: what its bases have, and is not listed.
        taken = (used | defined(node)) & of_bases(kind) - allowed()
        assert not taken, f"{kind.__name__} uses or hides private names of Keras's: {taken}"
        inside |= assigned(node)
    # Of other objects: what Keras's have, unless the module's own classes do.
    others = named(tree) & of_keras() - allowed() - inside
    own = {n for trees in own_classes().values() for node, _ in trees for n in assigned(node)}
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not others - own - functions, f"private names of Keras's, which are for `keras_private`: {others - own}"


def test_tables_list_nothing_that_is_not_used():
    used = set()
    for name, tree in modules().items():
        if name != "keras_private.py":
            used |= named(tree)
            used |= private(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    assert allowed() <= used, f"listed but not used: {allowed() - used}"


def test_keras_private_imports_nothing_of_ours():
    assert not [i for i in imports(modules()["keras_private.py"]) if i.startswith("keras_ngd")]
