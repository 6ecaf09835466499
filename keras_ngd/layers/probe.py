"""The probe: the identity in the forward pass; in the backward pass, where statistics are taken.

Keras trainers differentiate the loss with respect to every trainable weight, a layer's statistics weights included. The
probe's custom gradient hands the true gradient on unchanged and emits, as the "gradients" of the statistics weights, their
new values; weights marked `overwrite_with_gradient` are then overwritten with them, by Keras's own convention. Hence no
hooks, no custom training loop, and a pure function that XLA compiles.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_ngd import backend
from keras_ngd.backend import surroundings
from keras_ngd.layers.contract import of_layer
from keras_ngd.layers.geometry import Geometry
from keras_ngd.layers.learning import check_learning
from keras_ngd.typing import Tensor

if TYPE_CHECKING:
    from keras_ngd.statistics.statistics import Statistics


def probe(
    s: Tensor, x: Tensor | None, geometry: Geometry, statistics: "Statistics", weights: Tensor | None = None
) -> Tensor:
    """Returns `s`, and has `statistics` observe `x` and the gradient of `s` in the backward pass.

    A loss with this gradient in it is refused where it is differentiated: what is recorded would not be of the whole loss.

    Args:
        s: the layer's pre-activation.
        x: the layer's input; None where it arrives with the gradient of `s`, as its last columns (`layers.time_steps`).
        geometry: how the layer presents the matrix that made `s`.
        statistics: the layer's `Statistics`.
        weights: optional weights of the rows (a mask), as the geometry takes them.
    """
    if backend.is_sparse_tensor(x):
        path = statistics.owner().path
        raise ValueError(
            f"Layer {path!r} was captured, but its input is a sparse tensor, of which no statistics are taken. Leave it out: "
            f"`keras_ngd.capture(model, optimizer, skip=[{path!r}])`."
        )
    if not statistics.trainable:
        return s
    check_learning(statistics)
    statistics.called(s if x is None else x)
    call = surroundings.around()
    # TensorFlow vectorizes the probe away, gradient and all.
    statistics.vectorized = _refusal(statistics, "ops.vectorized_map") if surroundings.VECTORIZED in call else None
    inputs = [] if x is None else [ops.stop_gradient(x)]
    observed = inputs if weights is None else [*inputs, ops.cast(weights, s.dtype if x is None else x.dtype)]
    # The loss arrives elsewhere, and nothing comes from here; nor does anything for what says whether labels are drawn.
    without = (statistics.loss, statistics.label_draw)
    others = statistics.read_loss()
    state = [ops.convert_to_tensor(v) for v in statistics.trainable_variables if all(v is not w for w in without)]
    # Graphs and traces keep no model alive.
    reference, arriving = weakref.ref(statistics), x is None

    def gradient(ds: Tensor, *arguments: Tensor) -> tuple[Tensor | None, ...]:
        inputs, values = arguments[: len(observed)], arguments[len(observed) : len(observed) + len(state)]
        emitted = _gradient(reference, call, geometry, ds, inputs, values, arriving)
        return (*emitted, *(ops.zeros_like(t) for t in others))

    return backend.identity_with_gradient(gradient)(s, *observed, *state, *others)


def _gradient(
    reference: "Callable[[], Statistics | None]",
    call: Any,
    geometry: Geometry,
    ds: Tensor,
    inputs: Sequence[Tensor],
    values: Sequence[Tensor],
    arriving: bool,
) -> tuple[Tensor | None, ...]:
    statistics, unobserved = reference(), [None for _ in inputs]
    if statistics is None:
        # A graph outlived them: the layer was released.
        return (ds, *unobserved, *(None for _ in values))
    backward = surroundings.around()
    loops = surroundings.between(call, backward)
    for kind, function in ((surroundings.MAPS, "ops.map"), (surroundings.VECTORIZED, "ops.vectorized_map")):
        if kind in loops or kind in backward[-1:]:
            raise ValueError(_refusal(statistics, function))

    def differentiated(*_: Tensor) -> Any:
        raise ValueError(second_derivative(reference()))

    # A loss that has this derivative in it depends on the layer's kernel by way of `ds`, even where that is constant: what it
    # passes through on its way has a variable as an argument.
    followed = backend.identity_with_gradient(differentiated)(ds, values[-1])
    # No tape is to follow into what is emitted: it would differentiate the statistics, for nobody.
    as_read = values[-1]
    ds, *values = (ops.stop_gradient(t) for t in (ds, *values))
    upstream = surroundings.unvectorized(ds, _refusal(statistics, "ops.vectorized_map"))
    if arriving:
        outputs = geometry.groups * geometry.output_dim
        x, upstream = upstream[..., outputs:], upstream[..., :outputs]
    else:
        x, *inputs = inputs
    weights = inputs[0] if inputs else None
    try:
        emitted = statistics.emit(geometry, x, upstream, weights, values, looped=bool(loops), as_read=as_read)
    except backend.WrongShape as error:
        raise ValueError(of_layer(statistics.owner().path, type(statistics.owner()), error)) from error
    return (followed, *unobserved, *emitted)


def _refusal(statistics: "Statistics", function: str) -> str:
    path = statistics.owner().path
    return (
        f"Layer {path!r} was captured, but `{function}` (or what it stands for) takes the batch away from it and calls it for "
        "each part, so its statistics cannot tell how many examples there are. Call the layer on the whole batch (dense layers "
        "take any number of axes before the last), use `ops.scan` for a loop over time, or leave the layer out: "
        f"`keras_ngd.capture(model, optimizer, skip=[{path!r}])`."
    )


def second_derivative(statistics: "Statistics | None") -> str:
    """What to say of a loss with a derivative of the layer in it."""
    path = "..." if statistics is None else statistics.owner().path
    return (
        f"Layer {path!r} was captured, and the loss contains a derivative of what it computes (a gradient penalty, a "
        "physics-informed loss, a Hessian). Statistics are those of first derivatives, and would be wrong. Leave out every "
        f"layer that is differentiated twice: `keras_ngd.capture(model, optimizer, skip=[{path!r}])`; or, if that is all "
        "of them, take the capture back with `keras_ngd.release(model)` and train with an optimizer of Keras's."
    )
