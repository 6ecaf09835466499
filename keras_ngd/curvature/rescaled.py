"""A Fisher block that is diagonal in the eigenbasis of its factors, of all layers of one shape at once."""

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_ngd import backend
from keras_ngd.curvature.curvature import Slot
from keras_ngd.curvature.eigenbasis import EigenbasisCurvature
from keras_ngd.typing import Tensor


class EKFACCurvature(EigenbasisCurvature):
    """Second moments `S` of the gradients in the bases `QA` and `QG` of `k` blocks of one shape, in place of `lA lG^T`.

        S <- decay S + (1 - decay) N V~ o V~,    V~ = QA^T V QG
        P = QA [ V~ / (S + d) ] QG^T

    with `N` that makes the squares of a batch's mean gradient estimates of the squares of its parts' (George et al. 2018, section
    4.2). Where a refresh changes a basis, `S` begins anew with `lA lG^T`, the diagonals of `QA^T A QA` and `QG^T G QG`.

    Args:
        decay: of `S`.
        damping_mode: `"relative"`: `d` is the damping times the mean of `S`, and 1 where `S` is zero; `"exact"` and `"global"`:
            the damping, which is in units of the mean eigenvalue of all blocks with `"global"` and was multiplied with it before.
        **kwargs: `EigenbasisCurvature`'s.
    """

    def __init__(self, *args: Any, decay: float, damping_mode: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.decay, self.damping_mode = decay, damping_mode

    @property
    def own_slots(self) -> tuple[Slot, ...]:
        return (Slot(f"second_moment_{self.suffix}", self.shape, "zeros", self.dtype, stepped=True),)

    def refreshed_rest(
        self, blocks: Sequence[Tensor], state: Sequence[Tensor], bases: Sequence[Tensor]
    ) -> list[Tensor]:
        *_, second = state
        changed = ops.all(ops.equal(second, 0), axis=(1, 2))
        if self.with_bases:
            changed = changed | self.changed(state, bases)
        return [ops.where(ops.reshape(changed, (-1, 1, 1)), self.eigenvalues(blocks, bases), second)]

    def stepped(self, v: Tensor, state: Sequence[Tensor], scale: Callable[[], Tensor]) -> list[Tensor]:
        squares = ops.square(self.rotated(v, state)) * ops.reshape(scale(), (-1, 1, 1))
        return [self.decay * state[-1] + (1 - self.decay) * squares]

    def precondition(
        self, v: Tensor, damping: Tensor, state: Sequence[Tensor], inputs: Callable[[], Sequence[Tensor]]
    ) -> Tensor:
        return self.divided(v, self.second_moment(state, inputs), damping, state)

    def second_moment(self, state: Sequence[Tensor], inputs: Callable[[], Sequence[Tensor]]) -> Tensor:
        """`S`, `[k, input_dim, output_dim]`; arguments as for `precondition`."""
        return state[-1]

    def divided(self, v: Tensor, second: Tensor, damping: Tensor, state: Sequence[Tensor]) -> Tensor:
        """`P` of gradients `v`, from `S`."""
        added = ops.cast(damping, self.dtype)
        if self.damping_mode == "relative":
            # Not `ops.mean`: Keras takes it in float32 on JAX.
            mean = ops.sum(second, axis=(1, 2), keepdims=True) / (second.shape[1] * second.shape[2])
            added = ops.where(mean > 0, added * mean, 1.0)
        return self.rotated_back(self.rotated(v, state) / (second + added), state)

    def eigenvalues(self, blocks: Sequence[Tensor], bases: Sequence[Tensor]) -> Tensor:
        """`lA lG^T`, of the inputs of a refresh and bases."""
        by_part = dict(zip(self.with_bases, bases, strict=False))
        of_parts = [_eigenvalues(blocks[i], by_part.get(i)) for i in range(len(self.parts))]
        a, g = (ops.concatenate(side, axis=1) for side in self.divide(of_parts))
        return a[:, :, None] * g[:, None, :]


class ExampleEKFACCurvature(EKFACCurvature):
    """The same with second moments of each example's gradient, which are recorded: the last of the inputs, `[k, dA dG, 1]`."""

    @property
    def own_slots(self) -> tuple[Slot, ...]:
        return ()

    def refreshed_rest(
        self, blocks: Sequence[Tensor], state: Sequence[Tensor], bases: Sequence[Tensor]
    ) -> list[Tensor]:
        return []

    def stepped(self, v: Tensor, state: Sequence[Tensor], scale: Callable[[], Tensor]) -> list[Tensor]:
        return []

    def second_moment(self, state: Sequence[Tensor], inputs: Callable[[], Sequence[Tensor]]) -> Tensor:
        return ops.reshape(inputs()[-1], self.shape)


def _eigenvalues(blocks: Tensor, bases: Tensor | None) -> Tensor:
    """The diagonals of `Q^T F Q` of a part `[k, count, size, size]`, one after the other, and of `F` where there are no bases."""
    if bases is None:
        values = ops.diagonal(blocks, axis1=2, axis2=3)
    else:
        values = ops.sum(bases * backend.matmul(blocks, bases), axis=2)
    return ops.maximum(ops.reshape(values, (-1, blocks.shape[1] * blocks.shape[2])), 0.0)
