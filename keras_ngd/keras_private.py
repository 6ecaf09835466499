"""What this package uses of Keras that Keras keeps to itself, all in one place.

Names in `keras.src`, and those with an underscore, may change with any release of Keras. Here is a function for each, where that
is possible. Methods of Keras's that ours override must keep the names that Keras calls them by, and what our optimizers inherit
is an attribute of theirs: these names are in the tables `OVERRIDDEN` and `INHERITED`.

`tf_tests/test_keras_private.py` has a test for each name, which says what broke, and looks in the sources for others.
"""

import contextlib

import keras

# Layers and models


def flatten_layers(model):
    """A model and all layers in it, at any depth: `Layer._flatten_layers`."""
    return model._flatten_layers()


def sub_layers(layer):
    """The layers that a layer tracks, each as often as it is an attribute: `Layer._layers`."""
    return list(layer._layers)


def forget_sub_layer(layer, sub):
    """Takes a layer out of those that another one tracks: `Layer._layers`. To be done inside of `unlocked`."""
    layer._layers.remove(sub)


@contextlib.contextmanager
def unlocked(layer):
    """A context in which a built layer may be given weights and layers, or lose some: `Layer._tracker`."""
    layer._tracker.unlock()
    try:
        yield
    finally:
        layer._tracker.lock()


def forget_weight(layer, variable):
    """Takes a weight out of those that a layer tracks: `Layer._untrack_variable`, which unlocks and locks by itself."""
    layer._untrack_variable(variable)


def own_weights(layer):
    """The weights that are a layer's own, not those of layers in it: `Layer._trainable_variables`, `_non_trainable_variables`."""
    return layer._trainable_variables + layer._non_trainable_variables


def kernel_of(layer):
    """The variable that a dense or convolutional layer trains: `_kernel`.

    The property `kernel` computes something from it where the layer is quantized or has LoRA.
    """
    return layer._kernel


def embeddings_of(layer):
    """The table that an embedding trains: `_embeddings`; of the property `embeddings` holds what is said of `kernel`."""
    return layer._embeddings


def causal_padding(layer):
    """What a `Conv1D` with `padding="causal"` pads its inputs with, as `ops.pad` takes it: `_compute_causal_padding`."""
    return layer._compute_causal_padding()


def inputs_and_outputs(model):
    """The symbolic inputs and outputs of a model as their structure has them: `Functional._inputs_struct`, `_outputs_struct`.

    None for those that a model does not say.
    """
    return getattr(model, "_inputs_struct", None), getattr(model, "_outputs_struct", None)


# Trainers


def compile_arguments(model):
    """What a model's `compile` was given, functions and objects as they are: `Trainer._compile_config`. `{}` before it was."""
    found = getattr(model, "_compile_config", None)
    return {} if found is None else found.config


def build_for_training(model, batch):
    """Makes what `fit` makes before its first step, for a batch of these shapes: `Trainer._symbolic_build`.

    These are the variables of the optimizer, the loss and the metrics.
    """
    model._symbolic_build(data_batch=batch)


def write_back_state(model):
    """Gives a model's variables the values they have in a `fit` that is under way: `jax_state_sync` of JAX's trainer.

    That has them elsewhere in between. On TensorFlow variables are what is trained.
    """
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def strategy_of_model(model):
    """The `tf.distribute` strategy in whose scope a model was made on TensorFlow, or None: `_distribute_strategy`."""
    return getattr(model, "_distribute_strategy", None)


def strategy_of_optimizer(optimizer):
    """The `tf.distribute` strategy that was active when an optimizer was made on TensorFlow: `_distribution_strategy`."""
    return optimizer._distribution_strategy


# Losses


def compiled_loss(model):
    """The `CompileLoss` of a compiled model, or None: `Trainer._compile_loss`."""
    return getattr(model, "_compile_loss", None)


def compiled_metrics(model):
    """The `CompileMetrics` of a compiled model, or None: `Trainer._compile_metrics`."""
    return getattr(model, "_compile_metrics", None)


def flat_losses(compile_loss):
    """The losses of a built `CompileLoss`: named tuples with a `loss` and its `loss_weights`. `CompileLoss._flat_losses`."""
    return compile_loss._flat_losses


def replace_flat_losses(compile_loss, losses):
    """Has a built `CompileLoss` call others in place of its `flat_losses`."""
    compile_loss._flat_losses = losses


def masked_weight(weight, mask, reduction):
    """A loss's sample weights, None for none, with what a float32 mask hides taken out: `keras.src.losses.loss.apply_mask`."""
    from keras.src.losses.loss import apply_mask

    return apply_mask(weight, mask, "float32", reduction)


