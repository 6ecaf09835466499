"""What parameters learn from where labels are drawn from the model: the examples whose labels are the data's.

The first examples of such a batch send back gradients of drawn labels, which statistics are of. They are to reach the layers
before, but no parameters. So a captured layer computes what depends on its parameters by `learned`, or sends what comes out
through one of the others here. Without drawn labels all are what they are given.
"""

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from keras import ops

from keras_ngd import backend
from keras_ngd.fisher.sampled_rows import of_others, without_drawn
from keras_ngd.typing import Tensor, Variable

if TYPE_CHECKING:
    from keras_ngd.statistics.statistics import Statistics


def learned(
    function: Callable[..., Tensor],
    x: Tensor,
    parameters: Sequence[Variable | None],
    statistics: "Statistics",
    constants: Sequence[Tensor] = (),
    result: Tensor | None = None,
    divisible: bool = True,
    products: bool = False,
) -> Tensor:
    """`function(x, *parameters, *constants)`, whose parameters learn from the examples alone whose labels are the data's.

    Args:
        function: of tensors, and of nothing else that a trace could change. Of a bound method the object is not kept alive.
        x: `[examples, ...]`.
        parameters: the layer's; None for one that there is not, which the function is not given.
        statistics: the layer's `Statistics`.
        constants: further tensors, which nothing is differentiated by.
        result: what the function gives, where that was computed already.
        divisible: whether what it gives of an example depends on that alone.
        products: whether it consists of matrix products, which XLA compiles as well inside a conditional as elsewhere. Then
            nothing is done to gradients in steps without drawn labels. Of convolutions it makes naive loops there.
    """
    given = [ops.convert_to_tensor(p) for p in parameters if p is not None]
    # What is sparse is refused by the probe.
    if not _splits(statistics) or backend.is_sparse_tensor(x):
        return function(x, *given, *constants) if result is None else result
    draw, fraction, count = statistics.read_label_draw(), statistics.sampled_fraction, len(given)
    called, reference = _weak(function), weakref.ref(statistics)
    if result is None:
        result = function(*(ops.stop_gradient(t) for t in (x, *given)), *constants)

    def gradient(ds: Tensor, x: Tensor, *arguments: Tensor) -> tuple[Tensor | None, ...]:
        function, statistics = called(), reference()
        given, constants, draw = arguments[:count], arguments[count:-1], arguments[-1]
        if function is None:
            # A graph outlived the layer.
            return (None, None, *(None for _ in arguments))
        [of_x] = backend.gradients_of(lambda x: function(x, *given, *constants), [x], ds)

        def of_parameters(x: Tensor, ds: Tensor) -> list[Tensor]:
            return backend.gradients_of(lambda *given: function(x, *given, *constants), list(given), ds)

        if statistics is None or not statistics.labels_are_drawn():
            found = of_parameters(x, ds)
        elif divisible:
            found = of_others(of_parameters, [x, ds], draw, fraction, products)
        else:
            found = of_parameters(x, without_drawn(ds, draw, fraction))
        return (None, of_x, *found, *(None for _ in constants), ops.zeros_like(draw))

    constants = [ops.stop_gradient(t) for t in constants]
    return backend.identity_with_gradient(gradient)(ops.stop_gradient(result), x, *given, *constants, draw)


def of_lookups(results: Tensor, statistics: "Statistics") -> Tensor:
    """Results of lookups, through which the table learns from the examples alone whose labels are the data's."""
    if not _splits(statistics):
        return results
    draw, fraction, reference = statistics.read_label_draw(), statistics.sampled_fraction, weakref.ref(statistics)

    def gradient(ds: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        statistics = reference()
        drawn = statistics is not None and statistics.labels_are_drawn()
        return without_drawn(ds, draw, fraction) if drawn else ds, ops.zeros_like(draw)

    return backend.identity_with_gradient(gradient)(results, draw)


def learned_of_rows(
    of_rows: Callable[[Tensor], Sequence[Tensor]],
    make: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    statistics: "Statistics",
) -> Tensor:
    """`make()`, which sends the parameters `of_rows(ds)` as their gradients: of the rows of all examples, or of those alone."""
    draw = [statistics.read_label_draw()] if _splits(statistics) else []
    fraction, reference, count = statistics.sampled_fraction, weakref.ref(statistics), len(parameters)

    def gradient(ds: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        draw, statistics = arguments[count:], reference()
        if draw and statistics is not None and statistics.labels_are_drawn():
            found = of_others(of_rows, [ds], draw[0], fraction, products=True)
        else:
            found = list(of_rows(ds))
        return (ds, *found, *(ops.zeros_like(t) for t in draw))

    return backend.identity_with_gradient(gradient)(make(), *parameters, *draw)


def _splits(statistics: "Statistics") -> bool:
    """Whether labels may be drawn; the statistics are told that the layer minds it."""
    statistics.learns_from_others = True
    return statistics.label_draw is not None and statistics.trainable


def _weak(function: Any) -> Callable[[], Any]:
    return weakref.WeakMethod(function) if inspect.ismethod(function) else lambda: function


def check_learning(statistics: "Statistics") -> None:
    """Raises a `ValueError` where labels are drawn and the layer, whose probe this is, does not mind it."""
    if statistics.sampled_fraction is None or statistics.learns_from_others:
        return
    owner = statistics.owner()
    raise ValueError(
        f"With fisher='sampled', layer {owner.path!r} would learn from labels that are drawn from the model: "
        f"{type(owner).__name__} computes what depends on its parameters by itself. Have its `call` compute that by "
        "`keras_ngd.layers.learned(function, inputs, parameters, self.statistics)`, use fisher='empirical', or leave it out: "
        f"`keras_ngd.capture(model, optimizer, skip=[{owner.path!r}])`."
    )
