"""Updates of variables as one operation each where TensorFlow has one: Keras writes them as ten to twenty.

Each function returns whether it has made the update. It has not on JAX, of sparse gradients, and of what is no plain variable of
TensorFlow's, such as one that a strategy mirrors.
"""

from keras_ngd.backend.running import name
from keras_ngd.backend.sparse_gradients import is_sparse


def _handles(gradient, variables):
    """What TensorFlow knows plain variables by, or None."""
    if name() != "tensorflow" or is_sparse(gradient):
        return None
    # Private: `tf.Variable` stands for the variables of strategies as well.
    from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable

    found = []
    for variable in variables:
        # A Keras variable has it as a property, TensorFlow's own has a method of that name.
        inner = getattr(variable, "value", None)
        found.append(inner if isinstance(inner, BaseResourceVariable) else variable)
    if not all(isinstance(variable, BaseResourceVariable) for variable in found):
        return None
    return [variable.handle for variable in found]


def adam_step(variable, first_moment, second_moment, gradient, rate, beta_1, beta_2, epsilon):
    """`keras.optimizers.Adam`'s update, with a `rate` that the correction of its bias is in; scalars of the gradient's dtype."""
    handles = _handles(gradient, [variable, first_moment, second_moment])
    if handles is None:
        return False
    import tensorflow as tf

    # Of powers of the decays it would make that correction.
    none = tf.zeros((), gradient.dtype)
    tf.raw_ops.ResourceApplyAdam(
        var=handles[0],
        m=handles[1],
        v=handles[2],
        beta1_power=none,
        beta2_power=none,
        lr=rate,
        beta1=beta_1,
        beta2=beta_2,
        epsilon=epsilon,
        grad=gradient,
    )
    return True


def momentum_step(variable, momentum_variable, gradient, rate, momentum, nesterov):
    """`keras.optimizers.SGD`'s update; arguments of the dtype of the variable.

    Args:
        variable: to update.
        momentum_variable: its momentum; None without one.
        gradient, rate: tensors.
        momentum: float.
        nesterov: bool.
    """
    handles = _handles(gradient, [variable] if momentum_variable is None else [variable, momentum_variable])
    if handles is None:
        return False
    import tensorflow as tf

    if momentum_variable is None:
        tf.raw_ops.ResourceApplyGradientDescent(var=handles[0], alpha=rate, delta=gradient)
    else:
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=handles[0],
            accum=handles[1],
            lr=rate,
            grad=gradient,
            momentum=tf.constant(momentum, gradient.dtype),
            use_nesterov=nesterov,
        )
    return True
