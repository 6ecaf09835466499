"""Where state lies on the devices of a `keras.distribution`: whole on each, or cut into a part for each.

Under a distribution of Keras's JAX backend a training step is one program on all devices. Which values travel between them, and
when, the compiler decides from where a program's inputs and outputs lie; so what belongs to one branch of a condition
is told to lie there already as it lies outside, or it would be sent at every step.

Of the JAX backend alone: on TensorFlow there is no distribution, and nothing here does anything.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ngd import backend, keras_private


def distribution():
    """The `keras.distribution` over several devices that is active on the JAX backend, or None."""
    found = keras.distribution.distribution() if backend.serves_distributions() else None
    return found if found is not None and found.device_mesh.devices.size > 1 else None


def check(variables):
    """Raises a `ValueError` if variables are not where the active distribution has them, or if it does not divide batches."""
    if not backend.serves_distributions():
        return
    active = distribution()
    mesh = None if active is None else active.device_mesh.backend_mesh
    if active is not None and mesh is not None and active.batch_dim_name not in mesh.axis_names:
        raise ValueError(
            f"The active {type(active).__name__} divides batches along the axis {active.batch_dim_name!r} of its mesh, which has "
            f"the axes {mesh.axis_names}. Give it one of these as `batch_dim_name`."
        )
    for variable in variables:
        own = _mesh_of(variable)
        if own != mesh:
            raise ValueError(
                f"Variable {variable.path!r} was made for {_described(own)}, but now training is for {_described(mesh)}. Call "
                "`keras.distribution.set_distribution(...)` before the model and the optimizer are made, and leave it set."
            )


def _mesh_of(variable):
    layout = keras_private.layout_of(variable)
    if isinstance(layout, keras.distribution.TensorLayout):
        layout = layout.backend_layout
    mesh = getattr(layout, "mesh", None)
    return mesh if mesh is not None and mesh.size > 1 else None


def _described(mesh):
    return "one device" if mesh is None else f"a mesh of {mesh.size} devices, {dict(mesh.shape)}"


def check_batch(size):
    """Raises a `ValueError` if the devices of the active distribution cannot share a batch of `size` examples."""
    active = distribution()
    if active is None or size is None:
        return
    parts = active.device_mesh.backend_mesh.shape[active.batch_dim_name]
    if size % parts:
        raise ValueError(
            f"The model's inputs have a batch size of {size}, which the {parts} devices along the mesh's axis "
            f"{active.batch_dim_name!r} cannot share equally. Take a multiple of {parts}."
        )


@dataclass(frozen=True)
class Spread:
    """How a tensor lies on a mesh of devices.

    Stacks of matrices are cut along the axis, the last one left out, that takes the fewest zeros to be filled up to what the
    devices divide, and the first of several such: products with whole matrices need nothing of other devices. What has fewer than
    three axes, or no axis as long as there are devices, is whole on all of them.

    Args:
        mesh: `jax.sharding.Mesh`.
        shape: of the tensor.
        shard: whether it is cut.
    """

    mesh: Any
    shape: tuple
    shard: bool

    @property
    def axis(self):
        """The axis along which each device has a part of its own, or None."""
        if not self.shard or len(self.shape) < 3:
            return None
        axes = [i for i, size in enumerate(self.shape[:-1]) if size >= self.mesh.size]
        return min(axes, key=lambda i: self._padding(i) / self.shape[i], default=None)

    def _padding(self, axis):
        return -self.shape[axis] % self.mesh.size

    @property
    def paddings(self):
        """Of each axis how much is added at its begin and at its end."""
        return tuple((0, self._padding(i) if i == self.axis else 0) for i in range(len(self.shape)))

    @property
    def stored_shape(self):
        """Shape of the variable that holds the tensor."""
        return tuple(size + end for size, (_, end) in zip(self.shape, self.paddings, strict=True))

    @property
    def layout(self):
        """The variable's layout."""
        import jax

        axes = [self.mesh.axis_names if i == self.axis else None for i in range(len(self.shape))]
        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(*axes))

    def filled(self, tensor):
        """The tensor filled up."""
        return ops.pad(tensor, self.paddings) if self.stored_shape != self.shape else tensor

    def stored(self, tensor):
        """The tensor as its variable holds it."""
        return self.laid_out(self.filled(tensor))

    def laid_out(self, value):
        """A value of the variable where the variable lies."""
        return keras.distribution.distribute_tensor(value, self.layout)

    def replicated(self, tensor):
        """Any tensor, whole on all devices."""
        return Spread(self.mesh, tuple(tensor.shape), False).stored(tensor)

    def gathered(self, tensor):
        """The tensor from what its variable holds."""
        return tensor[tuple(map(slice, self.shape))] if self.stored_shape != self.shape else tensor


def spread(shape, shard=False):
    """How state of this shape is to lie on the devices of the active distribution; None without one."""
    active = distribution()
    return None if active is None else Spread(active.device_mesh.backend_mesh, tuple(shape), shard)


def add(add_variable, initializer, found):
    """A variable that lies as the `Spread` `found` says.

    Args:
        add_variable: function of its shape and initializer that makes it.
        initializer: as Keras takes them.
        found: of a tensor's shape.
    """
    initializer = keras.initializers.get(initializer)

    def initial(shape, dtype=None):
        return found.filled(initializer(found.shape, dtype=dtype))

    # A `LayoutMap` is about the model's own weights: its patterns would match names of ours by accident.
    with _without_distribution():
        variable = add_variable(found.stored_shape, initial)
    variable.keras_ngd_spread = found
    keras_private.set_layout(variable, found.layout)
    variable.assign(variable.value)
    return variable


@contextlib.contextmanager
def _without_distribution():
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(before)


def spread_of(variable):
    """The variable's `Spread`, or None where it has none."""
    return getattr(variable, "keras_ngd_spread", None)


def shape_of(variable):
    """Shape of the tensor that a variable holds."""
    found = spread_of(variable)
    return tuple(variable.shape) if found is None else found.shape


def stored(variable, tensor):
    """A tensor as the variable holds it."""
    found = spread_of(variable)
    return tensor if found is None else found.stored(tensor)


def gathered(variable, tensor=None):
    """The tensor that a variable holds, from the variable's value (the current one, if none is given)."""
    tensor = ops.convert_to_tensor(variable) if tensor is None else tensor
    found = spread_of(variable)
    return tensor if found is None else found.gathered(tensor)


def to_numpy(variable):
    """A copy of the tensor that a variable holds."""
    return np.array(ops.convert_to_numpy(gathered(variable)))


def from_numpy(variable, array):
    """An array as the variable holds it."""
    found = spread_of(variable)
    return array if found is None or found.stored_shape == found.shape else np.pad(array, found.paddings)
