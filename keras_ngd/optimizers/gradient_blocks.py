"""Weight matrices whose bases come from their gradients alone: of models that are not captured."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from keras import ops

from keras_ngd import backend
from keras_ngd.curvature import EigenAdamCurvature, refreshed
from keras_ngd.linalg import diagonal
from keras_ngd.optimizers import shares, state_layout
from keras_ngd.optimizers.blocks import Signals
from keras_ngd.typing import Parts, Shape, Tensor, Variable

if TYPE_CHECKING:
    from keras_ngd.optimizers.eigen_adam import EigenAdam


def matrix_shape(shape: Shape) -> tuple[int, int] | None:
    """Rows and columns of a variable of this shape as a matrix, or None where it is no more than a vector.

    It is cut between two axes where that makes both sides as equal as can be: a convolution's kernel before its outputs,
    attention's where the heads meet the width.
    """
    if sum(size > 1 for size in shape) < 2:
        return None
    cuts = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return min(cuts, key=lambda cut: cut[0] + cut[1])


@dataclasses.dataclass(eq=False)
class MatrixGroup:
    """All matrices of one shape.

    Attributes:
        variables: the model's.
        curvature: theirs, one after the other.
        factors: variables `[k, 1, d, d]`, the averages of `V V^T` and of `V^T V`, of the sides that have a basis.
    """

    variables: list[Variable]
    curvature: EigenAdamCurvature
    factors: list[Variable] = dataclasses.field(default_factory=list)

    def factors_of(self, v: Tensor) -> list[Tensor]:
        """Those of gradients `v`."""
        sides = zip((ops.transpose(v, (0, 2, 1)), v), self.curvature.sides, strict=True)
        return [part for rows, parts in sides if _has_basis(parts) for part in diagonal.gram_blocks(rows, parts)]

    def as_inputs(self, factors: Sequence[Tensor]) -> list[Tensor | None]:
        """The inputs of the curvature's refresh, None where there is no basis."""
        found = iter(factors)
        return [next(found) if _has_basis(parts) else None for parts in self.curvature.sides]


def _has_basis(parts: Parts) -> bool:
    return parts[0][1] > 1


