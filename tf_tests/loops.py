"""Training loops that are not Keras's: steps as users write them."""

import keras
from keras import ops


def squared_error(predictions, y):
    return ops.mean(ops.square(predictions - y))


def custom_step(
    model, optimizer, change=lambda gradients, variables: gradients, penalty=None, passes=1, divided=False, scaled=False
):
    """A function `(x, y)` that makes one step of `optimizer` and returns the loss.

    Args:
        model: a captured model.
        optimizer: built here if it is not.
        change: function of gradients and variables, what is done to all gradients before they are applied.
        penalty: function of the variables' tensors that is added to the loss, or None.
        passes: how many equal parts of the batch have a backward pass each; their gradients are added.
        divided: whether the loss of each is divided by their number.
        scaled: whether the optimizer is told the loss, as README has it.
    """
    variables = model.trainable_variables
    optimizer.build(variables)

    def loss_of(predict, values, x, y):
        loss = squared_error(predict(x), y) / (passes if divided else 1)
        loss = loss if penalty is None else loss + penalty(values)
        return optimizer.scale_loss(loss) if scaled else loss

    def batches(x, y):
        return zip(ops.split(x, passes), ops.split(y, passes), strict=True)

    def added(sums, gradients):
        return gradients if sums is None else [s + g for s, g in zip(sums, gradients, strict=True)]

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function
        def step(x, y):
            sums = None
            for part in batches(x, y):
                with tf.GradientTape() as tape:
                    values = [v.value for v in variables]
                    loss = loss_of(lambda x: model(x, training=True), values, *part)
                sums = added(sums, tape.gradient(loss, values))
            optimizer.apply(change(sums, variables), variables)
            return loss

        return step
    import jax

    @jax.jit
    def stateless(values, rest, state, x, y):
        def loss(values, x, y):
            return loss_of(lambda x: model.stateless_call(values, rest, x, training=True)[0], values, x, y)

        sums = None
        for part in batches(x, y):
            value, gradients = jax.value_and_grad(loss)(values, *part)
            sums = added(sums, gradients)
        return value, *optimizer.stateless_apply(state, change(sums, variables), values)

    def step(x, y):
        state = [v.value for v in optimizer.variables]
        rest = [v.value for v in model.non_trainable_variables]
        loss, values, state = stateless([v.value for v in variables], rest, state, x, y)
        for variable, value in zip([*variables, *optimizer.variables], [*values, *state], strict=True):
            variable.assign(value)
        return loss

    return step


def by_norm(gradients, variables=None):
    """All gradients divided so that their norm together is 1."""
    norm = ops.sqrt(sum(ops.sum(ops.square(ops.cast(g, "float32"))) for g in gradients))
    return [g / ops.cast(norm, g.dtype) for g in gradients]


def each_by_norm(gradients, variables=None):
    """Each gradient with a norm of at most 1."""
    return [g / ops.maximum(ops.sqrt(ops.sum(ops.square(g))), 1.0) for g in gradients]


def by_value(gradients, variables=None):
    """Each entry from -1 to 1."""
    return [ops.clip(g, -1.0, 1.0) for g in gradients]
