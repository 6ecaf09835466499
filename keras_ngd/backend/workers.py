"""Who steps together: replicas of TensorFlow's strategies, and processes of Horovod. On JAX there are neither."""

import sys

from keras_ngd.backend.running import name


def has_strategies():
    """Whether there are strategies of `tf.distribute`, in whose scope models and optimizers are made."""
    return name() == "tensorflow"


def serves_horovod():
    """Whether Horovod's collectives can be a part of a step."""
    return name() == "tensorflow"


def several_processes():
    """Whether Horovod has started more than one process. It is not imported unless the user has."""
    horovod = sys.modules.get("horovod.tensorflow")
    return horovod is not None and horovod.is_initialized() and horovod.size() > 1


def replicas_in_sync():
    """How many replicas the active `tf.distribute` strategy has; 1 without one."""
    if not has_strategies():
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def replica_context():
    """TensorFlow's context of the replica that is being traced or run; None outside of one."""
    if not has_strategies():
        return None
    import tensorflow as tf

    return None if tf.distribute.in_cross_replica_context() else tf.distribute.get_replica_context()


def replica_number(context):
    """Of the replica whose context is given; None where all replicas are traced as one."""
    import tensorflow as tf

    found = tf.get_static_value(context.replica_id_in_sync_group)
    return None if found is None else int(found)
