"""The Kronecker-factored Fisher block, `F ~ A (x) G`, of all layers of one shape at once."""

from collections.abc import Callable, Sequence
from typing import Self

from keras import ops

from keras_ngd import backend, sharding
from keras_ngd.curvature.curvature import Slot, TracedCurvature, where_chosen
from keras_ngd.linalg import symmetric
from keras_ngd.linalg.batching import batched_by_size
from keras_ngd.linalg.diagonal import identities
from keras_ngd.linalg.many_sizes import damped_inverses
from keras_ngd.typing import Tensor

INVERSES = ("auto", "cholesky", "newton-schulz", "eigen")
DAMPING_MODES = ("global", "relative", "pi", "sqrt", "factor", "exact")


def mean_eigenvalues(factors: Tensor) -> Tensor:
    """`tr(X) / d` of each matrix of `[k, d, d]`."""
    return backend.trace(factors) / factors.shape[-1]


def factor_dampings(mean_a: Tensor, mean_g: Tensor, damping: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """What to add to the diagonals of `A` and `G`.

        relative:  damping tr A / dA and damping tr G / dG
        pi:        pi sqrt(damping) and sqrt(damping) / pi,   pi = sqrt((tr A / dA) / (tr G / dG))
        global:    the same, of a damping in units of the mean eigenvalue of all blocks, which it is multiplied with before
        sqrt:      sqrt(damping) on both
        factor:    damping on both

    (Martens & Grosse 2015, section 6.3; THOR, eq. 6, for `factor`.) With `relative` the direction does not depend on the scale
    of either factor, with `pi` not on how a constant is shared between them; pi is 1 where it cannot be told.

    Args:
        mean_a, mean_g: `[k]`, the mean eigenvalues of the factors.
        damping: scalar.
        mode: `"global"`, `"relative"`, `"pi"`, `"sqrt"` or `"factor"`.

    Returns:
        Two tensors `[k]`.
    """
    damping = ops.cast(damping, mean_a.dtype)
    if mode == "relative":
        # Of a factor that is zero, such as G where no gradient arrives, nothing is known: it counts as the identity.
        return tuple(ops.where(mean > 0, damping * mean, 1.0) for mean in (mean_a, mean_g))
    if mode == "factor":
        return damping * ops.ones_like(mean_a), damping * ops.ones_like(mean_g)
    root = ops.sqrt(damping)
    if mode == "sqrt":
        return root * ops.ones_like(mean_a), root * ops.ones_like(mean_g)
    tiny = 1e-30
    known = (mean_a > tiny) & (mean_g > tiny) & ops.isfinite(mean_a) & ops.isfinite(mean_g)
    pi = ops.sqrt(ops.where(known, mean_a, 1.0) / ops.where(known, mean_g, 1.0))
    return root * pi, root / pi


def inversion_method(method: str) -> str:
    """What `"auto"` stands for here; any other method as it is."""
    if method != "auto":
        return method
    # Products are what accelerators are for. On a CPU, iterations take several times as long as a factorization.
    return "newton-schulz" if backend.on_accelerator() else "cholesky"


def _decomposed(known: Tensor, state: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """Eigenvectors and eigenvalues of the factors that are `known`, the old ones where that fails."""
    vectors, values = state
    # TensorFlow's decomposition stops the program where a matrix is not finite.
    finite = symmetric.all_finite(factors) & known
    factors = ops.where(ops.reshape(finite, (-1, 1, 1)), factors, ops.zeros_like(factors))
    new_values, new_vectors = backend.eigh(symmetric.symmetrize(factors))
    good = finite & symmetric.all_finite(new_vectors) & ops.all(ops.isfinite(new_values), axis=1)
    return [
        ops.where(ops.reshape(good, (-1, 1, 1)), new_vectors, vectors),
        ops.where(ops.reshape(good, (-1, 1)), ops.maximum(new_values, 0.0), values),
    ]


class KroneckerCurvature(TracedCurvature):
    """Damped inverse Kronecker factors of `k` blocks of one shape, kept stacked.

    With `"cholesky"` and `"newton-schulz"` the state is `(A + dA I)^-1` and `(G + dG I)^-1` as of the last refresh, and

        P = (A + dA I)^-1 V (G + dG I)^-1 ;

    with `"eigen"` it is the eigenvectors and eigenvalues of both factors, the damping follows its schedule at every step, and

        P = QA [ (QA^T V QG) / D ] QG^T,    D = (lA + dA)(lG + dG)^T,   or   lA lG^T + damping   for damping mode "exact".

    Before the first refresh P = V (with "eigen": V divided by a constant). A refresh that fails keeps the previous
    state.

    Args:
        count: `k`.
        input_dim, output_dim: sizes of A and G.
        dtype: of the factors.
        inverse_method: one of `INVERSES`.
        damping_mode: one of `DAMPING_MODES`; `"exact"` needs `"eigen"`.
    """

    def __init__(
        self, count: int, input_dim: int, output_dim: int, dtype: str, inverse_method: str, damping_mode: str
    ) -> None:
        self.count, self.input_dim, self.output_dim, self.dtype = count, input_dim, output_dim, dtype
        self.inverse_method, self.damping_mode = inverse_method, damping_mode

    @property
    def slots(self) -> tuple[Slot, ...]:
        suffix = f"{self.input_dim}_{self.output_dim}"
        kinds = ("eigenvectors", "eigenvalues") if self.inverse_method == "eigen" else ("inverse",)
        found = []
        for side, size in (("input", self.input_dim), ("output", self.output_dim)):
            for kind in kinds:
                shape = (self.count, size) if kind == "eigenvalues" else (self.count, size, size)
                initializer = "ones" if kind == "eigenvalues" else identities
                found.append(Slot(f"{side}_{kind}_{suffix}", shape, initializer, self.dtype))
        return tuple(found)

    @property
    def refresh_cost(self) -> float:
        return self.count * (self.input_dim**3 + self.output_dim**3)

    @property
    def symmetric(self) -> bool:
        """Whether all matrices of the state are."""
        return self.inverse_method != "eigen"

    @property
    def size(self) -> int:
        return self.input_dim * self.output_dim

    def trace(self, inputs: Sequence[Tensor]) -> Tensor:
        return backend.trace(inputs[0]) * backend.trace(inputs[1])

    @classmethod
    def refresh_all(
        cls,
        curvatures: Sequence[Self],
        inputs: Sequence[Sequence[Tensor]],
        damping: Tensor,
        states: Sequence[Sequence[Tensor]],
        chosen: Sequence[Tensor] | None = None,
    ) -> list[list[Tensor]]:
        """As `Curvature.refresh_all`; inputs are the factors `A` and `G`, `[k, d, d]`, of both of which one batch is made."""
        method, sides, found = inversion_method(curvatures[0].inverse_method), [], []
        for curvature, (a, g), state in zip(curvatures, inputs, states, strict=True):
            if method == "eigen":
                sides += [[a, *state[:2]], [g, *state[2:]]]
            else:
                dampings = factor_dampings(mean_eigenvalues(a), mean_eigenvalues(g), damping, curvature.damping_mode)
                sides += [list(side) for side in zip((a, g), dampings, state, strict=True)]

        def decomposed(factors: Tensor, *state: Tensor) -> list[Tensor]:
            return sharding.divided(_decomposed, list(state), factors)

        if method == "eigen":
            found = batched_by_size(decomposed, sides)
        else:
            found = [[matrices] for matrices in damped_inverses(sides, method)]
        new = [[*of_a, *of_g] for of_a, of_g in zip(found[::2], found[1::2], strict=True)]
        return where_chosen(chosen, new, states)

    def precondition(
        self, v: Tensor, damping: Tensor, state: Sequence[Tensor], inputs: Callable[[], Sequence[Tensor]]
    ) -> Tensor:
        if self.inverse_method != "eigen":
            product, cut = backend.matmul(state[0], v), [sharding.spread_of(variable) for variable in self.variables]
            if self.output_dim <= self.input_dim or not cut or cut[1] is None or cut[1].axis is None:
                return backend.matmul(product, state[1])
            # Each device has a few rows of an inverse that is larger than the gradient: the gradient is to travel.
            return backend.matmul(cut[1].replicated(product), state[1], transpose_b=True)
        vectors_a, values_a, vectors_g, values_g = state
        if self.damping_mode == "exact":
            scale = values_a[:, :, None] * values_g[:, None, :] + ops.cast(damping, self.dtype)
        else:
            # Not `ops.mean`: Keras takes it in float32 on JAX.
            mean_a, mean_g = (ops.sum(values, axis=1) / values.shape[1] for values in (values_a, values_g))
            damping_a, damping_g = factor_dampings(mean_a, mean_g, damping, self.damping_mode)
            scale = (values_a + damping_a[:, None])[:, :, None] * (values_g + damping_g[:, None])[:, None, :]
        rotated = backend.matmul(backend.matmul(vectors_a, v, transpose_a=True), vectors_g) / scale
        return backend.matmul(backend.matmul(vectors_a, rotated), vectors_g, transpose_b=True)
