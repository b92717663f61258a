"""What a compiled program reads from a chip's memory and writes to it, instruction by instruction, from its text.

    moved = movements(compiled.as_text())
    sum(one.read + one.written for one in moved if not one.branch)

XLA's own cost analysis will not do for a decode step on a TPU: it counts a Pallas call without a `pl.CostEstimate` as
nothing, what goes to VMEM ahead of time twice or three times, and each branch of a conditional as if it were taken.
Here an array counts where it lies in HBM, with what its tiles pad. Slices, gathers and updates in place count what they
touch, inside of fusions too; a kernel counts its operands and results once. A loop counts as often as its condition
says; one that ends with the live slots, as if it went over all; one that carries its condition is a branch, as
most rounds are (`kvjax/rounds.py`).
"""

import dataclasses
import functools
import math
import re

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "c64": 64, "c128": 128}
"""Bits of an element; the others say them at their end (s32, f16) or begin with f8."""

_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id")
"""Move nothing."""

_FREE_TARGETS = frozenset({"ConcatBitcast", "AllocateBuffer", "SliceBitcast", "AssumeGatherIndicesInBound"})
_PLAIN = ("bitcast", "reshape", "transpose", "copy", "convert")  # pass an array on, inside of a fusion
_SLICES = ("dynamic-slice", "slice", "gather")  # read what they return
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # write an operand of theirs, by its index
KERNEL = "tpu_custom_call"