class GradientBlocks:
    """Adam's steps in the eigenbases of the averages `L` of `V V^T` and `R` of `V^T V`, of all matrices among the variables.

    Args:
        optimizer: whose they are.
        variables: all that it is built on.
    """

    def __init__(self, optimizer: "EigenAdam", variables: Sequence[Variable]) -> None:
        self._optimizer = optimizer
        # Of a step that is not yet known to be taken.
        self._new: list[tuple[Variable, Tensor]] = []
        self._due: Tensor = None
        members: dict[tuple[int, int, str], list[Variable]] = {}
        for variable in variables:
            shape = matrix_shape(variable.shape)
            if shape is not None and not optimizer._overwrite_variable_with_gradient(variable):
                dtype = "float64" if backend.dtype_name(variable) == "float64" else "float32"
                members.setdefault((*shape, dtype), []).append(variable)
        self.groups = [self._group(found, *kind) for kind, found in members.items()]
        # All matrices, by the numbers of their groups and in these; and their shares, where refreshes are spread over steps.
        self._all = [(i, j) for i, group in enumerate(self.groups) for j in range(len(group.variables))]
        self.shares: list[list[tuple[int, int]]] = []
        if optimizer.stagger:
            costs = [self.groups[i].curvature.refresh_cost / len(self.groups[i].variables) for i, _ in self._all]
            numbers = shares.divided(costs, optimizer.inverse_interval)
            self.shares = [[self._all[number] for number in share] for share in numbers]

    def _group(self, variables: list[Variable], rows: int, columns: int, dtype: str) -> MatrixGroup:
        optimizer = self._optimizer
        inputs, outputs = (self._parts(size) for size in (rows, columns))
        curvature = optimizer.adam_curvature(len(variables), inputs, outputs, dtype)
        curvature.build(optimizer.state.add_curvature)
        group = MatrixGroup(variables, curvature)
        for name, parts in zip(("input", "output"), curvature.sides, strict=True):
            if _has_basis(parts):
                shape = (len(variables), 1, parts[0][1], parts[0][1])
                group.factors.append(
                    optimizer.state.add_curvature(shape, "zeros", dtype, f"{name}_average_{curvature.suffix}")
                )
        return group

    def _parts(self, size: int) -> Parts:
        """One whole factor, or none for a side that is too wide."""
        split = self._optimizer.split
        return ((1, size),) if split is None or size <= split else ((size, 1),)

    @property
    def variables(self) -> list[Variable]:
        """The model's variables that are matrices."""
        return [variable for group in self.groups for variable in group.variables]

    def directions(self, signals: Signals) -> tuple[dict[int, Tensor], Tensor]:
        """By position what the gradients of matrices become, and whether all of it is finite.

        What the state is to be replaced with is kept until `assign`.
        """
        optimizer, scale = self._optimizer, self._optimizer.loss_scale
        gradients = [self._gradients(group, signals) / scale for group in self.groups]
        finite = _all_finite(gradients)
        factors = [self._averages(group, v) for group, v in zip(self.groups, gradients, strict=True)]
        self._due = optimizer.clock.refresh_due(ops.convert_to_tensor(optimizer._iterations), finite, finite)
        found: dict[int, Tensor] = {}
        self._new = []
        for group, v, averages, basis in zip(self.groups, gradients, factors, self._bases(factors), strict=True):
            curvature = group.curvature
            others = [v for v, slot in zip(curvature.variables, curvature.slots, strict=True) if not slot.refreshed]
            values = iter(state_layout.gathered_state(others)), iter(basis)
            state = [next(values[slot.refreshed]) for slot in curvature.slots]
            moments = curvature.stepped(v, state)
            state = curvature.with_stepped(state, moments)
            p = curvature.precondition(v, ops.ones(()), state, list) * scale
            finite = finite & _all_finite([p, *moments, *averages])
            self._new += zip(curvature.variables, state, strict=True)
            self._new += zip(group.factors, averages, strict=True)
            for variable, part in zip(group.variables, ops.unstack(p, num=len(group.variables)), strict=True):
                if signals.of(variable) is not None:
                    found[signals.index(variable)] = ops.cast(ops.reshape(part, variable.shape), variable.dtype)
        return found, finite

    def assign(self, taken: Tensor) -> None:
        """Replaces the state, if the step is `taken`."""
        optimizer = self._optimizer
        for variable, value in self._new:
            [old] = state_layout.gathered_state([variable])
            [stored] = state_layout.stored_state([variable], [ops.where(taken, value, old)])
            optimizer.assign(variable, stored)
        step, due = ops.convert_to_tensor(optimizer._iterations), self._due & taken
        optimizer.counters.count("factor_updates", taken)
        optimizer.counters.count("inverse_updates", optimizer.clock.refreshed(step, due))
        self._new, self._due = [], None

    def _gradients(self, group: MatrixGroup, signals: Signals) -> Tensor:
        """`[k, rows, columns]`; zeros of variables that have no gradient."""
        _, rows, columns = group.curvature.shape
        found = []
        for variable in group.variables:
            gradient = signals.of(variable)
            if gradient is None:
                found.append(ops.zeros((rows, columns), group.curvature.dtype))
            else:
                gradient = backend.dense(gradient) if backend.is_sparse(gradient) else gradient
                found.append(ops.cast(ops.reshape(gradient, (rows, columns)), group.curvature.dtype))
        return ops.stack(found)

    def _averages(self, group: MatrixGroup, v: Tensor) -> list[Tensor]:
        decay = self._optimizer.factor_decay
        old = state_layout.gathered_state(group.factors)
        return [decay * o + (1 - decay) * t for o, t in zip(old, group.factors_of(v), strict=True)]

    def _bases(self, factors: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """What refreshes renew of all curvatures, in their order, renewed if they are due."""
        curvatures = [group.curvature for group in self.groups]
        kept = [state_layout.gathered_state(curvature.refreshed_variables) for curvature in curvatures]

        def renew(matrices: Sequence[tuple[int, int]]) -> list[Tensor]:
            with self._optimizer.state.refreshing(curvatures):
                new = self._renewed(matrices, factors, kept)
            return [t for state in new for t in state]

        if not curvatures:
            return []
        optimizer, old = self._optimizer, [t for state in kept for t in state]
        step = ops.convert_to_tensor(optimizer._iterations)
        flat = iter(optimizer.clock.renewed(step, self._due, renew, self._all, old))
        return [[next(flat) for _ in state] for state in kept]

    def _renewed(
        self, matrices: Sequence[tuple[int, int]], factors: Sequence[Sequence[Tensor]], kept: Sequence[Sequence[Tensor]]
    ) -> list[list[Tensor]]:
        """What is `kept` of all groups, renewed of these matrices."""
        numbers = {i: [j for of, j in matrices if of == i] for i, _ in matrices}
        curvatures, inputs, states = [], [], []
        for i, chosen in numbers.items():
            group, of_group, state = self.groups[i], factors[i], kept[i]
            curvature = group.curvature
            if len(chosen) < len(group.variables):
                curvature = self._optimizer.adam_curvature(len(chosen), *curvature.sides, curvature.dtype)
                of_group, state = ([ops.take(t, chosen, axis=0) for t in tensors] for tensors in (of_group, state))
            curvatures.append(curvature)
            inputs.append(group.as_inputs(of_group))
            states.append(state)
        found = [list(state) for state in kept]
        for (i, chosen), state in zip(
            numbers.items(), refreshed(curvatures, inputs, ops.ones(()), states), strict=True
        ):
            found[i] = [shares.put_back(old, new, chosen) for old, new in zip(kept[i], state, strict=True)]
        return found


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        return ops.ones((), "bool")
    return ops.all(ops.stack([ops.isfinite(ops.sum(ops.cast(t, "float32"))) for t in tensors]))
