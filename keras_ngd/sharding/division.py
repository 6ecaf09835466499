"""How the devices of a mesh share out work on batches of matrices. Of the JAX backend alone: elsewhere nobody shares."""

import contextlib
from dataclasses import dataclass
from typing import Any

from keras import ops

# The mesh whose devices share out the work of `divided`, innermost last.
_SHARING: list[Any] = [None]


@contextlib.contextmanager
def dividing(mesh):
    """In this context the devices of `mesh` share out the work of `divided`; all do all of it if that is None."""
    _SHARING.append(mesh)
    try:
        yield
    finally:
        _SHARING.pop()


def is_dividing():
    """Whether devices share out work."""
    return _SHARING[-1] is not None


def divided(function, state, *given):
    """`function` of batches of matrices; inside `dividing`, each device has some of the matrices and does them alone.

    Matrices travel as parts of their rows: from how they are stored to whole ones on one device each, and back.

    Args:
        function: takes `[k]` booleans (which of its `k` matrices are there to be done), `state` and `given`; returns what
            takes the place of `state`.
        state: list of tensors `[k, rows, columns]` or `[k, size]`.
        *given: tensors `[k, rows, columns]` or `[k]`.

    Returns:
        What `function` returns.
    """
    count = state[0].shape[0]
    if not is_dividing():
        return function(ops.ones((count,), "bool"), state, *given)
    import jax

    mesh, tensors = _SHARING[-1], [*state, *given]
    travel = _Travel(mesh.axis_names, mesh.size, count)

    def of_one_device(*parts):
        mine = [travel.received(part, t.shape) for part, t in zip(parts, tensors, strict=True)]
        known = travel.received(ops.ones((count,), "bool"), (count,))
        with dividing(None):
            found = function(known, mine[: len(state)], *mine[len(state) :])
        return [travel.returned(t) for t in found]

    def spec(tensor):
        return jax.sharding.PartitionSpec(*([None, mesh.axis_names] if travel.in_parts(tensor.shape) else []))

    parts = [_filled_up(t, 1, mesh.size) if travel.in_parts(t.shape) else t for t in tensors]
    specs = [spec(t) for t in tensors]
    found = jax.shard_map(
        of_one_device, mesh=mesh, in_specs=tuple(specs), out_specs=specs[: len(state)], check_vma=False
    )(*parts)
    return [
        new[:, : old.shape[1]] if travel.in_parts(old.shape) else new for new, old in zip(found, state, strict=True)
    ]


def _filled_up(tensor, axis, multiple):
    missing = -tensor.shape[axis] % multiple
    return ops.pad(tensor, [(0, missing if i == axis else 0) for i in range(len(tensor.shape))]) if missing else tensor


@dataclass(frozen=True)
class _Travel:
    """How `count` matrices get to `devices` devices and back, neighbours to different ones, as one device sees it."""

    axes: tuple
    devices: int
    count: int

    @property
    def slots(self):
        """How many matrices there are for each device, the last of which may be none."""
        return -(-self.count // self.devices)

    def in_parts(self, shape):
        """Whether tensors of this shape are matrices of which each device has some rows."""
        return len(shape) == 3 and shape[1] >= self.devices

    def received(self, part, shape):
        """This device's share `[slots, ...]` of tensors of this shape, from what it has of all of them."""
        import jax

        part = _filled_up(part, 0, self.devices)
        part = ops.swapaxes(ops.reshape(part, (self.slots, self.devices, *part.shape[1:])), 0, 1)
        if not self.in_parts(shape):
            return part[jax.lax.axis_index(self.axes)]
        part = ops.reshape(part, (self.slots * self.devices, *part.shape[2:]))
        return jax.lax.all_to_all(part, self.axes, split_axis=0, concat_axis=1, tiled=True)[:, : shape[1]]

    def returned(self, mine):
        """The inverse of `received`."""
        import jax

        if not self.in_parts(mine.shape):
            part = jax.lax.all_gather(mine, self.axes, tiled=True)
        else:
            mine = _filled_up(mine, 1, self.devices)
            part = jax.lax.all_to_all(mine, self.axes, split_axis=1, concat_axis=0, tiled=True)
        part = ops.swapaxes(ops.reshape(part, (self.devices, self.slots, *part.shape[1:])), 0, 1)
        return ops.reshape(part, (self.slots * self.devices, *part.shape[2:]))[: self.count]