@dataclasses.dataclass(frozen=True)
class Array:
    """An array as the compiler lays it out.

    Attributes:
      size: bytes, those that pad its tiles included.
      in_hbm: whether it lies in the chip's large memory.
    """

    size: int
    in_hbm: bool

    @property
    def bytes(self) -> int:
        """What it takes of the large memory."""
        return self.size if self.in_hbm else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: of the result.
      opcode: e.g. "fusion".
      arrays: the result, flattened.
      operands: names.
      rest: what stands behind the operands.
      root: whether it is what the computation returns.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def size(self) -> int:
        """Bytes of the result, wherever it lies."""
        return sum(array.size for array in self.arrays)

    @property
    def bytes(self) -> int:
        """Bytes of the result that lie in HBM."""
        return sum(array.bytes for array in self.arrays)

    def names(self, attribute: str) -> tuple[str, ...]:
        """The computations that an attribute names, such as `calls=%fused_computation.3`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.rest)
        return tuple(re.findall(r"%([\w.\-]+)", found.group(1))) if found else ()

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Movement:
    """What one instruction moves.

    Attributes:
      name: of the instruction.
      opcode: its kind; "kernel" for a Pallas call.
      source: the scopes and the operation that it was traced from.
      read: bytes from HBM.
      written: bytes to HBM.
      branch: whether it runs only where a condition holds; what runs where it fails is no branch.
    """

    name: str
    opcode: str
    source: str
    read: int
    written: int
    branch: bool

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


Program = dict[str, dict[str, Instruction]]
"""Computation -> name -> instruction."""


def parse_program(text: str) -> tuple[str, Program]:
    """The name of the entry and all computations of a compiled program's text."""
    program: Program = {}
    entry, current = "", {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = program.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
        elif (found := _parse_line(line)) is not None:
            current[found.name] = found
    return entry, program


def _parse_line(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[len(opcode) : end]))
    if opcode in ("parameter", "constant"):  # their number, their value
        operands = (rest[len(opcode) + 1 : end - 1],)
    return Instruction(head.group(2), opcode, parse_shape(shape), operands, rest[end:], bool(head.group(1)))


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` has been closed."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index + 1
    return len(text)


@functools.cache
def parse_shape(text: str) -> tuple[Array, ...]:
    """The arrays of a shape such as `(bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, s32[])`."""
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?", text)
    return tuple(_array(kind, sizes, layout) for kind, sizes, layout in found)


def _array(kind: str, sizes: str, layout: str) -> Array:
    bits = _BITS.get(kind) or (8 if kind.startswith("f8") else int(re.search(r"\d*$", kind).group() or 0))
    shape = [int(size) for size in sizes.split(",") if size]
    order, _, marks = layout.partition(":")
    minor_first = [shape[int(axis)] for axis in order.split(",") if axis] if order else shape[::-1]
    tile = re.search(r"T\(([\d,]+)\)", marks)
    if tile:
        tiled = [int(size) for size in tile.group(1).split(",")][::-1]
        minor_first += [1] * (len(tiled) - len(minor_first))
        minor_first[: len(tiled)] = [-(-size // unit) * unit for size, unit in zip(minor_first, tiled, strict=False)]
    space = re.search(r"S\((\d+)\)", marks)
    return Array(size=math.prod(minor_first) * bits // 8, in_hbm=space is None or space.group(1) == "0")


def movements(text: str) -> list[Movement]:
    """What each instruction of a compiled program moves, in the order in which they run, those of nothing left out."""
    entry, program = parse_program(text)
    return [one for one in _of_computation(program, entry, times=1, branch=False) if one.moved]


def _of_computation(program: Program, name: str, *, times: int, branch: bool) -> list[Movement]:
    found: list[Movement] = []
    computation = program[name]
    for one in computation.values():
        if one.opcode in _FREE or one.opcode.endswith("-done"):  # what is done was counted at its start
            continue
        if one.opcode == "while":
            condition, body = one.names("condition")[0], one.names("body")[0]
            once = all(each.opcode in _FREE for each in program[condition].values())  # it is carried: a branch
            trips = times * (1 if once else _trips(program, one))
            found += _of_computation(program, body, times=trips, branch=branch or once)
        elif one.opcode == "conditional":
            for index, taken in enumerate(one.names("branch_computations")):  # the first where the condition fails
                found += _of_computation(program, taken, times=times, branch=branch or index > 0)
        elif one.opcode in ("call", "async-start"):
            for called in one.names("to_apply") or one.names("calls"):
                found += _of_computation(program, called, times=times, branch=branch)
        else:
            read, written = _of_instruction(program, computation, one)
            source = re.search(r'op_name="([^"]*)"', one.rest)
            kind = "kernel" if one.target == KERNEL else one.opcode
            where = source.group(1) if source else ""
            found.append(Movement(one.name, kind, where, times * read, times * written, branch))
    return found


def _trips(program: Program, loop: Instruction) -> int:
    """How often a loop runs: as its condition says, from 0; else over the largest array that it takes pieces of."""
    condition, body = (program[loop.names(attribute)[0]] for attribute in ("condition", "body"))
    bounds = [one.operands[0] for one in condition.values() if one.opcode == "constant"]
    if len(bounds) == 1 and bounds[0].isdigit():
        return int(bounds[0])
    found = (0, 1)
    for one in body.values():
        for operand in (body[name] for name in one.operands if name in body):
            whole = dataclasses.replace(operand, arrays=_in_hbm(operand.arrays))
            piece = 0
            if one.opcode == "fusion":
                piece = _read_in_fusion(program, program[one.names("calls")[0]], one, whole)
            elif one.opcode in (*_SLICES, "dynamic-slice-start") and operand.name == one.operands[0]:
                piece = one.arrays[-1].size if one.opcode in _SLICES else one.arrays[1].size
            if 0 < piece < whole.size:
                found = max(found, (whole.size, -(-whole.size // piece)))
    return found[1]


def _of_instruction(program: Program, computation: dict[str, Instruction], one: Instruction) -> tuple[int, int]:
    """Bytes read and written by one that is no loop, branch or call."""
    operands = [computation[name] for name in dict.fromkeys(one.operands) if name in computation]
    if one.opcode == "custom-call" and one.target in _FREE_TARGETS:
        return 0, 0
    if one.opcode == "fusion":
        fused = program[one.names("calls")[0]]
        read = sum(_read_in_fusion(program, fused, one, operand) for operand in operands)
        return read, _written_by_root(fused, one)
    if one.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
        target = one.arrays[0 if one.opcode == "copy-start" else 1]
        return target.size if operands[0].bytes else 0, target.bytes
    if one.opcode.endswith("-start") and len(one.arrays) > 1:
        return sum(operand.bytes for operand in operands), one.arrays[1].bytes
    if one.opcode in _SLICES:
        return one.size if operands[0].bytes else 0, one.bytes
    if one.opcode in _UPDATES:
        update = computation[one.operands[_UPDATES[one.opcode]]]
        return update.bytes, update.size if one.bytes else 0
    return sum(operand.bytes for operand in operands), one.bytes


def _read_in_fusion(program: Program, fused: dict[str, Instruction], one: Instruction, operand: Instruction) -> int:
    """What a fusion reads of an operand."""
    if not operand.bytes:
        return 0
    places = {str(index) for index, name in enumerate(one.operands) if name == operand.name}
    inside = [each for each in fused.values() if each.opcode == "parameter" and each.operands[0] in places]
    return min(operand.bytes, sum(_touched(program, fused, each) for each in inside))


def _touched(program: Program, fused: dict[str, Instruction], array: Instruction) -> int:
    """Bytes of an array that the rest of a fused computation looks at; its size at most matters."""
    total = 0
    for user in fused.values():
        if array.name not in user.operands:
            continue
        if user.opcode in _PLAIN and not user.root:
            total += _touched(program, fused, user)
        elif user.opcode in _SLICES and user.operands[0] == array.name:
            total += user.size
        elif user.opcode in _UPDATES and user.operands[0] == array.name:
            continue  # in place
        elif user.opcode == "fusion":
            inner = program[user.names("calls")[0]]
            total += _read_in_fusion(program, inner, user, dataclasses.replace(array, arrays=_in_hbm(array.arrays)))
        else:
            total += array.size
    return total


def _in_hbm(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(dataclasses.replace(array, in_hbm=True) for array in arrays)


def _written_by_root(fused: dict[str, Instruction], one: Instruction) -> int:
    """What a fusion writes: of an update in place, the update."""
    (root,) = [each for each in fused.values() if each.root]
    sources = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(sources) != len(one.arrays):
        return one.bytes
    total = 0
    for source, array in zip(sources, one.arrays, strict=True):
        while source.opcode in ("bitcast", "reshape", "copy") and source.operands[0] in fused:
            source = fused[source.operands[0]]
        update = fused[source.operands[_UPDATES[source.opcode]]] if source.opcode in _UPDATES else None
        total += array.bytes if update is None else min(array.bytes, update.size)
    return total
