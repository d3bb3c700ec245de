"""Reads PTX text: registers, instructions, basic blocks, and where threads that diverged meet again.

Understands what LLVM's NVPTX back end and Triton's inline assembly write. A scope `{ .reg ...; ... }` is flattened, and
the loop that spins on an mbarrier becomes the pseudo instruction `mbarrier.wait`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

SPIN_LOOP = re.compile(
    r"\{\s*\.reg \.pred\s+(\w+);\s*(\w+):\s*(@\S+\s+)?mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64 \1, ([^;]*);\s*"
    r"@!\1 bra(?:\.uni)? \2;\s*\}"
)
LOCATION = r"\.loc\s+(\d+) (\d+) (\d+)[^\n]*"
STATEMENT = re.compile(LOCATION + r"|([$\w]+):(?!:)|([^\s{};][^;]*);")  # braces inside are operands, before it scopes
OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+")
NUMBER = re.compile(r"0[fFdD]([0-9a-fA-F]+)|([-+]?(?:0[xX][0-9a-fA-F]+|\d+))U?")


@dataclass(frozen=True)
class Register:
    number: int
    kind: str  # pred, b16, b32, b64
    name: str


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int  # bytes
    coordinates: tuple = ()  # of a tensor map's box


# An int is a number or the bits of a float; a str a special register, parameter, label, shared memory, or the sink `_`.
Operand = Register | int | str | Address | tuple


@dataclass
class Instruction:
    guard: Register | None
    negated: bool  # whether the guard is
    opcode: tuple[str, ...]
    operands: list[Operand]
    place: tuple[str, int, int]  # file, line and column of the Python source
    text: str
    unfilled: bool = False  # whether it belongs to a masked load without `other`

    @property
    def name(self) -> str:
        return ".".join(self.opcode)

    @functools.cached_property
    def registers(self) -> list[Register]:
        """All that it names."""
        return _registers((self.guard, *self.operands))


def _registers(operand: Operand | None) -> list[Register]:
    if isinstance(operand, Address):
        operand = (operand.base, *operand.coordinates)
    if isinstance(operand, tuple):
        return [register for x in operand for register in _registers(x)]
    return [operand] if isinstance(operand, Register) else []


@dataclass
class Block:
    """Instructions without a branch among them. Blocks go by their number; the end of the kernel is one more."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)  # of a conditional branch: taken, not taken
    meeting: int = -1  # immediate post-dominator


@dataclass
class Kernel:
    name: str
    parameters: list[str]
    threads: int  # of a CTA
    blocks: list[Block]
    registers: int


def read(text: str) -> Kernel:
    """The only entry of a module."""
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\n\{", text, re.S)
    name, declared, directives = head.groups()
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"]*)"', text))
    body = re.sub(r"//[^\n]*", "", text[head.end() :].split("-- End function")[0])
    body = SPIN_LOOP.sub(lambda m: f"{m[3] or ''}mbarrier.wait.parity.shared.b64 {m[4]};", body)
    registers: dict[str, Register] = {}
    place, statements = ("?", 0, 0), []  # labels (as str) and instructions, in order
    for file, line, column, label, statement in STATEMENT.findall(body):
        if file:
            place = files.get(file, file), int(line), int(column)
        elif label:
            statements.append(label)
        elif statement.startswith(".reg"):
            _declare(statement, registers)
        elif not statement.startswith("."):
            statements.append(_instruction(statement, registers, place))
    threads = int(re.search(r"\.reqntid\s+(\d+)", directives)[1])
    return Kernel(name, re.findall(r"\w+_param_\d+", declared), threads, _basic_blocks(statements), len(registers))


def _declare(statement: str, registers: dict[str, Register]) -> None:
    kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
    kind = kind if kind == "pred" else f"b{kind[1:]}"
    for name, count in re.findall(r"([%\w]+)(?:<(\d+)>)?", names):
        for full in [f"{name}{i}" for i in range(int(count))] if count else [name]:
            registers.setdefault(full, Register(len(registers), kind, full))


def _instruction(statement: str, registers: dict[str, Register], place: tuple[str, int, int]) -> Instruction:
    text = " ".join(statement.split())
    negated, guard, opcode, operands = re.fullmatch(r"(?:@(!?)(\S+) )?(\S+) ?(.*)", text).groups()
    parsed = _operands(operands, registers)
    return Instruction(registers.get(guard), bool(negated), tuple(opcode.split(".")), parsed, place, text)


def _operands(text: str, registers: dict[str, Register]) -> list[Operand]:
    """Of a list with commas; what stands in braces or brackets is one operand."""
    return [_operand(x.strip(), registers) for x in OPERAND.findall(text)]


def _operand(text: str, registers: dict[str, Register]) -> Operand:
    if text.startswith("{"):
        return tuple(_operands(text[1:-1], registers))
    if text.startswith("["):
        base, *box = OPERAND.findall(text[1:-1])
        base, offset = re.fullmatch(r"\s*(.+?)\s*(?:\+\s*(-?\d+)\s*)?", base).groups()
        return Address(_operand(base, registers), int(offset or 0), *_operands("".join(box), registers))
    if "|" in text:
        return tuple(_operand(x, registers) for x in text.split("|"))
    number = NUMBER.fullmatch(text)
    if number:
        return int(number[1], 16) if number[1] else int(number[2], 0)
    return registers.get(text, text)


def _basic_blocks(statements: list[str | Instruction]) -> list[Block]:
    blocks, numbers = [Block()], {}
    targets = {x.operands[0] for x in statements if isinstance(x, Instruction) and x.opcode[0] == "bra"}
    for x in statements:
        if isinstance(x, Instruction):
            blocks[-1].instructions.append(x)
            ends = x.opcode[0] in ("bra", "ret")
        else:
            numbers[x] = len(blocks)
            ends = x in targets
        if ends:
            blocks.append(Block())
    for i, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        block.successors = [i + 1]
        if last is not None and last.opcode[0] in ("bra", "ret"):
            target = numbers[last.operands[0]] if last.opcode[0] == "bra" else len(blocks)
            block.successors = [target] if last.guard is None else [target, i + 1]
    _find_meetings(blocks)
    return blocks


def _find_meetings(blocks: list[Block]) -> None:
    """Immediate post-dominators: the first block that every path to the end goes through."""
    end = len(blocks)
    after = [set(range(end + 1)) for _ in blocks] + [{end}]  # what every path from a block goes through
    changed = True
    while changed:
        changed = False
        for i in reversed(range(end)):
            common = {i}.union(set.intersection(*(after[successor] for successor in blocks[i].successors)))
            changed, after[i] = changed or common != after[i], common
    for i, block in enumerate(blocks):
        block.meeting = max(after[i] - {i}, key=lambda j: len(after[j]))  # all the others come after it
