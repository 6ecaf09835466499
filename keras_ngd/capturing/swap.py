"""Turning a model's layers into captured layers and back."""

import contextlib
import importlib
import math
import sys
import warnings
from typing import Any

import keras

from keras_ngd import backend, keras_private, layers, replica, sharding
from keras_ngd.capturing import policy
from keras_ngd.capturing.walk import layers_with_weights, path_of, stood_for
from keras_ngd.layers.captured import Captured
from keras_ngd.layers.container import Container
from keras_ngd.optimizers.blocks import Block, Group
from keras_ngd.optimizers.natural_gradient import NaturalGradient
from keras_ngd.optimizers.plain import plain_sgd
from keras_ngd.report import CaptureReport, LayerReport
from keras_ngd.typing import Shape, Variable


def capture(
    model: keras.Model,
    optimizer: NaturalGradient | str,
    skip: policy.Selection,
    include: policy.Selection,
    data: Any,
    analysis: Any,
) -> CaptureReport:
    """Captures a model, as `keras_ngd.capture` says.

    Args:
        model, optimizer, skip, include, data: as for `keras_ngd.capture`.
        analysis: what methods measure with before layers are captured for them: `keras_ngd.analysis`, which stands above.
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
        return _capture(model, optimizer, skip, include, data, analysis)


def _capture(
    model: keras.Model,
    optimizer: NaturalGradient,
    skip: policy.Selection,
    include: policy.Selection,
    data: Any,
    analysis: Any,
) -> CaptureReport:
    if "keras_hub" in sys.modules:
        importlib.import_module("keras_ngd.layers.of_keras_hub")
    sharding.check([*model.weights, *optimizer.variables])
    for tensor in keras.tree.flatten(getattr(model, "inputs", None) or []):
        sharding.check_batch(tensor.shape[0])
    found = list(layers_with_weights(model))
    candidates = [layer for layer, _ in found]
    skipped, included = policy.selector("skip", skip, candidates), policy.selector("include", include, candidates)
    policy.check_built(model, [layer for layer, _ in found if not skipped(layer)])
    decisions = policy.decide(found, skipped, included)
    if all(reason for _, reason in decisions):
        report = CaptureReport([_left_out(layer, reason) for layer, reason in decisions])
        raise ValueError(
            f"No layer of model {model.name!r} can be captured, so {optimizer.name} would be plain SGD:\n{report}"
        )
    policy.check_float16(optimizer, [layer for layer, reason in decisions if not reason])
    optimizer.exchange.connect()
    optimizer.measure(model, data, analysis)
    entries: list[LayerReport] = []
    recorded = 0
    for layer, reason in decisions:
        if reason:
            if reason != policy.OF_ANOTHER:
                _release_layer(layer)
            entries.append(_left_out(layer, reason))
        else:
            layer.__class__ = layers.kind_of(layer)
            with contextlib.ExitStack() as scopes:
                for name in layer.path.split("/"):
                    scopes.enter_context(keras.name_scope(name))
                statistics = {n: optimizer.new_statistics(layer, part.geometry) for n, part in layer.parts().items()}
                if not recorded:
                    optimizer.loss_carrier.carried_by(next(iter(statistics.values())))
                layer.attach_statistics(statistics)
            for of_part in statistics.values():
                # Eager training records its first batch before it builds the optimizer, which starts all again in its order.
                optimizer.start_statistics(of_part, recorded)
                of_part.watched_by(optimizer)
                recorded += 1
            entries.append(_describe(layer, optimizer))
    _swap_containers(model)
    optimizer.note_capture(model)
    _forget_compiled_functions(model)
    report = CaptureReport(entries, optimizer)
    for message in report.warnings:
        warnings.warn(message, stacklevel=4)
    return report


def _describe(layer: keras.layers.Layer, optimizer: NaturalGradient) -> LayerReport:
    shown: list[Shape] = []
    names: list[str] = []
    size, cost, numbers = 0, 0.0, 0
    for statistics in layer.all_statistics().values():
        block, averages = Block.of(statistics), statistics.averages
        shapes = [sharding.shape_of(v) for v in averages]
        shown += [s[1:] if s[0] == 1 else s for s in shapes if len(s) > 2]
        size += backend.itemsize(averages[0].dtype) * sum(map(math.prod, shapes))
        curvature = optimizer.curvature_of(Group([block]))
        size += curvature.bytes + optimizer.further_bytes(block)
        cost += curvature.refresh_cost
        numbers += sum(math.prod(v.shape) for v in block.variables)
        names.append(optimizer.approximation_of(block.geometry).name_of(curvature))
    return LayerReport(
        layer.path,
        type(layer).plain.__name__,
        tuple(shown),
        size,
        parameters=_own_parameters(layer),
        captured_parameters=numbers,
        curvature=", ".join(dict.fromkeys(names)),
        refresh_cost=cost,
    )


def _left_out(layer: keras.layers.Layer, reason: str) -> LayerReport:
    return LayerReport(path_of(layer), type(layer).__name__, reason=reason, parameters=_own_parameters(layer))


def _own_parameters(layer: keras.layers.Layer) -> int:
    """How many numbers a layer itself trains, and those that it stands for in a report."""
    owners = [layer, *(layer.stands_for() if isinstance(layer, Captured) else [])]
    trained = [v for owner in owners for v in keras_private.own_weights(owner) if v.trainable]
    return sum(math.prod(v.shape) for v in trained if not hasattr(v, "keras_ngd_statistics")) if layer.trainable else 0


def _swap_containers(model: keras.Model) -> None:
    """Layers in whose config captured layers in them would be lost become such as list them."""
    for layer in keras_private.flatten_layers(model):
        kind = layers.CONTAINER_KINDS.get(type(layer))
        if kind is not None and Container.captured_layers(layer):
            layer.__class__ = kind


def release(model: keras.Model) -> None:
    """Turns captured layers back into plain Keras layers, in place; weights and results stay.

    So do layers written as `keras_ngd.layers` in the first place. A model compiled with one of our optimizers is compiled anew
    with `keras.optimizers.SGD` of the same learning rate, momentum and other arguments of SGD's, at the same step, and all else
    as it was: what is saved from a released model loads without this package. Second-order state and momenta are lost.

    Raises:
        TypeError: if `model` is of the wrong kind.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: {model!r}")
    for layer, _ in list(layers_with_weights(model)):
        _release_layer(layer)
    for layer in keras_private.flatten_layers(model):
        if type(layer) in layers.CONTAINER_KINDS.values():
            layer.__class__ = type(layer).plain
    _forget_compiled_functions(model)
    if model.compiled and isinstance(model.optimizer, NaturalGradient):
        with replica.scope_of(model, model.optimizer):
            # The arguments of the last `compile`, which Keras keeps for saving. A model's own `compile` may take others.
            arguments = {**keras_private.compile_arguments(model), "optimizer": plain_sgd(model.optimizer)}
            keras.Model.compile(model, auto_scale_loss=False, **arguments)
            # An optimizer that is saved before it is built is loaded without its step.
            model.optimizer.build(model.trainable_variables)


def _release_layer(layer: keras.layers.Layer) -> None:
    for inside in stood_for(layer):
        _release_layer(inside)
    if not isinstance(layer, Captured):
        return
    layer.detach_statistics()
    if type(layer) in layers.CAPTURED_KINDS.values():
        layer.__class__ = type(layer).plain


def _forget_compiled_functions(model: keras.Model) -> None:
    """Functions traced before have the plain layers in them."""
    for sub in keras_private.flatten_layers(model):
        if isinstance(sub, keras.Model):
            sub.train_function = sub.test_function = sub.predict_function = None


def trainable_weights(model: keras.Model) -> list[Variable]:
    """A model's trainable weights without the statistics of captured layers, in their order.

    What a custom training step is to clip, penalise or count: `model.trainable_variables` has the statistics as well, whose
    "gradients" are their new values.
    """
    return [v for v in model.trainable_variables if not hasattr(v, "keras_ngd_statistics")]
