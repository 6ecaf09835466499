"""What Keras knows of the layer's call that is under way: its context, and masks of tensors."""


def call_context():
    """What Keras knows of the call that is under way: its `entry_layer`, called first, and what that was told; or None."""
    # Keras has no public way to ask.
    from keras.src.backend.common import global_state

    return global_state.get_global_attribute("current_call_ctx")


def mask_of(tensor):
    """The mask that Keras attached to a tensor, or None."""
    # Not an attribute of the tensor on JAX, whose tracers take none; Keras has no public way to ask.
    from keras.src.backend import get_keras_mask

    return get_keras_mask(tensor)
