"""Turning a model's layers into captured layers and back."""

import contextlib
import fnmatch
import math
import warnings

import keras

from keras_ngd import backend, keras_private, layers, replica, sharding
from keras_ngd.layers.captured import Captured
from keras_ngd.optimizers.blocks import Block, Group
from keras_ngd.optimizers.natural_gradient import NaturalGradient
from keras_ngd.optimizers.plain import plain_sgd
from keras_ngd.report import CaptureReport, LayerReport
from keras_ngd.statistics import Statistics

CAPTURED_KINDS = {kind.plain: kind for kind in (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D)}
OF_ANOTHER = "not trainable here, and captured already: left as it is"
WRAPPERS = (keras.layers.Wrapper, keras.layers.Bidirectional, keras.layers.RNN)


def capture(model, optimizer, skip=None, data=None):
    """Makes a model's layers record what a natural-gradient optimizer needs, in place.

    `Dense`, `Conv1D`, `Conv2D` and `Conv3D` layers, at any depth of nested models and layers, become their
    `keras_ngd.layers` counterparts and gain a small sub-layer of statistics weights. The model stays the same object with the
    same weights of its own and the same results; `get_weights`, `count_params` and `summary` have the statistics too. All
    other layers train by the plain update rule; so do these, with the reason in the report:

    - layers inside wrappers and recurrent layers (`TimeDistributed`, `Bidirectional`, `RNN`), which call them in loops;
    - subclasses of the captured kinds, whose `call` may compute something else;
    - layers that share their kernel with another layer, since the gradient is a sum that no single block describes;
    - layers that are not trainable when captured: unfreeze them, then capture again with a new optimizer (what they record for
      another optimizer stays, such as for that of a discriminator, which is frozen in the model that trains the generator);
    - quantized layers and layers with LoRA enabled.

    A layer called several times per step is captured; its calls count like positions. A mask on the input of
    `Dense` takes the hidden positions out of its statistics. `sample_weight` scales the gradients, hence `G`, and
    leaves `A` as it is; the optimizer makes up for its size. Layers frozen after capture and before training are left to
    Keras: nothing of theirs is trained.

    A loss with a derivative of a captured layer in it (a gradient penalty, a Hessian) is refused when it is differentiated: leave
    such layers out with `skip`.

    Call it before `model.compile`. Calling it again replaces what was recorded before.

    A saved captured model is loaded captured, and resumes exactly, if its layers are in its config, as those of Functional and
    Sequential models are. Subclassed models and custom layers make plain sub-layers anew: loaded, they predict, and their
    optimizer refuses to train. To resume these:

    ```python
    model = keras.models.load_model(path, compile=False)
    keras_ngd.capture(model, optimizer)
    model.compile(optimizer=optimizer, ...)
    model.load_weights(path)
    ```

    Args:
        model: a built Functional, Sequential or subclassed `keras.Model`.
        optimizer: a `keras_ngd` optimizer not yet used, to compile with afterwards; or the registered name of one with its
            defaults, `"keras_ngd>KFAC"`, which `model.compile(optimizer="keras_ngd>KFAC")` then takes as well. (Keras knows short
            names, such as `"adam"`, of its own optimizers alone.)
        skip: layers to leave out: a name, a path or a pattern (`"block1_*"`), a list of these, or a function of the layer
            that returns True for layers to leave out. Default None.
        data: a batch of the model's inputs, or a data set of batches, for what is measured: `THOR(split="auto")`, which takes
            256 examples at most, and for room for rows and steps in an epoch (SKFAC, SNGD, HyLo), where an array of more than
            1,024 examples is not taken for a batch. Default None.

    Returns:
        A `CaptureReport`. Its `warnings`, of layers with large factors, are given as Python's warnings as well.

    Raises:
        TypeError: if `model` or `optimizer` is of the wrong kind.
        ValueError: if the model is not built, the optimizer is in use, no layer can be captured, a pattern matches no
            layer, layers compute in float16 without a static loss scale, or the model or the optimizer was made before the
            active `keras.distribution` was set.
    """
    backend.check_served()
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: {model!r}")
    if isinstance(optimizer, (str, dict)):
        optimizer = keras.optimizers.get(optimizer)
    if not isinstance(optimizer, NaturalGradient):
        raise TypeError(
            f"`optimizer` must be a keras_ngd optimizer, such as keras_ngd.KFAC(...). Received: {optimizer!r}"
        )
    if optimizer.built:
        raise ValueError(
            f"Optimizer {optimizer.name!r} is already in use: its variables are those of the model before this capture. Capture "
            "with a new optimizer."
        )
    with replica.scope_of(model, optimizer):
        return _capture(model, optimizer, skip, data)


