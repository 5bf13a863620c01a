"""The machine code of CUDA kernels as nvdisasm prints it: instructions, what follows each, loops."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,]+),")
LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*)")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass
class Instruction:
    opcode: str  # with its suffixes, such as LDG.E.128
    operands: str
    conditional: bool

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


@dataclass
class Kernel:
    name: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the instruction after each label

    def successors(self, i: int) -> list[int]:
        """The instructions that may come after instruction i. A call of a function returns."""
        this = self.code[i]
        if this.name == "BRX":
            return [self.labels[name] for name in re.findall(r"\.L_x_\d+", this.operands)]
        if this.name == "BSYNC":
            return [self.reconvergence[i]]
        target = TARGET.search(this.operands)
        if this.name in ("EXIT", "RET"):
            jumps, condition = [], this.conditional
        elif this.name in ("BRA", "CALL") and target:  # for sm_80 a CALL of a label is a jump
            jumps, condition = [self.labels[target[1]]], this.conditional or target.start() > 0
        else:
            jumps, condition = [], True
        return jumps + [i + 1] * (condition and i + 1 < len(self.code))

    @cached_property
    def reconvergence(self) -> dict[int, int]:
        """Where the threads that meet at each BSYNC go on: the label of the BSSY before it."""
        found, last = {}, {}
        for i, this in enumerate(self.code):
            if this.name == "BSSY":
                last[this.operands.split(",")[0]] = self.labels[TARGET.search(this.operands)[1]]
            elif this.name == "BSYNC":
                found[i] = last[this.operands.split()[0]]
        return found

    @cached_property
    def blocks(self) -> list[range]:
        """Straight lines of instructions: control enters only at the first, and leaves at the last."""
        starts = {0, *self.labels.values()}
        for i, this in enumerate(self.code):
            if this.name in ("BRA", "BRX", "BSYNC", "CALL", "EXIT", "RET"):
                starts.add(i + 1)
        ordered = sorted(start for start in starts if start < len(self.code))
        return [range(a, b) for a, b in zip(ordered, [*ordered[1:], len(self.code)], strict=True)]

    @cached_property
    def loops(self) -> list[frozenset[int]]:
        """The instructions of each natural loop, loops of one header together; the largest first."""
        number = {block.start: n for n, block in enumerate(self.blocks)}
        after = [[number[i] for i in self.successors(block[-1])] for block in self.blocks]
        before: list[list[int]] = [[] for _ in after]
        for n, targets in enumerate(after):
            for target in targets:
                before[target].append(n)
        order = postorder(after)
        dominator = dominators(order, before)
        place = {n: i for i, n in enumerate(order)}
        bodies: dict[int, set[int]] = {}
        for n in order:
            for header in after[n]:
                if place[header] < place[n]:
                    continue  # goes forward
                # Every way to a loop leads through its header, or this would not know all loops.
                assert dominates(header, n, dominator), f"{self.name} has a loop with two entries"
                body = bodies.setdefault(header, {header})
                todo = [n]
                while todo:
                    m = todo.pop()
                    if m not in body:
                        body.add(m)
                        todo += [b for b in before[m] if b in place]
        found = [frozenset(i for n in body for i in self.blocks[n]) for body in bodies.values()]
        return sorted(found, key=len, reverse=True)

    def find(self, *names: str, within: Iterable[int] | None = None) -> list[int]:
        """The instructions of these names, in order."""
        where = range(len(self.code)) if within is None else sorted(within)
        return [i for i in where if self.code[i].name in names]

    def distance(self, start: int, ends: set[int], within: frozenset[int]) -> int | None:
        """The fewest instructions that are executed after `start`, up to and with one of `ends`."""
        seen, line, steps = {start}, [start], 0
        while line:
            steps += 1
            line = list(dict.fromkeys(n for i in line for n in self.successors(i) if n in within))
            if ends.intersection(line):
                return steps
            line = [n for n in line if n not in seen]
            seen.update(line)
        return None


def kernels(listing: str) -> Iterator[Kernel]:
    """The kernels of what `nvdisasm -c` printed."""
    kernel = None
    for line in listing.splitlines():
        if match := INSTRUCTION.match(line):
            assert kernel is not None
            condition, opcode, operands = match.groups()
            kernel.code.append(Instruction(opcode, operands, condition is not None))
        elif match := LABEL.match(line):
            assert kernel is not None
            kernel.labels[match[1]] = len(kernel.code)
        elif match := SECTION.match(line):
            if kernel is not None:
                yield kernel
            kernel = Kernel(match[1])
    if kernel is not None:
        yield kernel


def postorder(after: list[list[int]]) -> list[int]:
    """The blocks that can be reached from the first, each after those that follow it."""
    order, seen = [], {0}
    line = [(0, iter(after[0]))]
    while line:
        n, rest = line[-1]
        for m in rest:
            if m not in seen:
                seen.add(m)
                line.append((m, iter(after[m])))
                break
        else:
            order.append(n)
            line.pop()
    return order


def dominators(order: list[int], before: list[list[int]]) -> dict[int, int]:
    """The immediate dominator of each block (Cooper, Harvey and Kennedy 2001)."""
    place = {n: i for i, n in enumerate(order)}
    found = {order[-1]: order[-1]}
    changed = True
    while changed:
        changed = False
        for n in reversed(order[:-1]):
            best = None
            for m in before[n]:
                if m not in found:
                    continue
                if best is None:
                    best = m
                while best != m:
                    while place[best] < place[m]:
                        best = found[best]
                    while place[m] < place[best]:
                        m = found[m]
            if found.get(n) != best:
                assert best is not None
                found[n] = best
                changed = True
    return found


def dominates(a: int, b: int, dominator: dict[int, int]) -> bool:
    while b != a and dominator[b] != b:
        b = dominator[b]
    return a == b
