"""Reads PTX text: registers, instructions, basic blocks, and where threads that diverged meet again.

Understands what LLVM's NVPTX back end and Triton's inline assembly write. A scope `{ .reg ...; ... }` is flattened, and
the loop that spins on an mbarrier becomes the pseudo instruction `mbarrier.wait`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SPIN_LOOP = re.compile(
    r"\{\s*\.reg \.pred\s+(\w+);\s*(\w+):\s*(@\S+\s+)?mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64 \1, ([^;]*);\s*"
    r"@!\1 bra(?:\.uni)? \2;\s*\}"
)
STATEMENT = re.compile(r"\s*(?:([$\w]+):(?!:)|(\.loc[^\n]*)|([^;]*);|(\}))")


@dataclass(frozen=True)
class Register:
    number: int
    kind: str  # pred, b16, b32, b64
    name: str


@dataclass(frozen=True)
class Immediate:
    bits: int  # two's complement of whatever width the instruction has
    is_float: bool = False


@dataclass(frozen=True)
class Symbol:
    """A special register, a parameter, shared memory, a label, or the sink `_`."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int  # bytes
    coordinates: tuple = ()  # of a tensor map's box


Operand = Register | Immediate | Symbol | Address | tuple


@dataclass
class Instruction:
    guard: Register | None
    negated: bool  # whether the guard is
    opcode: tuple[str, ...]
    operands: list[Operand]
    place: tuple[str, int, int]  # file, line and column of the Python source
    text: str

    @property
    def name(self) -> str:
        return ".".join(self.opcode)

    def sources(self) -> list[Register]:
        """Registers it reads."""
        writes = self.opcode[0] not in ("st", "stmatrix", "cp", "mbarrier", "red", "bra", "wgmma", "bar", "fence")
        found = [] if self.guard is None else [self.guard]
        for operand in self.operands[1:] if writes else self.operands:
            for x in operand if isinstance(operand, tuple) else (operand,):
                found += [x.base, *x.coordinates] if isinstance(x, Address) else [x]
        return [x for x in found if isinstance(x, Register)]


@dataclass
class Block:
    """Instructions without a branch among them."""

    label: str | None = None
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)  # of a conditional branch: taken, not taken
    meeting: int = -1  # immediate post-dominator; -1 is the end of the kernel


@dataclass
class Kernel:
    name: str
    parameters: list[tuple[str, int]]  # name, bytes
    threads: int  # of a CTA
    blocks: list[Block]
    registers: int


