"""TensorFlow's strategy for several machines, as Keras's `fit` needs it. Of that backend alone."""

from typing import Any

import tensorflow as tf

from keras_ngd.typing import Tensor


class MultiWorkerMirroredStrategy(tf.distribute.MultiWorkerMirroredStrategy):
    """`tf.distribute.MultiWorkerMirroredStrategy`, under which `fit` of Keras 3 runs.

    With TensorFlow's own, Keras 3 stops in its first step, whatever the optimizer
    ([keras#20585](https://github.com/keras-team/keras/issues/20585)): it has the strategy reduce a whole batch at once, and
    scalars over their first axis. Here `reduce` takes both; all else is the same, and so are the arguments.

    ```python
    strategy = keras_ngd.distributed.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model, optimizer = ..., keras_ngd.KFAC()
        keras_ngd.capture(model, optimizer)
        model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    model.fit(dataset)
    ```

    Every process of the cluster in `TF_CONFIG` runs this, with a data set of global batches, which TensorFlow divides.
    """

    def reduce(self, reduce_op: Any, value: Any, axis: int | None = None) -> Any:
        """As TensorFlow's, of nested values, too; scalars have no axis to be reduced over, whatever is asked."""

        def one(value: Any) -> Tensor:
            parts = self.experimental_local_results(value)
            reduced = super(MultiWorkerMirroredStrategy, self).reduce
            return reduced(reduce_op, value, axis=None if parts[0].shape.rank == 0 else axis)

        return tf.nest.map_structure(one, value)
