"""How many tensor-core FLOPs a kernel does for each instruction that a warp issues, from its SASS.

The number bounds what a kernel can reach: a scheduler of an SM issues one instruction a clock, and
its share of the tensor cores does 512 FLOPs of 16-bit products in that clock on sm_80, 1,024 on
sm_90 and 2,048 on sm_100. Instructions are those of the innermost loops with products in them, all
such loops of the kernel together, each instruction once; or of the whole kernel where products
stand in none. Products that several warps do alike count for each of them.

A loop is a natural one (Aho, Lam, Sethi, Ullman, "Compilers", 2nd edition, section 9.6.6), so that
the waits for barriers which compilers put behind the last exit belong to the loop that they return
to.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
# Products of a warp, 16 x 8 x K; of the four warps of a group, which all issue them; and of a whole
# block, which one thread issues for all warps, with the shape in the bits of a descriptor: those of
# the "instruction descriptor" in the PTX manual's chapter on tcgen05.
_WARP = re.compile(r"\b[HIQ]MMA\.(?:SP\.)?168(\d+)")
_GROUP = re.compile(r"\b[HIQ]GMMA\.(\d+)x(\d+)x(\d+)")
_BLOCK = re.compile(r"\bUTC([HQ])MMA\b.*\bidesc\[(UR\d+)\]")
_TF32 = 2
_OTHER = re.compile(r"^(?:@!?U?P\w+ )?\w*MMA\b")
_JUMP = re.compile(r"^(@!?U?P\w+ )?(BRA|CALL|EXIT|RET|BRX|JMP)\b(.*)")
_CONSTANT = re.compile(r"^UMOV (UR\d+), (0x[0-9a-f]+)$")


@dataclass(frozen=True)
class _Block:
    """Instructions without a jump in between: how many, their FLOPs, and the blocks behind."""

    instructions: int
    flops: float
    successors: tuple[int, ...]


def flops_per_instruction(code: str, warps: int = 4) -> float | None:
    """Of a kernel of so many warps, from what ``cuobjdump -sass`` says of it; None where it holds
    products of a shape that cannot be told from it."""
    try:
        blocks = _blocks([(int(at, 16), text) for at, text in _INSTRUCTION.findall(code)], warps)
    except LookupError:
        return None
    before = _predecessors(blocks)
    hot = _innermost(loop for loop in _loops(before) if any(blocks[b].flops for b in loop))
    chosen = [blocks[b] for b in (frozenset().union(*hot) if hot else before)]
    flops = sum(block.flops for block in chosen)
    return flops / sum(block.instructions for block in chosen) if flops else 0.0


def _blocks(instructions: list[tuple[int, str]], warps: int) -> list[_Block]:
    """The kernel's, in order.

    Raises:
        LookupError: products of an unknown shape.
    """
    places = {address: index for index, (address, _) in enumerate(instructions)}
    starts, targets = {0}, dict[int, int]()
    for index, (_, text) in enumerate(instructions):
        if jump := _JUMP.match(text):
            starts.add(index + 1)
            if to := re.search(r"\b0x[0-9a-f]+$", jump[3]):
                targets[index] = places[int(to[0], 16)]
                starts.add(targets[index])
    begins = sorted(start for start in starts if start < len(instructions))
    numbers = {begin: number for number, begin in enumerate(begins)}
    flops = _flops(instructions, warps)
    found = []
    for begin, end in pairwise([*begins, len(instructions)]):
        after = [targets[end - 1]] if end - 1 in targets else []
        jump = _JUMP.match(instructions[end - 1][1])
        # A jump may be none by a predicate before it or, of a whole warp, among its operands.
        goes_on = jump is None or jump[2] == "CALL" or re.search(r"\b(?:U?P\d|DIV)", jump[0])
        if goes_on and end < len(instructions):
            after.append(end)
        found.append(_Block(end - begin, sum(flops[begin:end]), tuple(numbers[i] for i in after)))
    return found


def _flops(instructions: list[tuple[int, str]], warps: int) -> list[float]:
    """Of each instruction, the share of a warp.

    Raises:
        LookupError: products of an unknown shape, or whose descriptor is no constant.
    """
    found, constants = [], dict[str, int]()
    for _, text in instructions:
        if constant := _CONSTANT.match(text):
            constants[constant[1]] = int(constant[2], 16)
        if shape := _WARP.search(text):
            found.append(2.0 * 16 * 8 * int(shape[1]))
        elif shape := _GROUP.search(text):
            found.append(2.0 * int(shape[1]) * int(shape[2]) * int(shape[3]) / 4)
        elif shape := _BLOCK.search(text):
            bits = constants[shape[2]]
            rows, columns = (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8
            depth = 32 if shape[1] == "Q" else 8 if bits >> 7 & 7 == _TF32 else 16
            found.append(2.0 * rows * columns * depth / warps)
        elif _OTHER.match(text):
            raise LookupError(text)
        else:
            found.append(0.0)
    return found


def _predecessors(blocks: list[_Block]) -> dict[int, list[int]]:
    """Of each block that the first leads to, those that lead to it."""
    before: dict[int, list[int]] = {0: []} if blocks else {}
    waiting = list(before)
    while waiting:
        block = waiting.pop()
        for successor in blocks[block].successors:
            if successor not in before:
                before[successor] = []
                waiting.append(successor)
            before[successor].append(block)
    return before


def _loops(before: dict[int, list[int]]) -> list[frozenset[int]]:
    """The blocks of each natural loop; those with one header are one loop."""
    # Bit by bit, the blocks that every way to a block goes through.
    every = (1 << max(before, default=0) + 1) - 1
    dominators = dict.fromkeys(before, every) | {0: 1}
    changed = True
    while changed:
        changed = False
        for block in sorted(before.keys() - {0}):
            common = every
            for other in before[block]:
                common &= dominators[other]
            changed |= dominators[block] != common | 1 << block
            dominators[block] = common | 1 << block
    loops: dict[int, set[int]] = {}
    for header in before:
        for last in before[header]:
            if not dominators[last] >> header & 1:
                continue
            loop = loops.setdefault(header, {header})
            waiting = [last]
            while waiting:
                block = waiting.pop()
                if block not in loop:
                    loop.add(block)
                    waiting += before[block]
    return [frozenset(loop) for loop in loops.values()]


def _innermost(loops: Iterable[frozenset[int]]) -> list[frozenset[int]]:
    """Those that hold no other."""
    loops = list(loops)
    return [loop for loop in loops if not any(other < loop for other in loops)]
