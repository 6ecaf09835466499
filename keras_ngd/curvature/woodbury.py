"""The Kronecker-factored Fisher block with its factors given by rows, of all layers of one shape at once."""

from keras import ops

from keras_ngd import backend
from keras_ngd.curvature.kronecker import factor_dampings, identities
from keras_ngd.linalg import inverse
from keras_ngd.linalg.together import together


class WoodburyCurvature:
    """Damped inverse Kronecker factors of `k` blocks of one shape, those of rows by Woodbury's identity.

        P = (A + dA I)^-1 V (G + dG I)^-1,       (X^T X + d I)^-1 V = (V - X^T (X X^T + d I)^-1 X V) / d

    A factor's state is the inverse of the smaller matrix, `X X^T + d I`, `[k, n, n]`, and `d`, `[k]`; the rows `X` stay
    where they are and are given to every call. Of a factor that is given itself it is the damped inverse, as in
    `KroneckerCurvature`. Before the first refresh P = V; where a refresh fails, so does the factor's part in it.

    Args:
        count: `k`.
        sides: for the input and the output side `(n, d)`: the shape of its rows, or `(d, d)` of its factor.
        dtype: of the rows.
        damping_mode: `"relative"`, `"pi"`, `"sqrt"` or `"factor"`.
    """

    def __init__(self, count, sides, dtype, damping_mode):
        self.count, self.sides, self.dtype, self.damping_mode = count, tuple(sides), dtype, damping_mode

    def build(self, add_variable):
        """Creates the state with `add_variable(shape, initializer, dtype, name)`."""
        self.variables = []
        for name, (rows, size) in zip(("input", "output"), self.sides, strict=True):
            initializer = identities if rows == size else "zeros"
            shape = (self.count, rows, rows)
            self.variables.append(add_variable(shape, initializer, self.dtype, f"{name}_inverse_{rows}_{size}"))
            self.variables.append(add_variable((self.count,), "ones", self.dtype, f"{name}_damping_{rows}_{size}"))

    @property
    def bytes(self):
        """Size of the state."""
        return self.count * backend.itemsize(self.dtype) * sum(rows**2 + 1 for rows, _ in self.sides)

    @property
    def refresh_cost(self):
        """What a refresh takes, in multiplications of a factorization up to a constant."""
        return self.count * sum(rows**2 * (rows + (size if rows < size else 0)) for rows, size in self.sides)

    # All matrices of the state are.
    symmetric = True

    def dampings(self, given, damping):
        """`dA` and `dG`, each `[k]`."""
        means = []
        for side, (rows, size) in zip(given, self.sides, strict=True):
            trace = ops.trace(side, axis1=1, axis2=2) if rows == size else ops.sum(side * side, axis=(1, 2))
            means.append(trace / size)
        return factor_dampings(*means, damping, self.damping_mode)

    def precondition(self, v, damping, state):
        """`P` of the gradients `v`, `[k, input_dim, output_dim]`; `state` is followed by what both sides are given by."""
        inverse_a, damping_a, inverse_g, damping_g, x, y = state
        if self.sides[0][0] == self.sides[0][1]:
            v = backend.matmul(inverse_a, v)
        else:
            inner = backend.matmul(inverse_a, backend.matmul(x, v))
            v = (v - backend.matmul(x, inner, transpose_a=True)) / ops.reshape(damping_a, (-1, 1, 1))
        if self.sides[1][0] == self.sides[1][1]:
            return backend.matmul(v, inverse_g)
        inner = backend.matmul(backend.matmul(v, y, transpose_b=True), inverse_g)
        return (v - backend.matmul(inner, y)) / ops.reshape(damping_g, (-1, 1, 1))


def refresh_together(curvatures, inputs, damping):
    """New states of several curvatures: all matrices of one size, of all layers and both sides, in one batch.

    Args:
        curvatures: list of `WoodburyCurvature`.
        inputs: for each what its input and its output side are given by.
        damping: scalar.

    Returns:
        For each its new state.
    """
    work, sides = [], [side for curvature in curvatures for side in curvature.sides]
    for curvature, given in zip(curvatures, inputs, strict=True):
        for side, of_side, (rows, size) in zip(given, curvature.dampings(given, damping), curvature.sides, strict=True):
            matrix = side if rows == size else backend.matmul(side, side, transpose_b=True)
            work.append([matrix, of_side])
    found = []
    for (rows, size), (inverses, dampings, failed) in zip(sides, together(_inverses, work), strict=True):
        if rows == size:
            eye = ops.eye(rows, dtype=backend.dtype_name(inverses))
            inverses = ops.where(ops.reshape(failed, (-1, 1, 1)), eye, inverses)
        found += [inverses, dampings]
    return [found[i : i + 4] for i in range(0, len(found), 4)]


def _inverses(matrices, dampings):
    """Damped inverses, what they are divided by, and where they failed."""
    # Nothing to fall back on: the rows of the last inverse are gone. Then a factor counts as the identity.
    inverses = inverse.damped_inverse(matrices, dampings)
    failed = ops.all(inverses == 0, axis=(1, 2))
    return [inverses, ops.where(failed, ops.ones_like(dampings), dampings), failed]
