"""Labels that are drawn from the model: which losses they are drawn for, when, and with which random numbers."""

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_ngd import backend, keras_private, replica, schedules
from keras_ngd.fisher import cotangents, known_losses, likelihoods
from keras_ngd.fisher.known_losses import Known
from keras_ngd.fisher.sampled_rows import DEFAULT_FRACTION, drawn
from keras_ngd.optimizers import loss_coefficients
from keras_ngd.statistics.draws import LAYERS
from keras_ngd.statistics.statistics import Statistics
from keras_ngd.typing import Tensor, Variable

if TYPE_CHECKING:
    from keras_ngd.optimizers.natural_gradient import NaturalGradient

FISHERS = ("empirical", "sampled")


def check_fisher(
    fisher: str, likelihood: Any, fraction: float | None, scale: str | None
) -> tuple[Any, float, str | None]:
    """The arguments `likelihood`, `statistics_fraction` and `fisher_scale`, settled for this `fisher`.

    Raises:
        ValueError: if one of them is out of range, or does not go with the others.
    """
    if fisher not in FISHERS:
        raise ValueError(f"`fisher` must be one of {FISHERS}. Received: fisher={fisher!r}")
    sampled = fisher == "sampled"
    found = likelihoods.checked(likelihood)
    if found is not None and not sampled:
        raise ValueError(
            f"`likelihood` says what labels are drawn from, which they are with fisher='sampled'. Received: fisher={fisher!r}, "
            f"likelihood={likelihood!r}"
        )
    if fraction is None:
        fraction = DEFAULT_FRACTION if sampled else 1.0
    if not schedules.is_number(fraction) or not 0 < fraction <= 1:
        raise ValueError(f"`statistics_fraction` must be in (0, 1]. Received: statistics_fraction={fraction!r}")
    if sampled and fraction == 1:
        raise ValueError(
            "`statistics_fraction` must be below 1 with fisher='sampled': labels are drawn for this share of a batch, and the "
            f"weights learn from the rest. Received: statistics_fraction={fraction!r}"
        )
    if scale == "auto":
        scale = None if sampled else "loss"
    elif sampled and scale == "loss":
        raise ValueError(
            "`fisher_scale='loss'` brings the empirical Fisher matrix nearer to the curvature. With fisher='sampled' it is that: "
            "leave `fisher_scale` out."
        )
    return found, float(fraction), scale


class _Pass:
    """One forward pass: the graph it is traced in, the layers it called so far, and whether its loss has labels drawn."""

    def __init__(self, graph: Any) -> None:
        self.graph, self.told = graph, False
        self.called: list[tuple[Callable[[], Statistics | None], int | None, Any]] = []
        self.examples: Tensor | None = None


