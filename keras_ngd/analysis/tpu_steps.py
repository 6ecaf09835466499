"""Training steps compiled for TPUs on a machine that has none. Of the JAX backend alone."""

import dataclasses
import importlib.util
import math
import os
import time
from typing import Any

import keras
from keras import tree

from keras_ngd import backend, keras_private, schedules
from keras_ngd.analysis import hlo
from keras_ngd.analysis.copies import captured_copy, plain_copy
from keras_ngd.analysis.tpu_tables import number
from keras_ngd.optimizers.natural_gradient import NaturalGradient

# What libtpu asks of its environment: no questions to a cloud's metadata server, and no lock on a device that is not there.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What XLA's compiler for TPUs made of one training step; all numbers are of one chip.

    "On updates" is what stands inside of conditionals: what a step does where statistics are recorded or inverses refreshed.
    Loops whose number of runs depends on data (Newton-Schulz iterations, retries with more damping) count once.

    Attributes:
        optimizer: its name.
        flops: of one step, as XLA counts them: of a conditional the largest branch.
        bytes_accessed: of one step, as XLA counts them.
        argument_bytes, output_bytes, temporary_bytes: memory for the state and the batch; for the new state, of which
            `aliased_bytes` take the place of the old one; and for what lives during a step.
        code_bytes: of the program.
        product_flops, update_product_flops: of matrix products and convolutions, on every step and on updates.
        collective_bytes, update_collective_bytes: that take part in collectives, on every step and on updates.
        collectives, update_collectives: how many, by kind.
        conditionals, loops: how many; loops are those whose number of runs is not known.
        custom_calls: the compiler's own routines, by name.
        host: operations that wait for the host; there should be none.
        seconds: processor time of tracing and compiling.
    """

    optimizer: str
    flops: float
    bytes_accessed: float
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    code_bytes: int
    product_flops: int
    update_product_flops: int
    collective_bytes: int
    update_collective_bytes: int
    collectives: dict[str, int]
    update_collectives: dict[str, int]
    conditionals: int
    loops: int
    custom_calls: dict[str, int]
    host: dict[str, int]
    seconds: float

    @property
    def memory_bytes(self) -> int:
        """What a chip needs room for: arguments, temporaries, and what of the results takes no argument's place."""
        return self.argument_bytes + self.temporary_bytes + self.output_bytes - self.aliased_bytes


@dataclasses.dataclass(frozen=True)
class TpuReport:
    """A training step compiled for a TPU topology, beside the plain one.

    Attributes:
        model: its name.
        topology: such as `"v5e:2x2"`.
        chips: how many it has.
        batch_per_chip: examples of one chip.
        step: the `CompiledStep` of the optimizer.
        plain: that of `keras.optimizers.SGD` on the same model and batch.
    """

    model: str
    topology: str
    chips: int
    batch_per_chip: int
    step: CompiledStep
    plain: CompiledStep

    def share(self, name: str) -> float:
        """The share of second order in an attribute of `CompiledStep`, such as `"flops"`: what goes beyond the plain step's."""
        step, plain = getattr(self.step, name), getattr(self.plain, name)
        return (step - plain) / step if step else 0.0

    def __str__(self) -> str:
        head = (
            f"{self.model} on {self.topology} ({self.chips} chips, {self.batch_per_chip} examples each): "
            f"{self.step.optimizer} beside {self.plain.optimizer}"
        )
        lines = [head, f"{'per chip':<38}{self.step.optimizer:>14}{self.plain.optimizer:>14}{'second order':>14}"]
        rows = [
            ("GFLOP of a step with everything due", "flops", 1e9),
            ("GFLOP of products, every step", "product_flops", 1e9),
            ("GFLOP of products, on updates", "update_product_flops", 1e9),
            ("MiB accessed by a step", "bytes_accessed", 2**20),
            ("MiB of arguments", "argument_bytes", 2**20),
            ("MiB of temporaries", "temporary_bytes", 2**20),
            ("MiB of results", "output_bytes", 2**20),
            ("MiB of program", "code_bytes", 2**20),
            ("MiB of collectives, every step", "collective_bytes", 2**20),
            ("MiB of collectives, on updates", "update_collective_bytes", 2**20),
            ("seconds of processor to compile", "seconds", 1),
        ]
        for label, name, unit in rows:
            step, plain = (getattr(which, name) / unit for which in (self.step, self.plain))
            lines.append(f"{label:<38}{number(step):>14}{number(plain):>14}{self.share(name):>14.1%}")
        counts = [("collectives, every step", "collectives"), ("collectives, on updates", "update_collectives")]
        counts += [("the compiler's own routines", "custom_calls"), ("waiting for the host", "host")]
        for label, name in counts:
            found = [
                ", ".join(f"{count} {kind}" for kind, count in sorted(getattr(which, name).items())) or "none"
                for which in (self.step, self.plain)
            ]
            lines.append(f"{label:<38}{found[0]}; plain: {found[1]}")
        lines.append(f"{'conditionals, loops':<38}{self.step.conditionals}, {self.step.loops}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """As a dict that JSON can hold; `from_dict` makes a report of it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TpuReport":
        """The report that `as_dict` was of."""
        return cls(**{**values, **{name: CompiledStep(**values[name]) for name in ("step", "plain")}})


def _check_backend():
    if backend.name() != "jax":
        raise RuntimeError(
            f"Steps are compiled for TPUs on the JAX backend, but KERAS_BACKEND={backend.name()!r}. Set KERAS_BACKEND=jax before "
            "the first import of keras; `keras_ngd.analysis.tensorflow_step_hlo` looks at TensorFlow's step."
        )


def tpu_devices(topology):
    """The devices of a TPU topology, to compile for.

    Args:
        topology: generation and shape, such as `"v5e:2x2"` or `"v4:2x2x1"`.

    Raises:
        RuntimeError: if the backend is not JAX.
        ImportError: if libtpu is not installed.
        ValueError: if there is no such topology.
    """
    _check_backend()
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ImportError(
            'The compiler for TPUs, libtpu, is not installed: pip install "keras_ngd[tpu]". It needs no TPU.'
        )
    if not isinstance(topology, str) or not topology:
        raise ValueError(f"`topology` must be a name such as 'v5e:2x2'. Received: topology={topology!r}")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            "`topology` must be a TPU's generation and the shape of a slice of it, such as 'v5e:2x2', 'v5e:16x16' or 'v4:2x2x1'. "
            f"Received: topology={topology!r}. libtpu says: {error}"
        ) from error


