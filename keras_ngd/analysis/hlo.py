"""What a program compiled by XLA consists of, read from its text."""

import collections
import dataclasses
import functools
import itertools
import math
import re

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Those of the host's memory (`MoveToHost`) and Python's callbacks (`xla_ffi_python_cpu_callback`) are called so.
_HOST = re.compile(r"host|callback", re.IGNORECASE)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass
class Contents:
    """What a program does, or a part of it.

    Attributes:
        product_flops: of matrix products and convolutions; two for each product of two numbers.
        collectives: by kind, how many.
        collective_bytes: that take part in them on one device: of what is summed, or of what is gathered.
        conditionals: how many.
        loops: how many of which the text does not say how often they run; what is in them counts once.
        custom_calls: by target, how many.
        host: operations that wait for the host.
    """

    product_flops: int = 0
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    collective_bytes: int = 0
    conditionals: int = 0
    loops: int = 0
    custom_calls: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    host: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other, times=1):
        """Adds what another part does, so many times."""
        for field in dataclasses.fields(self):
            value = getattr(other, field.name)
            if isinstance(value, int):
                setattr(self, field.name, getattr(self, field.name) + times * value)
            else:
                getattr(self, field.name).update({name: times * count for name, count in value.items()})


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self):
        """Names of its operands."""
        end, depth = len(self.rest), 1
        for i, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                end = i
                break
        return re.findall(r"%([\w.-]+)", self.rest[:end])

    @property
    def called(self):
        """Names of the computations that it calls."""
        found = []
        for one, several in _CALLED.findall(self.rest):
            found += [one] if one else re.findall(r"[\w.-]+", several.replace("%", ""))
        return found


def shapes(text):
    """The arrays of a type: pairs of element type and shape."""
    return [
        (kind, tuple(int(size) for size in re.findall(r"\d+", sizes)))
        for kind, sizes in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", text))
    ]


def type_bytes(text):
    """Bytes of a type as XLA writes it, such as `(f32[16,8]{1,0}, s32[])`; layouts and padding do not count."""
    total = 0
    for kind, sizes in shapes(text):
        digits = re.search(r"\d+", kind)
        bits = 8 if kind == "pred" else int(digits[0]) if digits else 0
        total += math.prod(sizes) * bits / 8
    return math.ceil(total)


def parse(text):
    """The computations of a program's text.

    Args:
        text: of one module, as `jax.stages.Compiled.as_text()` or TensorFlow's `experimental_get_compiler_ir` give it.

    Returns:
        A dict from names of computations to lists of `Instruction`, and the name of the first to run.

    Raises:
        ValueError: if there is none.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) or (current is None and line.endswith("{") and " -> " in line):
            header = _COMPUTATION.match(line)
            if header:
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            instruction = _INSTRUCTION.match(line)
            if instruction:
                current.append(Instruction(*instruction.groups()))
    if entry is None:
        raise ValueError(f"`text` must be the text of an XLA module with an ENTRY computation. Received: {text[:80]!r}")
    return computations, entry


def contents(text):
    """What a program does at every run, and what only where a conditional takes the branch that has it.

    Of a conditional's branches the sum counts, not the largest: one of those of a training step usually does nothing.

    Args:
        text: as for `parse`.

    Returns:
        Two `Contents`: outside of conditionals, and inside.
    """
    computations, entry = parse(text)

    @functools.cache
    def walk(name):
        outside, inside = Contents(), Contents()
        types = {instruction.name: instruction.type for instruction in computations[name]}
        for instruction in computations[name]:
            outside.add(_own(instruction, types))
            times = _trips(instruction)
            # What has begun ends: the operation's second half names the same computation.
            called = [] if instruction.opcode in ("async-done", "async-update") else instruction.called
            for callee in called:
                if callee not in computations:
                    continue
                every, some = walk(callee)
                (inside if instruction.opcode == "conditional" else outside).add(every, times)
                inside.add(some, times)
        return outside, inside

    return walk(entry)


def _trips(instruction):
    known = _TRIPS.search(instruction.rest) if instruction.opcode == "while" else None
    return int(known[1]) if known else 1


def _own(instruction, types):
    """What an instruction does by itself."""
    own, opcode = Contents(), instruction.opcode
    base = opcode.removesuffix("-start")
    if base in COLLECTIVES:
        own.collectives[base] += 1
        operands = sum(type_bytes(types.get(name, "")) for name in instruction.operands)
        result = type_bytes(instruction.type)
        if opcode != base:
            # The result of the first half of an operation in two has its operands in it, and what is only counted.
            result = result - operands if base == "all-gather" else 0
        own.collective_bytes += max(operands, result)
    elif opcode == "conditional":
        own.conditionals += 1
    elif opcode == "while":
        own.loops += _TRIPS.search(instruction.rest) is None
    elif opcode == "custom-call":
        named = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
        target = named[1] if named else "unknown"
        own.custom_calls[target] += 1
        if _HOST.search(target):
            own.host[target] += 1
    elif opcode in ("infeed", "outfeed") or (
        opcode in ("send", "recv") and "is_host_transfer=true" in instruction.rest
    ):
        own.host[opcode] += 1
    elif opcode in ("dot", "convolution"):
        count = _dot_flops if opcode == "dot" else _convolution_flops
        own.product_flops += count(instruction, types)
    return own


def _operand_shapes(instruction, types):
    inline = shapes(instruction.rest.split(")")[0])
    named = [shapes(types[name])[0] for name in instruction.operands if name in types]
    return [shape for _, shape in (named or inline)]


def _dot_flops(instruction, types):
    lhs = _operand_shapes(instruction, types)[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2 * math.prod(shapes(instruction.type)[0][1]) * math.prod(lhs[axis] for axis in axes)


def _convolution_flops(instruction, types):
    lhs, rhs = _operand_shapes(instruction, types)[:2]
    result = shapes(instruction.type)[0][1]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    assert labels is not None
    of_lhs, of_rhs, of_result = labels.groups()
    given = re.search(r"window=\{([^}]*)\}", instruction.rest)
    window = dict(item.split("=") for item in given[1].split()) if given else {}
    total = 2 * result[of_result.index("b")] * result[of_result.index("f")] * rhs[of_rhs.index("i")]
    for axis in range(len(of_lhs) - 2):
        label = str(axis)
        stride, lhs_dilate, rhs_dilate = (
            int(window[key].split("x")[axis]) if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        before = int(window["pad"].split("x")[axis].split("_")[0]) if "pad" in window else 0
        total *= _seen(
            lhs[of_lhs.index(label)],
            rhs[of_rhs.index(label)],
            result[of_result.index(label)],
            stride,
            before,
            lhs_dilate,
            rhs_dilate,
        )
    return total


@functools.cache
def _seen(size, kernel, outputs, stride, before, lhs_dilate, rhs_dilate):
    """Pairs of an output and a kernel position, along one axis, that see an input and neither padding nor a hole."""
    positions = (o * stride + k * rhs_dilate - before for o, k in itertools.product(range(outputs), range(kernel)))
    return sum(0 <= p <= (size - 1) * lhs_dilate and p % lhs_dilate == 0 for p in positions)