def _capture(model, optimizer, skip, data):
    sharding.check([*model.weights, *optimizer.variables])
    for tensor in keras.tree.flatten(getattr(model, "inputs", None) or []):
        sharding.check_batch(tensor.shape[0])
    found = list(_layers_with_weights(model))
    skipped = _skipper(skip, [layer for layer, _ in found])
    _check_built(model, [layer for layer, _ in found if not skipped(layer)])
    decisions = decide(found, skipped)
    if all(reason for _, reason in decisions):
        report = CaptureReport([LayerReport(_path(la), type(la).__name__, reason=reason) for la, reason in decisions])
        raise ValueError(
            f"No layer of model {model.name!r} can be captured, so {optimizer.name} would be plain SGD:\n{report}"
        )
    _check_float16(optimizer, [layer for layer, reason in decisions if not reason])
    optimizer.exchange.connect()
    optimizer.measure(model, data)
    entries = []
    for layer, reason in decisions:
        if reason:
            if reason != OF_ANOTHER:
                _release_layer(layer)
            entries.append(LayerReport(_path(layer), type(layer).__name__, reason=reason))
        else:
            layer.__class__ = CAPTURED_KINDS.get(type(layer), type(layer))
            with contextlib.ExitStack() as scopes:
                for name in layer.path.split("/"):
                    scopes.enter_context(keras.name_scope(name))
                statistics = optimizer.new_statistics(layer)
                if not any(entry.captured for entry in entries):
                    optimizer.loss_carrier.carried_by(statistics)
                layer.attach_statistics(statistics)
            # Eager training records its first batch before it builds the optimizer, which starts all again in its order.
            optimizer.start_statistics(layer.statistics, sum(entry.captured for entry in entries))
            layer.statistics.watched_by(optimizer)
            entries.append(_describe(layer, optimizer))
    optimizer.note_capture(model)
    _forget_compiled_functions(model)
    report = CaptureReport(entries, optimizer)
    for message in report.warnings:
        warnings.warn(message, stacklevel=3)
    return report


def release(model):
    """Turns captured layers back into plain Keras layers, in place; weights and results stay.

    So do layers written as `keras_ngd.layers` in the first place. A model compiled with one of our optimizers is compiled anew
    with `keras.optimizers.SGD` of the same learning rate, momentum and other arguments of SGD's, at the same step, and all else
    as it was: what is saved from a released model loads without this package. Second-order state and momenta are lost.

    Raises:
        TypeError: if `model` is of the wrong kind.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: {model!r}")
    for layer, _ in list(_layers_with_weights(model)):
        _release_layer(layer)
    _forget_compiled_functions(model)
    if model.compiled and isinstance(model.optimizer, NaturalGradient):
        with replica.scope_of(model, model.optimizer):
            # The arguments of the last `compile`, which Keras keeps for saving. A model's own `compile` may take others.
            arguments = {**keras_private.compile_arguments(model), "optimizer": plain_sgd(model.optimizer)}
            keras.Model.compile(model, auto_scale_loss=False, **arguments)
            # An optimizer that is saved before it is built is loaded without its step.
            model.optimizer.build(model.trainable_variables)


def trainable_weights(model):
    """A model's trainable weights without the statistics of captured layers, in their order.

    What a custom training step is to clip, penalise or count: `model.trainable_variables` has the statistics as well, whose
    "gradients" are their new values.
    """
    return [v for v in model.trainable_variables if not hasattr(v, "keras_ngd_statistics")]


def _release_layer(layer):
    if not isinstance(layer, Captured):
        return
    layer.detach_statistics()
    if type(layer) in CAPTURED_KINDS.values():
        layer.__class__ = type(layer).plain


def layers_to_capture(model):
    """The layers of a built model that `capture` would capture."""
    return [layer for layer, reason in decide(list(_layers_with_weights(model))) if not reason]


def decide(found, skipped=lambda layer: ""):
    """Pairs of each layer that was found and the reason why it is not captured, an empty string if it is."""
    owners = _owners(found)
    return [(layer, skipped(layer) or _reason_against(layer, wrapper, owners)) for layer, wrapper in found]


def _layers_with_weights(layer, wrapper=None, seen=None):
    """Yields every layer below `layer` that owns weights (or may), once, with the outermost wrapper it is inside of."""
    seen = set() if seen is None else seen
    if wrapper is None and isinstance(layer, WRAPPERS):
        wrapper = layer
    for sub in keras_private.sub_layers(layer):
        if id(sub) in seen or isinstance(sub, (Statistics, keras.Metric)):
            continue
        seen.add(id(sub))
        if keras_private.own_weights(sub) or isinstance(sub, tuple(CAPTURED_KINDS)):
            yield sub, wrapper
        yield from _layers_with_weights(sub, wrapper, seen)


def _path(layer):
    return layer.path or layer.name


def _check_built(model, needed):
    unbuilt = [layer.name for layer in needed if not layer.built]
    if not model.built or unbuilt:
        what = f"its layer {unbuilt[0]!r} has" if model.built else "it has"
        raise ValueError(
            f"Model {model.name!r} is not built ({what} no weights yet), so its layers' shapes are unknown. Call it on a batch "
            "of data, or `model.build(input_shape)`, before `capture`."
        )


def _skipper(skip, candidates):
    if callable(skip) and not isinstance(skip, keras.layers.Layer):
        return lambda layer: "left out by `skip`" if skip(layer) else ""
    skip = () if skip is None else skip
    patterns = list(skip) if isinstance(skip, (list, tuple, set, frozenset)) else [skip]

    def matches(layer, pattern):
        return fnmatch.fnmatchcase(layer.name, pattern) or fnmatch.fnmatchcase(_path(layer), pattern)

    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"`skip` takes names, patterns or a function of the layer. Received: {pattern!r}")
        if not any(matches(layer, pattern) for layer in candidates):
            names = ", ".join(map(_path, candidates))
            raise ValueError(f"`skip` names {pattern!r}, which matches no layer with weights. There are: {names}")
    return lambda layer: "left out by `skip`" if any(matches(layer, p) for p in patterns) else ""


def _owners(found):
    """The layers that own each variable, by the variable's identity."""
    owners = {}
    for layer, _ in found:
        for variable in keras_private.own_weights(layer):
            owners.setdefault(id(variable), []).append(layer)
    return owners


