"""Online KL-Shampoo, as a rival: `benchmarks.tasks` trains with it beside the methods of this package."""

import keras
from keras import ops

from keras_ngd import backend
from keras_ngd.optimizers.gradient_blocks import matrix_shape

# Of a factor's eigenvalues those below so much of the largest are raised to that: float32 knows them no better.
SMALLEST = 1e-6


@keras.saving.register_keras_serializable("benchmarks")
class KLShampoo(keras.optimizers.Optimizer):
    """Shampoo whose factors are the closest to the gradients' second moments in the Kullback-Leibler divergence.

    For every matrix with gradient `V` `[i, o]`, the factors first of all `s I` with `s` the root of the mean of `V o V`:

        L <- decay L + (1 - decay) V R^-1 V^T / o
        R <- decay R + (1 - decay) V^T L^-1 V / i
        M <- momentum M + (1 - momentum) V
        N  = momentum M + (1 - momentum) V
        P  = L^-1/2 (N / c) R^-1/2;        W <- W - learning_rate P

    The roots, and the inverses in the first two lines, are those of the last step that was a multiple of `interval`, renewed
    there after these lines. `c` is the deviation of `N` where gradients are uncorrelated and of deviation 1. What is no matrix
    takes Adam's step at the same rate; convolutions' kernels are matrices of `[height * width * inputs, outputs]`.

    Args:
        learning_rate: float or `LearningRateSchedule`. Default 0.005.
        momentum: float in [0, 1). Default 0.95.
        decay: float in [0, 1). Default 0.95.
        interval: int. Default 10.

    Reference:
        - Lin et al., 2025: Understanding and Improving Shampoo and SOAP via Kullback-Leibler Minimization
    """

    def __init__(self, learning_rate=0.005, momentum=0.95, decay=0.95, interval=10, name="kl_shampoo", **kwargs):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.momentum, self.decay, self.interval = momentum, decay, interval

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._state = [self._state_of(variable) for variable in variables]

    def _state_of(self, variable):
        """Mean, factors and roots of a matrix, or the two moments of what is none."""
        shape = matrix_shape(variable.shape)
        if shape is None:
            return [self.add_variable_from_reference(variable, name) for name in ("mean", "squares")]
        shapes = [shape, *(2 * [(size, size) for size in shape])]
        names = ("mean", "left", "right", "left_root", "right_root")
        return [
            self.add_variable(one, "zeros", "float32", name=f"{variable.name}_{name}")
            for one, name in zip(shapes, names, strict=True)
        ]

    def update_step(self, gradient, variable, learning_rate):
        state = self._state[self._get_variable_index(variable)]
        if backend.is_sparse(gradient):
            gradient = backend.dense(gradient)
        rule = self._of_vector if len(state) == 2 else self._of_matrix
        direction, new = rule(ops.cast(gradient, state[0].dtype), [ops.convert_to_tensor(v) for v in state])
        step = ops.cast(learning_rate, variable.dtype) * ops.cast(
            ops.reshape(direction, variable.shape), variable.dtype
        )
        self.assign_sub(variable, step)
        for one, value in zip(state, new, strict=True):
            self.assign(one, value)

    def _of_vector(self, v, state):
        t = ops.cast(self.iterations, v.dtype) + 1
        mean, squares = (b * old + (1 - b) * x for b, old, x in zip((0.9, 0.999), state, (v, v * v), strict=True))
        deviation = ops.sqrt(squares / (1 - ops.power(0.999, t)))
        return mean / (1 - ops.power(0.9, t)) / (deviation + 1e-8), [mean, squares]

    def _of_matrix(self, v, state):
        mean, left, right, left_root, right_root = state
        rows, columns = mean.shape
        v = ops.reshape(v, mean.shape)
        first = ops.equal(self.iterations, 0)
        size = ops.sqrt(ops.mean(ops.square(v)))
        size = ops.where(size > 0, size, 1.0)
        left, right = (ops.where(first, size * ops.eye(f.shape[0]), f) for f in (left, right))
        left_root, right_root = (
            ops.where(first, ops.eye(r.shape[0]) / ops.sqrt(size), r) for r in (left_root, right_root)
        )
        # The roots are symmetric.
        from_right, from_left = ops.matmul(v, right_root), ops.matmul(left_root, v)
        left = self._averaged(left, ops.matmul(from_right, ops.transpose(from_right)) / columns)
        right = self._averaged(right, ops.matmul(ops.transpose(from_left), from_left) / rows)
        left_root, right_root = ops.cond(
            ops.equal(self.iterations % self.interval, 0),
            lambda: (inverse_root(left), inverse_root(right)),
            lambda: (left_root, right_root),
        )
        mean = self.momentum * mean + (1 - self.momentum) * v
        ahead = (self.momentum * mean + (1 - self.momentum) * v) / self._deviation()
        direction = ops.matmul(ops.matmul(left_root, ahead), right_root)
        return direction, [mean, left, right, left_root, right_root]

    def _averaged(self, old, new):
        return self.decay * old + (1 - self.decay) * new

    def _deviation(self):
        """That of the mean that looks ahead, of gradients of deviation 1: the weights of all gradients in it, squared."""
        m = self.momentum
        earlier = (1 - m) * (1 - ops.power(m, 2 * ops.cast(self.iterations, "float32"))) / (1 + m)
        return ops.sqrt(m**4 * earlier + ((1 - m) * (1 + m)) ** 2)

    def get_config(self):
        own = {"momentum": self.momentum, "decay": self.decay, "interval": self.interval}
        return super().get_config() | own


def inverse_root(factor):
    """`F^-1/2` of a positive semi-definite matrix."""
    values, vectors = ops.linalg.eigh(factor)
    values = ops.maximum(values, SMALLEST * values[-1])
    return ops.matmul(vectors / ops.sqrt(values), ops.transpose(vectors))