def loss_function(loss):
    """What a loss that Keras makes of a function calls, and its further arguments: `LossFunctionWrapper.fn`, `_fn_kwargs`.

    None for other losses, and for those with a `call` of their own.
    """
    from keras.src.losses.losses import LossFunctionWrapper

    call = getattr(type(loss), "call", None)
    return (loss.fn, loss._fn_kwargs) if call is LossFunctionWrapper.call else None


def logits_behind(probabilities, activation):
    """The logits that TensorFlow's cross-entropies take in place of probabilities, or None: `_get_logits` of Keras's backend.

    Args:
        probabilities: what a loss is given.
        activation: of which operation they may be the result, `"Softmax"` or `"Sigmoid"`.
    """
    from keras.src.backend.tensorflow.nn import _get_logits

    found, are_logits = _get_logits(probabilities, False, activation, "")
    return found if are_logits else None


def set_logits(probabilities, logits):
    """Has TensorFlow's cross-entropies take these logits in place of probabilities: `_keras_logits`."""
    probabilities._keras_logits = logits


def same_rank(values, weight):
    """Loss values and their weights, one of them with an axis of size one more or less: `squeeze_or_expand_to_same_rank`."""
    from keras.src.losses.loss import squeeze_or_expand_to_same_rank

    return squeeze_or_expand_to_same_rank(values, weight)


# Calls and variables


def over_time(step, inputs, initial_states, **arguments):
    """The loop that recurrent layers run: `keras.src.backend.rnn`, with its arguments."""
    from keras.src.backend import rnn

    return rnn(step, inputs, initial_states, **arguments)


def call_context():
    """What Keras knows of the call that is under way: its `entry_layer`, called first, and what that was told; or None."""
    from keras.src.backend.common import global_state

    return global_state.get_global_attribute("current_call_ctx")


def keep_message(error):
    """Has Keras raise an error as it is, without the arguments of the call it comes from: `_keras_call_info_injected`."""
    error._keras_call_info_injected = True


def is_stateless():
    """Whether variables have values of a `keras.StatelessScope`, so that one made now would be seen by nobody."""
    from keras.src.backend import in_stateless_scope

    return in_stateless_scope()


def mask_of(tensor):
    """The mask that Keras attached to a tensor, or None: `keras.src.backend.get_keras_mask`.

    It is not an attribute of the tensor on JAX, whose tracers take none.
    """
    from keras.src.backend import get_keras_mask

    return get_keras_mask(tensor)


def set_mask(tensor, mask):
    """Attaches a mask to a tensor, as `mask_of` finds it, unless it is None: `set_keras_mask` of Keras's `masking`."""
    from keras.src.backend.common.masking import set_keras_mask

    if mask is not None:
        set_keras_mask(tensor, mask)


def layout_of(variable):
    """Where a variable lies on the devices of a `keras.distribution`, a `TensorLayout` or JAX's own, or None: `_layout`."""
    return getattr(variable, "_layout", None)


def set_layout(variable, layout):
    """Has what is assigned to a variable from now on lie so: `_layout`."""
    variable._layout = layout


# What Keras calls under its name, of classes that ours extend: the class, the methods, and why ours override them.
OVERRIDDEN = {
    keras.optimizers.Optimizer: {
        "_backend_apply_gradients": "averaging.py: the variables it averages are not all that there are",
        "_overwrite_variables_directly_with_gradients": "data_parallel.py: each replica of a strategy assigns its own",
        # Of TensorFlow's optimizers alone.
        "_all_reduce_sum_gradients": "data_parallel.py: gradients are the same on all replicas by then",
    },
}

# What ours use of what they inherit: the class, the names, and what for.
INHERITED = {
    keras.optimizers.Optimizer: {
        "_trainable_variables": "averaging.py: the list that Keras pairs with values, or with averages",
        "_model_variables_moving_average": "averaging.py: the list of averages, None for variables that are overwritten",
        "_trainable_variables_indices": "checks.py, coverage.py: whether a variable is one that the optimizer was built on",
        "_var_key": "a variable's identity, on TensorFlow that of what Keras's variable wraps",
        "_get_variable_index": "rest.py: which of the variables a step is of",
        "_overwrite_variable_with_gradient": "whether a variable is overwritten, rather than stepped",
        "_iterations": "natural_gradient.py: the number of the step",
        "_learning_rate": "state.py, hylo.py: the learning rate as it was given, a schedule as such",
    },
    # Attributes that `Adam.update_step` reads of what stands for an `Adam` in `rest.py`.
    keras.optimizers.Adam: {
        "_momentums": "rest.py: the first moments",
        "_velocities": "rest.py: the second moments",
    },
}