def tpu_compile(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    topology: str = "v5e:2x2",
    batch_per_chip: int = 32,
    data: Any = None,
    plain: CompiledStep | None = None,
) -> TpuReport:
    """Compiles a model's training step for TPUs, on a machine that needs none, and tells what it takes of each chip.

    The step is that of Keras's own JAX trainer with the model's loss and metrics, under data parallelism: the state is
    replicated, the batch is divided among all chips. The compiler is libtpu's, the one that compiles on TPU machines. It is
    run twice, for the optimizer and for `keras.optimizers.SGD` on the same model, and takes minutes for deep models. The
    model is left as it is: copies of it are captured and compiled.

    ```python
    model.compile(loss="sparse_categorical_crossentropy")
    print(keras_ngd.analysis.tpu_compile(model, keras_ngd.KFAC(), topology="v5e:16x16", batch_per_chip=32))
    ```

    Args:
        model: a built and compiled Functional or Sequential model; copied with `keras.models.clone_model`.
        optimizer: a `keras_ngd` optimizer, for which a copy is captured, or any other of Keras's. The optimizer itself is not
            used: a new one of the same configuration is.
        topology: name of a TPU topology: generation and shape. Default `"v5e:2x2"`, four chips.
        batch_per_chip: examples of a chip in each step. Default 32.
        data: a batch `(x, y)` or `(x, y, sample_weight)`, of any number of examples, of which only shapes and dtypes matter.
            Default None: the model's inputs; and for targets one integer for each output position if the loss is sparse
            categorical cross-entropy, else what has the outputs' shape.
        plain: the `CompiledStep` of SGD that an earlier report has, so that it is not compiled again. Default None.

    Returns:
        A `TpuReport`; `print` it.

    Raises:
        RuntimeError: if the backend is not JAX, or a `keras.distribution` is active.
        ImportError: if libtpu is not installed.
        TypeError: if `model` or `optimizer` is of the wrong kind.
        ValueError: if there is no such topology, the model is not built or not compiled, `batch_per_chip` is not a positive
            int, or shapes are not known.
    """
    _check_backend()
    _check_model(model)
    if keras.distribution.distribution() is not None:
        raise RuntimeError(
            "A step is compiled for another machine's devices, but a keras.distribution over this one's is active: "
            "`keras.distribution.set_distribution(None)` before. Received: "
            f"{type(keras.distribution.distribution()).__name__}"
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(f"`optimizer` must be an optimizer, such as keras_ngd.KFAC(). Received: {optimizer!r}")
    if getattr(optimizer, "split", None) == "auto":
        raise ValueError(
            "`split='auto'` is measured on the device that trains. Measure it there, and give its result here. Received: "
            f"optimizer={optimizer!r}"
        )
    batch_per_chip = schedules.check_count("batch_per_chip", batch_per_chip)
    if plain is not None and not isinstance(plain, CompiledStep):
        raise TypeError(f"`plain` must be the `plain` of another report. Received: plain={plain!r}")
    devices = tpu_devices(topology)
    data = batch_specs(model, data, batch_per_chip * len(devices))
    if plain is None:
        sgd = keras.optimizers.SGD(1e-3, momentum=0.9)
        plain = compile_step(plain_copy(model, sgd), data, devices)
    optimizer = type(optimizer).from_config(optimizer.get_config())
    if isinstance(optimizer, NaturalGradient):
        copy = captured_copy(model, data[0], optimizer, data=data[0], compiled=True)
    else:
        copy = plain_copy(model, optimizer)
    step = compile_step(copy, data, devices)
    return TpuReport(model.name, topology, len(devices), batch_per_chip, step, plain)


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: {model!r}")
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} is not built, so its shapes are unknown. Call it on a batch of data, or "
            "`model.build(input_shape)`."
        )
    if not model.compiled or getattr(model, "loss", None) is None:
        raise ValueError(
            f"Model {model.name!r} is not compiled with a loss, which its training step needs: `model.compile(loss=...)`."
        )


