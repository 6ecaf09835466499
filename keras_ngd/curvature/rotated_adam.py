"""Adam in the eigenbasis of a Fisher block's factors, of all layers of one shape at once."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_ngd.curvature.curvature import Slot
from keras_ngd.curvature.eigenbasis import EigenbasisCurvature
from keras_ngd.typing import Shape, Tensor, Variable

# Of a rotated gradient, entries of so many roundings of the largest are what rounding makes of zeros. Adam would make whole steps
# of them, in directions in which the layer has no inputs or the loss no gradient.
_ROUNDINGS = 16


class EigenAdamCurvature(EigenbasisCurvature):
    """Adam's rule on gradients that are rotated into the bases `QA` and `QG` of `k` blocks of one shape.

        V~ = QA^T V QG;    M~ <- beta_1 M~ + (1 - beta_1) V~;    S <- beta_2 S + (1 - beta_2) V~ o V~;    t <- t + 1
        P = QA [ M~ / (1 - beta_1^t) / (sqrt(S / (1 - beta_2^t)) + epsilon) ] QG^T

    Without bases (parts of size 1) it is Adam. `M~ = QA^T M QG` is the mean `M` of the gradients, which no new basis changes:
    where one is renewed, `M~` becomes what the same mean is in the new one. Of `S` each entry belongs to two columns of the
    bases, which a refresh leaves in their places. Where there are bases, the square of some roundings of the largest root is
    added to all squares.

    Args:
        beta_1, beta_2: decay of `M` and of `S`.
        epsilon: see above.
        **kwargs: `EigenbasisCurvature`'s.
    """

    def __init__(self, *args: Any, beta_1: float, beta_2: float, epsilon: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    @property
    def own_slots(self) -> tuple[Slot, ...]:
        def slot(name: str, shape: Shape, refreshed: bool = False) -> Slot:
            return Slot(f"{name}_{self.suffix}", shape, "zeros", self.dtype, refreshed=refreshed, stepped=True)

        return (
            slot("first_moment", self.shape, refreshed=bool(self.with_bases)),
            slot("second_moment", self.shape),
            slot("steps", (self.count,)),
        )

    @property
    def first_moment(self) -> Variable:
        """The variable of `M~`."""
        return self.variables[-3]

    def turned_into_bases(self, state: Sequence[Tensor]) -> Tensor:
        """`M~` of a state that has `M` in its place."""
        return self.rotated(state[-3], state)

    def refreshed_rest(
        self, blocks: Sequence[Tensor], state: Sequence[Tensor], bases: Sequence[Tensor]
    ) -> list[Tensor]:
        if not self.with_bases:
            return []
        *_, first = state
        changed = ops.reshape(self.changed(state, bases), (-1, 1, 1))
        # What stays is not rounded once more.
        return [ops.where(changed, self.rotated(self.rotated_back(first, state), bases), first)]

    def stepped(self, v: Tensor, state: Sequence[Tensor], scale: Callable[[], Tensor] | None = None) -> list[Tensor]:
        first, second, steps = state[-3:]
        rotated = self.rotated(v, state)
        return [
            self.beta_1 * first + (1 - self.beta_1) * rotated,
            self.beta_2 * second + (1 - self.beta_2) * ops.square(rotated),
            steps + 1,
        ]

    def precondition(
        self, v: Tensor, damping: Tensor, state: Sequence[Tensor], inputs: Callable[[], Sequence[Tensor]]
    ) -> Tensor:
        first, second, steps = state[-3:]
        # What a layer's steps have in the averages. Before the first there is nothing in them, and P = 0.
        steps = ops.reshape(ops.maximum(steps, 1.0), (-1, 1, 1))
        root_of_share = ops.sqrt(1 - ops.power(self.beta_2, steps))
        if self.with_bases:
            rounding = _ROUNDINGS * float(np.finfo(self.dtype).eps)
            second = second + rounding**2 * ops.max(second, axis=(1, 2), keepdims=True)
        # Both shares are divided out as one factor: a pass over matrices less for each.
        factor = root_of_share / (1 - ops.power(self.beta_1, steps))
        return self.rotated_back(first * factor / (ops.sqrt(second) + self.epsilon * root_of_share), state)
