"""What a program compiled for a TPU costs, read from its text: the compiler's own estimates.

The compiler writes its `estimated_cycles` beside each fusion and copy. A program's cycles are the
sum over its entry, the bodies of loops as often as they turn; what is called from a fusion is in
the fusion's own number. Kernels of our own (Pallas) and collectives have none: they are listed for
whoever has a model of them.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"s32\[\][^=]* constant\((\d+)\)")
_CALLED = re.compile(r"(?:to_apply|calls|called_computations=\{)=?%?([\w.\-]+)")
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= .*? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_BYTES = {"pred": 1, "bf16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A call of a Pallas kernel.

    Attributes:
      name: the kernel's.
      shape: of its largest operand; of splash `[(b,) heads, n, d]`.
      turns: how often it is called.
    """

    name: str
    shape: tuple[int, ...]
    turns: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What a program's text tells.

    Attributes:
      cycles: of all fusions and copies.
      kernels: calls that are not in them.
      collectives: bytes that a device hands to each kind, by kind.
    """

    cycles: int
    kernels: tuple[Kernel, ...]
    collectives: dict[str, int]


def read_program(text: str) -> Reading:
    """Reads the text of a compiled program (`compiled.as_text()`).

    Raises:
      ValueError: there is no entry, or a loop whose turns are not told.
    """
    computations, entry = _split(text)
    if entry is None:
        raise ValueError("the program's text has no entry")
    kernels: list[Kernel] = []
    collectives: dict[str, int] = {}

    def walk(name: str, turns: int) -> int:
        total = 0
        for line in computations.get(name, ()):
            found = _CYCLES.search(line)
            if " while(" in line:
                body = _BODY.search(line)
                assert body is not None
                total += walk(body[1], turns * _turns(line, computations))
            elif found:
                total += turns * int(found[1])
            elif 'custom_call_target="tpu_custom_call"' in line:
                kernels.append(_kernel(line, turns))
            elif match := _COLLECTIVE.search(line):
                size = turns * _bytes(line[: match.start(1)])
                collectives[match[1]] = collectives.get(match[1], 0) + size
            elif " call(" in line or " conditional(" in line:
                called = _CALLED.search(line)
                total += walk(called[1], turns) if called else 0
        return total

    return Reading(cycles=walk(entry, 1), kernels=tuple(kernels), collectives=collectives)


def _split(text: str) -> tuple[dict[str, list[str]], str | None]:
    """The instructions of each computation, by name; and the entry's name.

    A kernel's attributes have newlines of their own: what does not begin an instruction goes on
    with the line before it.
    """
    computations: dict[str, list[str]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            match = _NAME.match(line)
            if match:
                current = computations.setdefault(match[1], [])
                entry = match[1] if line.startswith("ENTRY") else entry
        elif line == "}":
            current = None
        elif line.lstrip().startswith(("%", "ROOT %")):
            current.append(line)
        elif current:
            current[-1] += line
    return computations, entry


def _turns(line: str, computations: dict[str, list[str]]) -> int:
    known = _TURNS.search(line)
    if known:
        return int(known[1])
    condition = _CONDITION.search(line)
    lines: Sequence[str] = computations.get(condition[1], ()) if condition else ()
    constants = [int(match[1]) for each in lines if (match := _CONSTANT.search(each))]
    if len(constants) != 1:
        raise ValueError(f"a loop does not tell how often it turns: {line.strip()[:80]}")
    return constants[0]


def _kernel(line: str, turns: int) -> Kernel:
    name = re.search(r'op_name="[^"]*?([\w]+)/pallas_call', line)
    operands = (
        line[line.index("operand_layout_constraints") :] if "operand_layout" in line else line
    )
    shapes = [tuple(int(n) for n in m[2].split(",") if n) for m in _SHAPE.finditer(operands)]
    shape = max(shapes, key=math.prod, default=())
    return Kernel(name=name[1] if name else "kernel", shape=shape, turns=turns)


def _bytes(text: str) -> int:
    total = 0
    for kind, sizes in _SHAPE.findall(text):
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += count * _BYTES.get(kind, int(re.sub(r"\D", "", kind) or 8) // 8)
    return total
