"""Gives the intermediate results of a generated C network one block of static memory.

The code generator declares every intermediate result as a variable of its own on the stack, all
alive at once: 340 kB for a network of 11,000 parameters on 32x32 pixels. Most of them are dead
when the next one is written, so they can share their bytes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from understudy.errors import ModelError, problem

ALIGNMENT = 16
ITEM_BYTES = {
    "float": 4,
    "double": 8,
    "int8_t": 1,
    "uint8_t": 1,
    "int16_t": 2,
    "uint16_t": 2,
    "int32_t": 4,
    "uint32_t": 4,
    "int64_t": 8,
    "uint64_t": 8,
    "_Bool": 1,
}
# C lets characters alias any other type, so these share the memory of the floats; each other type
# has memory of its own.
_SHARED_TYPES = ("float", "int8_t", "uint8_t")
# Element i of the result is made of element i alone: it may overwrite an operand of its own shape.
_ELEMENTWISE = frozenset(
    {"Relu", "LeakyRelu", "Clip", "Elu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Add"}
    | {"Sub", "Mul", "Div", "Identity", "Neg", "QLinearAdd", "QLinearSigmoid", "QLinearLeakyRelu"}
    | {"BitwiseNot"}
)

_FUNCTION = re.compile(
    r"OpType: (?P<operator>\w+)\n(?: \*[^\n]*\n)*? \*/\n"
    r"EMX_NODE_FN void (?P<name>\w+)\((?P<parameters>[^)]*)\) \{"
)
_PARAMETER = re.compile(r"(?P<const>const )?(?P<ctype>\w+) \w+(?P<dims>(?:\[\d+\])*)")
_LOCAL = re.compile(r" {4}(?P<ctype>\w+) (?P<name>\w+)(?P<dims>(?:\[\d+\])+);")
_CALL = re.compile(r" {4}(?P<function>\w+)\((?P<arguments>[\w, ]+)\);")


@dataclass(frozen=True)
class Array:
    """A C array: element type and sizes."""

    ctype: str
    dims: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return ITEM_BYTES[self.ctype] * math.prod(self.dims)


@dataclass(frozen=True)
class Call:
    """One operator of the network: the arrays it reads and the arrays it writes, by name."""

    operator: str
    function: str
    arguments: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """The generated function that runs the operators in turn.

    Attributes:
        parameters: images and logits, by name.
        intermediates: what the operators hand to each other, by name.
    """

    parameters: dict[str, Array]
    intermediates: dict[str, Array]
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Plan:
    """Where each intermediate result lies.

    Attributes:
        offsets: name to (type of the block, offset in bytes).
        block_bytes: type of a block to its size.
    """

    offsets: dict[str, tuple[str, int]]
    block_bytes: dict[str, int]

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(self.block_bytes.values())


def parse_array(ctype: str, dims: str) -> Array:
    """Return the array of a C declaration such as ``float``, ``[1][3]``."""
    if ctype not in ITEM_BYTES:
        raise _unknown_code(f"the type {ctype}")
    return Array(ctype, tuple(int(size) for size in re.findall(r"\d+", dims)))


def read_entry(code: str, parameters: str, body: str) -> Entry:
    """Return what the generated entry function does.

    Args:
        code: the whole generated file, with the operators' functions.
        parameters: the text between the entry function's parentheses.
        body: the lines between its braces.

    Raises:
        ModelError: it holds a line that is neither an array nor the call of an operator.
    """
    functions = {found["name"]: found for found in _FUNCTION.finditer(code)}
    outer = {}
    for parameter in parameters.split(", "):
        declared = _PARAMETER.fullmatch(parameter)
        if declared is None:
            raise _unknown_code(f"the parameter '{parameter}'")
        name = parameter.removeprefix("const ").split()[1].split("[")[0]
        outer[name] = parse_array(declared["ctype"], declared["dims"])
    intermediates: dict[str, Array] = {}
    calls: list[Call] = []
    for line in body.splitlines():
        local, call = _LOCAL.fullmatch(line), _CALL.fullmatch(line)
        if local:
            intermediates[local["name"]] = parse_array(local["ctype"], local["dims"])
        elif call and call["function"] in functions:
            arguments = tuple(call["arguments"].split(", "))
            calls.append(_read_call(functions[call["function"]], arguments))
        else:
            raise _unknown_code(f"the line '{line.strip()}'")
    return Entry(outer, intermediates, tuple(calls))


def _read_call(function: re.Match[str], arguments: tuple[str, ...]) -> Call:
    parameters = function["parameters"].split(", ")
    if len(parameters) != len(arguments):
        raise _unknown_code(f"a call of {function['name']} with {len(arguments)} arguments")
    is_read = [parameter.startswith("const ") for parameter in parameters]
    reads = tuple(name for name, read in zip(arguments, is_read, strict=True) if read)
    writes = tuple(name for name, read in zip(arguments, is_read, strict=True) if not read)
    return Call(function["operator"], function["name"], arguments, reads, writes)


def plan_memory(entry: Entry) -> Plan:
    """Give each intermediate result a place that nothing alive at the same time has.

    The largest come first, each as low as it fits (Pisarchyk and Lee 2020, "Efficient Memory
    Management for Deep Neural Net Inference", greedy by size).
    """
    lives = _lifetimes(entry)
    same_place = _overwrites(entry, lives)
    placed: dict[str, list[tuple[int, int, int, int]]] = {}
    offsets: dict[str, tuple[str, int]] = {}
    block_bytes: dict[str, int] = {}
    groups: dict[str, list[str]] = {}
    for name in lives:
        groups.setdefault(same_place.get(name, name), []).append(name)
    for names in sorted(
        groups.values(), key=lambda names: -entry.intermediates[names[0]].num_bytes
    ):
        array = entry.intermediates[names[0]]
        block = _SHARED_TYPES[0] if array.ctype in _SHARED_TYPES else array.ctype
        first, last = min(lives[n][0] for n in names), max(lives[n][1] for n in names)
        size = -(-array.num_bytes // ALIGNMENT) * ALIGNMENT
        offset = 0
        for begin, end, other_first, other_last in sorted(placed.setdefault(block, [])):
            if other_first <= last and first <= other_last and begin < offset + size:
                offset = max(offset, end)
        placed[block].append((offset, offset + size, first, last))
        offsets |= dict.fromkeys(names, (block, offset))
        block_bytes[block] = max(block_bytes.get(block, 0), offset + size)
    return Plan(offsets, block_bytes)


def _lifetimes(entry: Entry) -> dict[str, tuple[int, int]]:
    """Return name to the indices of the first and the last call that uses it."""
    lives: dict[str, tuple[int, int]] = {}
    for index, call in enumerate(entry.calls):
        for name in call.arguments:
            if name in entry.intermediates:
                lives[name] = (lives.get(name, (index, index))[0], index)
    return lives


def _overwrites(entry: Entry, lives: dict[str, tuple[int, int]]) -> dict[str, str]:
    """Return results that may lie where an operand lay: name to the first name of that place."""
    same_place: dict[str, str] = {}
    for index, call in enumerate(entry.calls):
        if call.operator not in _ELEMENTWISE or len(call.writes) != 1:
            continue
        result = call.writes[0]
        array = entry.intermediates.get(result)
        for operand in call.reads:
            dies_here = operand in lives and lives[operand][1] == index
            if array is not None and dies_here and entry.intermediates[operand] == array:
                same_place[result] = same_place.get(operand, operand)
                break
    return same_place


def write_entry(entry: Entry, plan: Plan, name: str) -> str:
    """Return C code: the blocks, and ``void NAME(const float *, float *)`` that uses them."""
    lines = ["/* Intermediate results; those that are never alive together share bytes. */"]
    for block, num_bytes in plan.block_bytes.items():
        count = num_bytes // ITEM_BYTES[block]
        lines.append(f"static _Alignas({ALIGNMENT}) {block} arena_{block}[{count}];")
    lines += ["", f"void {name}(const float *pixels_chw, float *logits_k) {{"]
    (images, images_array), (logits, logits_array) = entry.parameters.items()
    lines.append(_pointer(images, images_array, "(const void *)pixels_chw", const="const "))
    lines.append(_pointer(logits, logits_array, "(void *)logits_k"))
    for intermediate, (block, offset) in plan.offsets.items():
        address = f"(void *)((unsigned char *)arena_{block} + {offset})"
        lines.append(_pointer(intermediate, entry.intermediates[intermediate], address))
    lines += [f"    {call.function}({', '.join(call.arguments)});" for call in entry.calls]
    return "\n".join([*lines, "}", ""])


def _pointer(name: str, array: Array, address: str, *, const: str = "") -> str:
    inner = "".join(f"[{size}]" for size in array.dims[1:])
    if not inner:
        return f"    {const}{array.ctype} *{name} = {address};"
    return f"    {const}{array.ctype} (*{name}){inner} = {address};"


def _unknown_code(what: str) -> ModelError:
    return ModelError(
        problem(
            f"the generated C code has {what}, which the memory planner does not know",
            expected="an image classifier of fixed shapes, and emx-onnx-cgen 1.4",
            mend="Install that version, or export to another target.",
        )
    )
