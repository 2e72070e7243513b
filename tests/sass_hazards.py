"""Writes to registers that a product of a warpgroup may still read, found in a kernel's SASS.

A product (HGMMA, IGMMA) runs in the background until WARPGROUP.DEPBAR has waited for its group, and reads its left
factor and its positions whenever it comes to them. The compiler keeps other values out of these registers, except where
it takes a copy and its source for one register: then the next load overwrites what is still to be multiplied.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import NamedTuple

PRODUCTS = ("HGMMA", "IGMMA", "QGMMA")
LEFT_REGISTERS = 4
# What has registers first but writes none of them.
NO_RESULT = ("ST", "RED", "LDGSTS", "WARPGROUP", "BAR", "SYNCS", "BRA", "U")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T0-9]+ )?\s*([A-Z0-9_.]+)\s*(.*?);")


class Instruction(NamedTuple):
    """One line of SASS: address, name, operands."""

    at: int
    name: str
    operands: list[str]


def parse(body: str) -> list[Instruction]:
    """The instructions of a kernel as cuobjdump or nvdisasm print them."""
    found = INSTRUCTION.findall(body)
    return [Instruction(int(at, 16), name, [o.strip() for o in rest.split(",")]) for at, name, rest in found]


def register(operand: str) -> int | None:
    """The number of a register operand."""
    found = re.fullmatch(r"-?R(\d+)(?:\.\w+)*", operand)
    return int(found[1]) if found else None


def read_in_background(product: Instruction) -> set[int]:
    """Registers of the left factor, unless it lies in shared memory, and of the positions of a sparse one."""
    left = register(product.operands[1])
    found = set() if left is None else set(range(left, left + LEFT_REGISTERS))
    if ".SP" in product.name:
        positions = [number for o in product.operands[3:] if (number := register(o)) is not None]
        found.add(positions[1])  # after the sums that are added to
    return found


def written(instruction: Instruction) -> set[int]:
    """Registers that an instruction other than a product writes."""
    if instruction.name.startswith(NO_RESULT):
        return set()
    results = [o for o in instruction.operands[:2] if not re.fullmatch(r"!?U?P[T0-9]+", o)]
    first = register(results[0]) if results else None
    if first is None:
        return set()
    wide = ".WIDE" in instruction.name or instruction.name == "CS2R" or ".64" in instruction.name
    width = 4 if re.search(r"\.128|LDSM.*\.4", instruction.name) else 2 if wide else 1
    return set(range(first, first + width))


def loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Bodies of loops with products, as they stand."""
    found = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", instruction.operands[-1]) if instruction.name == "BRA" else None
        if target and int(target[1], 16) < instruction.at:
            body = [i for i in instructions[: end + 1] if i.at >= int(target[1], 16)]
            if any(i.name.startswith(PRODUCTS) for i in body):
                found.append(body)
    return found


def hazards(body: str) -> list[str]:
    """A line for each write within two rounds of a loop to what a product under way reads."""
    found = []
    for loop in loops(parse(body)):
        groups: list[list[Instruction]] = []  # committed, oldest first
        open_group: list[Instruction] = []
        for instruction in loop * 2:
            if instruction.name.startswith(PRODUCTS):
                open_group.append(instruction)
                if "gsb0" in instruction.operands:
                    groups.append(open_group)
                    open_group = []
            elif instruction.name.startswith("WARPGROUP.DEPBAR"):
                pending = int(instruction.operands[1], 16)
                groups = groups[max(len(groups) - pending, 0) :]
            elif results := written(instruction):
                found += [
                    f"{instruction} writes what {product} reads"
                    for product in chain(*groups, open_group)
                    if results & read_in_background(product)
                ]
    return found
