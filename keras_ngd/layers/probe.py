"""The probe: the identity in the forward pass; in the backward pass, where statistics are taken.

Keras trainers differentiate the loss with respect to every trainable weight, a layer's statistics weights included. The
probe's custom gradient hands the true gradient on unchanged and emits, as the "gradients" of the statistics weights, their
new values; weights marked `overwrite_with_gradient` are then overwritten with them, by Keras's own convention. Hence no
hooks, no custom training loop, and a pure function that XLA compiles.
"""

from keras import ops

from keras_ngd import backend
from keras_ngd.layers import surroundings


def probe(s, x, rows, statistics, weights=None):
    """Returns `s`, and has `statistics` observe `x` and the gradient of `s` in the backward pass.

    Args:
        s: the layer's pre-activation.
        x: the layer's input.
        rows: the layer's `Rows`.
        statistics: the layer's `Statistics`.
        weights: optional row weights (a mask), as `rows` takes them.
    """
    if backend.is_sparse_tensor(x):
        path = statistics.owner().path
        raise ValueError(
            f"Layer {path!r} was captured, but its input is a sparse tensor, of which no statistics are taken. Leave it out: "
            f"`keras_ngd.capture(model, optimizer, skip=[{path!r}])`."
        )
    if not statistics.trainable:
        return s
    statistics.called(x)
    call = surroundings.around()
    # TensorFlow vectorizes the probe away, gradient and all.
    statistics.vectorized = _refusal(statistics, "ops.vectorized_map") if surroundings.VECTORIZED in call else None
    x = ops.stop_gradient(x)
    observed = [x] if weights is None else [x, ops.cast(weights, x.dtype)]
    # The loss arrives elsewhere, and nothing comes from here.
    others = statistics.read_loss()
    state = [ops.convert_to_tensor(v) for v in statistics.trainable_variables if v is not statistics.loss]

    def gradient(ds, *arguments):
        inputs, values = arguments[: len(observed)], arguments[len(observed) : len(observed) + len(state)]
        backward = surroundings.around()
        loops = surroundings.between(call, backward)
        for kind, function in ((surroundings.MAPS, "ops.map"), (surroundings.VECTORIZED, "ops.vectorized_map")):
            if kind in loops or kind in backward[-1:]:
                raise ValueError(_refusal(statistics, function))
        upstream = surroundings.unvectorized(ops.stop_gradient(ds), _refusal(statistics, "ops.vectorized_map"))
        emitted = statistics.emit(
            rows, inputs[0], upstream, inputs[1] if len(observed) > 1 else None, values, looped=bool(loops)
        )
        return (ds, *(ops.zeros_like(t) for t in inputs), *emitted, *(ops.zeros_like(t) for t in others))

    return backend.identity_with_gradient(gradient)(s, *observed, *state, *others)


def _refusal(statistics, function):
    path = statistics.owner().path
    return (
        f"Layer {path!r} was captured, but `{function}` (or what it stands for) takes the batch away from it and calls it for "
        "each part, so its statistics cannot tell how many examples there are. Call the layer on the whole batch (dense layers "
        "take any number of axes before the last), use `ops.scan` for a loop over time, or leave the layer out: "
        f"`keras_ngd.capture(model, optimizer, skip=[{path!r}])`."
    )