class LabelSampling:
    """Puts what draws labels in front of a model's compiled losses, and says when it is to.

    Args:
        optimizer: whose it is: its `fisher`, `likelihood`, `statistics_fraction` and `seed` are looked at.
    """

    def __init__(self, optimizer: "NaturalGradient") -> None:
        self._optimizer = optimizer
        # Replicas of a strategy are traced one after the other, each in a thread of its own.
        self._passes: dict[Any, _Pass] = {}

    @property
    def fraction(self) -> Any:
        """The share of a batch whose labels are drawn, or None where none are."""
        return self._optimizer.statistics_fraction if self._optimizer.fisher == "sampled" else None

    def check_losses(self) -> None:
        """Raises a `ValueError` where the number of losses is given besides."""
        if self.fraction is not None and self._optimizer.losses_per_example not in ("auto", 1):
            raise ValueError(
                "`losses_per_example` is to be left at 'auto' with fisher='sampled', where the loss that the model is compiled "
                f"with tells what it consists of. Received: losses_per_example={self._optimizer.losses_per_example!r}"
            )

    # In the forward pass

    def called(self, statistics: Statistics, x: Tensor) -> None:
        """Told that a layer is called."""
        if self.fraction is None:
            return
        found, graph = self._passes.get(replica.number()), backend.graph()
        of, trace = weakref.ref(statistics), statistics.label_draw_read()
        # Where there are no graphs to tell passes apart, a layer shows that one is over without a loss.
        again = (
            graph is None
            and found is not None
            and any(
                other is of and (examples != x.shape[0] or before is not trace)
                for other, examples, before in found.called
            )
        )
        if found is None or not backend.within(found.graph) or (found.told and graph is None) or again:
            found = self._passes[replica.number()] = _Pass(graph)
        elif found.told:
            # The next of several steps in one graph, or a layer that is called once more in a backward pass.
            found.called = []
        found.called.append((of, x.shape[0], trace))

    def begun(self) -> bool:
        """Whether a layer was called in what is traced or run here, so that labels are to be drawn for the loss that follows."""
        found = self._passes.get(replica.number())
        return found is not None and bool(found.called) and backend.within(found.graph)

    def in_front(
        self, loss: Any, name: str, number: int, weight: Any, call: Any, given: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The labels and predictions that a loss's `call` is to be given in place of those it was, and a slot for its value.

        Args:
            loss: the `keras.losses.Loss`.
            name: of the model's output.
            number: of the loss.
            weight: what it is multiplied with in the total, or None.
            call: its `call`.
            given: a tuple of the labels and predictions it was given, its sample weights or None, and a list of masks.
        """
        y_true, y_pred, sample_weight, masks = given
        known = self._known(loss, name, number)
        if keras.tree.is_nested(y_true) or keras.tree.is_nested(y_pred) or len(y_pred.shape) < 2:
            raise ValueError(
                f"With fisher='sampled', the loss {name!r} is to be given one tensor of labels and one of predictions, with an "
                "axis behind that of the examples. Received predictions of the shape "
                f"{getattr(y_pred, 'shape', y_pred)}. Use fisher='empirical' for it."
            )
        own = self._likelihood(name, number) is not None
        if not own:
            y_true, y_pred = keras_private.same_rank(y_true, y_pred)
        draw = self._label_draw()
        if draw is None:
            return y_true, y_pred, ops.zeros((), "float32")
        found = self._passes[replica.number()]
        self._check_examples(found, y_pred)
        likelihood = known.likelihood
        logits = _logits_behind(y_pred, likelihood)
        shape = likelihoods.positions(likelihood, y_pred)
        values = list(ops.shape(call(y_true, y_pred))) if own else list(shape)
        if known.visible is not None:
            masks = [*masks, ops.reshape(known.visible(y_true), shape)]
        coefficients, rescaled = loss_coefficients.of_each(
            values,
            sample_weight,
            masks,
            getattr(loss, "reduction", None),
            ops.shape(y_pred)[0],
            drawn(y_pred, self.fraction),
        )
        coefficients = _spread(coefficients, values, shape, loss)
        if known.weight is not None:
            coefficients = coefficients * ops.reshape(known.weight(y_true), shape)
        if logits is not None:
            likelihood = type(likelihood)(**{**likelihood.get_config(), "from_logits": True})
        if weight is not None:
            weight = ops.abs(ops.stop_gradient(ops.convert_to_tensor(weight, "float32")))
            coefficients = coefficients / ops.maximum(weight, 1e-30)
        predictions, slot = cotangents.with_drawn_labels(
            y_pred if logits is None else logits,
            likelihood,
            ops.expand_dims(coefficients, likelihood.axis % len(y_pred.shape)),
            rescaled,
            draw,
            self.fraction,
            number,
        )
        if logits is not None:
            logits, predictions = predictions, ops.multiply(y_pred, 1)
            keras_private.set_logits(predictions, logits)
        found.told, found.examples = True, ops.shape(y_pred)[0]
        return y_true, predictions, slot

    def _likelihood(self, name: str, number: int) -> Any:
        given = self._optimizer.likelihood
        if isinstance(given, dict):
            return given.get(name)
        if isinstance(given, list):
            return given[number] if number < len(given) else None
        return given

    def _known(self, loss: Any, name: str, number: int) -> Known:
        own = self._likelihood(name, number)
        known = known_losses.known(loss) if own is None else Known(own)
        if known is None:
            raise ValueError(known_losses.unknown(loss))
        return known

    def _label_draw(self) -> Tensor | None:
        """The weight `label_draw` of a layer that was called in this pass; all are the same."""
        for reference, *_ in self._passes[replica.number()].called:
            statistics = reference()
            value = None if statistics is None else statistics.last_label_draw()
            if value is not None:
                return value
        return None

    def _check_examples(self, found: _Pass, y_pred: Tensor) -> None:
        for reference, examples, _ in found.called:
            statistics = reference()
            if statistics is not None and examples != y_pred.shape[0]:
                raise ValueError(_other_examples(statistics.owner().path, examples, y_pred.shape[0]))

    # In the backward pass and in the step

    def drawn(self) -> bool:
        """Whether the loss whose derivative is taken here, or was in this step, has labels drawn where it is time to."""
        found = self._passes.get(replica.number())
        return found is not None and found.told and backend.within(found.graph)

    def check_drawn(self) -> None:
        """Raises a `ValueError` in a step whose loss could have none drawn."""
        if self.fraction is not None and not self.drawn():
            raise ValueError(
                f"{type(self._optimizer).__name__}(fisher='sampled') draws labels from the model for the loss that it is "
                "compiled with, and this training step has not used that after it called the model: compute the loss by "
                "`model.compute_loss`, or use fisher='empirical'. (Of a clone of a captured model: call "
                "`keras_ngd.capture(model, optimizer)` on it.)"
            )

    def whole(self, examples: Tensor) -> Tensor:
        """Whether all layers have seen as many examples as the loss, a scalar boolean; where it can, it fails if they have not.

        Args:
            examples: `[blocks]`, how many each has seen, 0 where it was not called.
        """
        found = self._passes.get(replica.number())
        if self.fraction is None or found is None or isinstance(found.examples, (int, type(None))):
            return ops.ones((), "bool")
        if not backend.usable(found.examples):
            return ops.ones((), "bool")
        expected = ops.cast(found.examples, "float32")
        difference = ops.max(ops.where(examples > 0, ops.abs(examples - expected), 0.0))
        [difference] = backend.check_at_most(difference, 0.5, _other_examples("...", None, None), [difference])
        return difference < 0.5

    # Random numbers

    def start(self, statistics: Statistics, number: Tensor = 0) -> None:
        """Has labels drawn for the first batch, after `number` draws."""
        if statistics.label_draw is not None:
            statistics.label_draw.assign(ops.stack([1.0, float(self._seed), ops.cast(number, "float32")]))

    def separate(self, all_statistics: Sequence[Statistics]) -> None:
        """Has every worker draw labels of its own from now on."""
        for statistics in all_statistics:
            if statistics.label_draw is not None:
                begun, _, number = ops.unstack(ops.convert_to_tensor(statistics.label_draw), num=3)
                statistics.label_draw.assign(ops.stack([begun, ops.cast(float(self._seed), "float32"), number]))

    @property
    def _seed(self) -> int:
        communicator = self._optimizer.exchange.communicator
        # Replicas of a strategy, which hold the same numbers, draw by theirs.
        rank: Any = 0 if communicator.single_program else communicator.rank
        return (self._optimizer.seed + 1009 * int(rank)) % LAYERS

    def next_values(self, all_statistics: Sequence[Statistics], gates: Tensor) -> list[tuple[Variable, Tensor]]:
        """Pairs of the weight `label_draw` of statistics and its value for the next step.

        Args:
            all_statistics: of all layers.
            gates: `[blocks]`, their gates for that step.
        """
        found = [s.label_draw for s in all_statistics if s.label_draw is not None]
        if not found:
            return []
        begun, seed, number = ops.unstack(ops.convert_to_tensor(found[0]), num=3)
        new = ops.stack([ops.cast(ops.any(gates > 0), "float32"), seed, number + ops.cast(begun > 0, "float32")])
        return [(variable, new) for variable in found]


def _logits_behind(y_pred: Tensor, likelihood: Any) -> Tensor | None:
    """The logits that the loss will take in the place of probabilities, if it will."""
    if not backend.looks_behind_probabilities() or not hasattr(likelihood, "from_logits"):
        return None
    activation = "Sigmoid" if isinstance(likelihood, likelihoods.Bernoulli) else "Softmax"
    return keras_private.logits_behind(y_pred, activation)


def _spread(coefficients: Tensor, values: Sequence[Any], shape: Sequence[Any], loss: Any) -> Tensor:
    """Coefficients of a loss's values, of the shape `values`, as those of all positions, of the shape `shape`."""
    if len(values) == len(shape):
        return coefficients
    if len(values) > len(shape):
        raise ValueError(
            f"The loss {getattr(loss, 'name', loss)!r} has more values than its likelihood has positions: "
            f"{backend.shown(tuple(values))} for {backend.shown(tuple(shape))}. Have it give one for each position, "
            "or use fisher='empirical'."
        )
    rest = shape[len(values) :]
    count = ops.prod(ops.stack([ops.cast(size, "float32") for size in rest]))
    coefficients = ops.reshape(coefficients / count, [*values, *(1 for _ in rest)])
    return coefficients * ops.ones(shape, "float32")


def _other_examples(path: str, found: Any, expected: Any) -> str:
    numbers = "" if found == expected else f" ({found} and {expected})"
    return (
        f"Layer {path!r} is called with another number of examples than the loss is of{numbers}. With fisher='sampled' the "
        "first ones of a batch have their labels drawn, and every captured layer is to see the same examples in the same order. "
        f"Leave such layers out: `keras_ngd.capture(model, optimizer, skip=[{path!r}])`; or use fisher='empirical'."
    )