def read(text: str) -> Kernel:
    """The only entry of a module."""
    files = {number: path.rsplit("/", 1)[-1] for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\n\{", text, re.S)
    name, declared, directives = head.groups()
    body = re.sub(r"//[^\n]*", "", text[head.end() :].split("-- End function")[0])
    reader = _Reader(files)
    blocks = _basic_blocks(reader.statements(body))
    threads = int(re.search(r"\.reqntid\s+(\d+)", directives)[1])
    return Kernel(name, _parameters(declared), threads, blocks, len(reader.registers))


def _parameters(text: str) -> list[tuple[str, int]]:
    found = []
    for part in filter(None, map(str.strip, text.split(","))):
        kind, name, array = re.search(r"\.param\s+(.*?)(\w+_param_\d+)(?:\[(\d+)\])?\s*$", part, re.S).groups()
        found.append((name, int(array) if array else int(re.search(r"\.[a-z](\d+)", kind)[1]) // 8))
    return found


class _Reader:
    def __init__(self, files: dict[str, str]):
        self.files = files  # by the number that .loc uses
        self.registers: dict[str, Register] = {}
        self.ranges: dict[str, str] = {}  # kind of all registers with this prefix
        self.place = ("?", 0, 0)

    def statements(self, body: str) -> list[str | Instruction]:
        """Labels (as str) and instructions, in order."""
        body = SPIN_LOOP.sub(lambda m: f"{m[3] or ''}mbarrier.wait.parity.shared.b64 {m[4]};", body)
        found: list[str | Instruction] = []
        for label, location, statement, _ in STATEMENT.findall(body):
            if label:
                found.append(label)
            elif location:
                self.locate(location)
            else:
                statement = statement.strip().lstrip("{}").strip()
                while statement.startswith(".loc") or re.match(r"[$\w]+:(?!:)", statement):  # after a scope's brace
                    head, _, statement = statement.partition("\n" if statement.startswith(".loc") else ":")
                    statement = statement.strip()
                    if head.startswith(".loc"):
                        self.locate(head)
                    else:
                        found.append(head)
                if statement.startswith(".reg"):
                    self.declare(statement)
                elif statement and not statement.startswith("."):
                    found.append(self.instruction(statement))
        return found

    def locate(self, location: str) -> None:
        number, line, column = location.replace(",", " ").split()[1:4]
        self.place = self.files.get(number, number), int(line), int(column)

    def declare(self, statement: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
        kind = kind if kind == "pred" else f"b{kind[1:]}"
        for name in map(str.strip, names.split(",")):
            ranged = re.match(r"(%?\w+)<\d+>", name)
            if ranged:
                self.ranges[ranged[1]] = kind
            else:
                self.registers[name] = Register(len(self.registers), kind, name)

    def instruction(self, statement: str) -> Instruction:
        text = " ".join(statement.split())
        negated, guard, rest = re.match(r"(?:@(!?)(%?[\w$]+)\s+)?(.*)", text).groups()
        opcode, _, operands = rest.partition(" ")
        parsed = [self.operand(x) for x in _split(operands)]
        parts = tuple(opcode.replace("::", "__").split("."))
        return Instruction(self.register(guard) if guard else None, bool(negated), parts, parsed, self.place, text)

    def register(self, name: str) -> Register | None:
        if name not in self.registers:
            prefix = re.match(r"%[a-z]+(?=\d+$)", name)
            if prefix is None or prefix[0] not in self.ranges:
                return None
            self.registers[name] = Register(len(self.registers), self.ranges[prefix[0]], name)
        return self.registers[name]

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return tuple(self.operand(x) for x in _split(text[1:-1]))
        if text.startswith("["):
            return self.address(text[1:-1])
        if "|" in text:
            return tuple(self.operand(x) for x in text.split("|"))
        register = self.register(text)
        if register is not None:
            return register
        if re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}){1,2}", text):
            return Immediate(int(text[2:], 16), True)
        if re.fullmatch(r"[-+]?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        return Symbol(text)

    def address(self, text: str) -> Address:
        base, *box = _split(text)
        coordinates = tuple(self.operand(x) for x in _split(box[0].strip()[1:-1])) if box else ()
        base, offset = re.fullmatch(r"\s*(.+?)\s*(?:\+\s*(-?\d+)\s*)?", base).groups()
        return Address(self.operand(base), int(offset or 0), coordinates)


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]] if text.strip() else []


def _basic_blocks(statements: list[str | Instruction]) -> list[Block]:
    blocks = [Block()]
    targets = {i.operands[0].name for i in statements if not isinstance(i, str) and i.opcode[0] == "bra"}
    for statement in statements:
        if not isinstance(statement, str):
            blocks[-1].instructions.append(statement)
            if statement.opcode[0] in ("bra", "ret"):
                blocks.append(Block())
        elif statement in targets:
            if blocks[-1].instructions or blocks[-1].label:
                blocks.append(Block())
            blocks[-1].label = statement
    labels = {block.label: i for i, block in enumerate(blocks)}
    for i, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        following = i + 1 if i + 1 < len(blocks) else -1
        if last is None or last.opcode[0] not in ("bra", "ret"):
            block.successors = [following]
        else:
            target = labels[last.operands[0].name] if last.opcode[0] == "bra" else -1
            block.successors = [target] if last.guard is None else [target, following]
    _find_meetings(blocks)
    return blocks


def _find_meetings(blocks: list[Block]) -> None:
    """Immediate post-dominators. Sets of blocks are bits of an integer; the last bit is the end of the kernel."""
    count = len(blocks)
    end, everything = 1 << count, (1 << (count + 1)) - 1
    after = [everything] * count + [end]  # what every path from a block to the end goes through
    changed = True
    while changed:
        changed = False
        for i in reversed(range(count)):
            common = everything
            for successor in blocks[i].successors:
                common &= after[successor]
            changed, after[i] = changed or common | 1 << i != after[i], common | 1 << i
    for i, block in enumerate(blocks):
        later = [j for j in range(count + 1) if after[i] >> j & 1 and j != i]
        nearest = max(later, key=lambda j: after[j].bit_count(), default=count)  # all the others come after it
        block.meeting = -1 if nearest == count else nearest