def _reason_against(layer, wrapper, owners):
    """Why a layer is not captured, or an empty string."""
    if type(layer) not in CAPTURED_KINDS and type(layer) not in CAPTURED_KINDS.values():
        for kind in CAPTURED_KINDS:
            if isinstance(layer, kind):
                return f"a subclass of {kind.__name__}: its call may compute something else"
        return "not a captured kind"
    if wrapper is not None:
        return f"inside {type(wrapper).__name__} {wrapper.name!r}, which calls it in its own way"
    if getattr(layer, "quantization_mode", None) is not None:
        return "quantized"
    if layer.lora_enabled:
        return "LoRA is enabled: its kernel is not what is trained"
    if not layer.trainable and getattr(layer, "statistics", None) is not None:
        return OF_ANOTHER
    if not layer.trainable or not keras_private.kernel_of(layer).trainable:
        return "not trainable: unfreeze it, then capture again"
    if layer.use_bias and not layer.bias.trainable:
        return "its bias is not trainable, its kernel is"
    sharing = [other for other in owners[id(keras_private.kernel_of(layer))] if other is not layer]
    if sharing:
        return f"shares its kernel with {sharing[0].path!r}"
    return ""


def _check_float16(optimizer, captured):
    if optimizer.loss_scale_factor is not None:
        return
    for layer in captured:
        if layer.compute_dtype == "float16":
            raise ValueError(
                f"Layer {layer.path!r} computes in float16, where Keras scales the loss dynamically; the statistics would carry "
                "the square of a scale the optimizer is not told. Use the `mixed_bfloat16` policy, or "
                "keras_ngd.KFAC(..., loss_scale_factor=1024.0) with model.compile(..., auto_scale_loss=False)."
            )


def _describe(layer, optimizer):
    block = Block(layer.path, keras_private.kernel_of(layer), layer.bias, layer.statistics)
    averages = layer.statistics.averages
    shapes = [sharding.shape_of(v) for v in averages]
    size = backend.itemsize(averages[0].dtype) * sum(map(math.prod, shapes))
    shapes = tuple(s[1:] if s[0] == 1 else s for s in shapes if len(s) > 2)
    kind = type(layer).plain.__name__
    size += optimizer.make_curvature(Group([block])).bytes + optimizer.further_bytes(block)
    return LayerReport(layer.path, kind, shapes, size)


def _forget_compiled_functions(model):
    """Functions traced before have the plain layers in them."""
    for sub in keras_private.flatten_layers(model):
        if isinstance(sub, keras.Model):
            sub.train_function = sub.test_function = sub.predict_function = None
