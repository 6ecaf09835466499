"""Where an optimizer's state lies on the devices of a `keras.distribution`."""

import warnings

from keras_ngd import sharding


class ShardedState:
    """Mixin: curvatures and statistics are whole on every device, or each device has a part of them."""

    @staticmethod
    def _check_shard_state(shard_state, gradient_worker_fraction):
        if not isinstance(shard_state, bool):
            raise ValueError(f"`shard_state` must be True or False. Received: shard_state={shard_state!r}")
        if shard_state and sharding.distribution() is None:
            raise ValueError(
                "`shard_state=True` is for several devices, but no `keras.distribution` of several devices is active on the JAX "
                "backend. Call `keras.distribution.set_distribution(keras.distribution.DataParallel())` before you make the "
                "optimizer and the model, or leave `shard_state` out."
            )
        if shard_state and gradient_worker_fraction != 1:
            raise ValueError(
                "`gradient_worker_fraction` is for workers of Horovod, `shard_state` for devices of a `keras.distribution`: set "
                f"one of them. Received: gradient_worker_fraction={gradient_worker_fraction!r}, shard_state=True"
            )

    @classmethod
    def from_config(cls, config, custom_objects=None):
        if config.get("shard_state") and sharding.distribution() is None:
            warnings.warn(
                f"The state of this {cls.__name__} was sharded over several devices. There is no `keras.distribution` of several "
                "devices now, so it is whole again: `shard_state=False`.",
                stacklevel=2,
            )
            config = {**config, "shard_state": False}
        return super().from_config(config, custom_objects)

    def new_statistics(self, layer):
        """What `make_statistics` gives, told where it is to lie."""
        statistics = self.make_statistics(layer)
        statistics.shard_state = self.shard_state
        return statistics

    def _add_state(self, shape, initializer, dtype, name, shard=False):
        """A variable that is whole on every device, or `shard`ed."""

        def add_variable(shape, initializer):
            return self.add_variable(shape, initializer=initializer, dtype=dtype, name=name)

        spread = sharding.spread(shape, shard)
        return add_variable(shape, initializer) if spread is None else sharding.add(add_variable, initializer, spread)

    def _add_curvature(self, shape, initializer, dtype, name):
        return self._add_state(shape, initializer, dtype, name, self.shard_state)

    @staticmethod
    def whole(block, averages):
        """A block's averages as its curvature takes them."""
        return [sharding.whole(v, t) for v, t in zip(block.statistics.averages, averages[block], strict=True)]

    @staticmethod
    def laid_out(block, averages):
        """New values of the averages of a block's statistics, where these lie."""
        spreads = [sharding.spread_of(v) for v in block.statistics.averages]
        return [t if s is None else s.laid_out(t) for t, s in zip(averages, spreads, strict=True)]

    @staticmethod
    def everywhere(group, gradients):
        """A group's gradients on all devices, before and after each has multiplied them with its part of the inverses."""
        spreads = [sharding.spread_of(v) for v in group.curvature.variables]
        if any(s is not None and s.axis is not None for s in spreads):
            return spreads[0].everywhere(gradients)
        return gradients

    @staticmethod
    def stored_state(group, state):
        """A group's state as the curvature's variables hold it."""
        return [sharding.stored(v, t) for v, t in zip(group.curvature.variables, state, strict=True)]

    def refreshing(self):
        """The context in which inverses are made, by all devices or by each its part."""
        # Under Horovod a worker may hold no inverses at all.
        variables = [v for group in self.layout.groups for v in group.curvature.variables] if self.shard_state else []
        return sharding.dividing(sharding.spread_of(variables[0]).mesh if variables else None)