def batch_specs(model, data, examples):
    """Shapes and dtypes `(x, y, sample_weight)` of a batch of so many examples, for a built and compiled model.

    Raises:
        ValueError: if `data` is not a batch, or the model does not say what its inputs or targets are.
    """
    import jax

    def spec(shape, dtype):
        if any(size is None for size in shape[1:]):
            raise ValueError(
                f"Model {model.name!r} has an axis of unknown size, {tuple(shape)}, but TPUs need all sizes. Give a batch: "
                "`data=(x, y)`."
            )
        return jax.ShapeDtypeStruct((examples, *shape[1:]), keras.backend.standardize_dtype(dtype))

    if data is not None:
        if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
            raise ValueError(
                "`data` must be (x, y) or (x, y, sample_weight). Received: "
                f"data={type(data).__name__}" + (f" of {len(data)}" if hasattr(data, "__len__") else "")
            )
        specs = tree.map_structure(lambda a: spec(a.shape, a.dtype), tuple(data))
        return (*specs, None)[:3]
    inputs, outputs = keras_private.inputs_and_outputs(model)
    if inputs is None or len(tree.flatten(outputs)) != 1:
        raise ValueError(
            f"Model {model.name!r} does not say what its inputs and its one output are. Give a batch: `data=(x, y)`."
        )
    [output] = tree.flatten(outputs)
    name = getattr(model.loss, "name", None) or getattr(model.loss, "__name__", model.loss)
    if "sparse_categorical" in str(name):
        y = spec(output.shape[:-1], "int32")
    else:
        y = spec(output.shape, output.dtype)
    return tree.map_structure(lambda t: spec(t.shape, t.dtype), inputs), y, None


def compile_step(model, data, devices):
    """Compiles the training step of a compiled model, as it stands, for devices that need not be there.

    Args:
        model: built, compiled, and captured if its optimizer asks for it. What its optimizer keeps is created if it is not yet.
        data: as `batch_specs` gives it.
        devices: as `tpu_devices` gives them.

    Returns:
        A `CompiledStep`.
    """
    started = time.process_time()
    compiled = lowered_step(model, data, devices).compile()
    every, some = hlo.contents(compiled.as_text())
    costs, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return CompiledStep(
        optimizer=model.optimizer.name,
        flops=float(costs.get("flops", math.nan)),
        bytes_accessed=float(costs.get("bytes accessed", math.nan)),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        product_flops=every.product_flops,
        update_product_flops=some.product_flops,
        collective_bytes=every.collective_bytes,
        update_collective_bytes=some.collective_bytes,
        collectives=dict(every.collectives),
        update_collectives=dict(some.collectives),
        conditionals=every.conditionals + some.conditionals,
        loops=every.loops + some.loops,
        custom_calls=dict(every.custom_calls + some.custom_calls),
        host=dict(every.host + some.host),
        seconds=time.process_time() - started,
    )


def lowered_step(model, data, devices):
    """The training step as `jax.stages.Lowered`; arguments as for `compile_step`."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
    replicated, divided = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))

    def spec(value, sharding):
        return None if value is None else jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    keras_private.build_for_training(model, data)
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([spec(variable, replicated) for variable in group] for group in variables)
    batch = tree.map_structure(lambda leaf: spec(leaf, divided), data)

    # A function of its own: JAX would take what it has traced of `model.train_step` for this machine.
    def step(state, batch):
        with backend.compiling_for(mesh):
            return model.train_step(state, batch)

    shardings = (None, tree.map_structure(lambda leaf: leaf.sharding, state))
    return jax.jit(step, donate_argnums=0, out_shardings=shardings).lower(state, batch)
