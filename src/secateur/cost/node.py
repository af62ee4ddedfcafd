"""What operations and memory accesses cost in energy, by technology node."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from secateur.cost.shipped import read, shipped
from secateur.errors import SecateurError
from secateur.problems import Problems, Section

_ACCESS_BITS = 64
_ACCUMULATOR_BITS = 32
_PICO = 1e-12

Table = dict[int, Annotated[float, Field(gt=0)]]


class Arithmetic(Section):
    """Picojoules of one operation, by the bits of its operands."""

    add: Table = Field(min_length=1, description="map from bits to picojoules of an addition")
    multiply: Table = Field(
        min_length=1, description="map from bits to picojoules of a multiplication"
    )


class Memory(Section):
    """Picojoules of one access of 64 bits."""

    sram: Table = Field(min_length=1, description="map from bytes of a memory to picojoules")
    dram: float = Field(gt=0, description="picojoules of an access outside the chip")


class _Head(Section):
    name: str = Field(min_length=1, description="short name")
    summary: str = Field(min_length=1, description="one line on the technology")
    source: str = Field(
        min_length=1, description="where the numbers are from, and which are assumed"
    )
    picojoules: dict[str, Any] = Field(description="map with integer, floating and memory")


class Node(Section):
    """A technology node.

    Attributes:
        name: short name.
        summary: one line on the technology.
        source: where the numbers are from, and which of them are assumed.
        integer: operations on integers.
        floating: operations on floating-point numbers.
        memory: accesses.
    """

    name: str
    summary: str
    source: str
    integer: Arithmetic
    floating: Arithmetic
    memory: Memory

    def mac_joules(self, weight_bits: int, activation_bits: int) -> float:
        """Return the energy of one multiply-accumulate.

        Operands are floating-point numbers if the wider of the two has a width of the table of
        such (16 and 32 bits): the narrower one is converted first. All others are integers with
        an accumulator of 32 bits.

        Between the widths of the table, picojoules per bit of an addition, and per squared bit of
        a multiplication, are interpolated linearly; beyond them they stay what they are. A b x c
        multiplication is one of sqrt(b c) bits.
        """
        wider = max(weight_bits, activation_bits)
        if wider in self.floating.multiply and wider in self.floating.add:
            return _PICO * (self.floating.multiply[wider] + self.floating.add[wider])
        product = weight_bits * activation_bits
        multiply = product * _per_bit(self.integer.multiply, 2, product**0.5)
        add = _ACCUMULATOR_BITS * _per_bit(self.integer.add, 1, _ACCUMULATOR_BITS)
        return _PICO * (multiply + add)

    def home(self, size: float) -> int | None:
        """Return the bytes of the smallest SRAM that holds so many; None for DRAM."""
        return min((each for each in self.memory.sram if each >= size), default=None)

    def bit_joules(self, home: int | None) -> float:
        """Return the energy of moving one bit out of, or into, a memory of :meth:`home`."""
        access = self.memory.dram if home is None else self.memory.sram[home]
        return _PICO * access / _ACCESS_BITS


def node_names() -> list[str]:
    """Return the names of the nodes that come with the package."""
    return shipped("nodes")


def load_node(choice: str | Path) -> Node:
    """Return a technology node.

    Args:
        choice: one of :func:`node_names`, or the path of a YAML file of the same form.

    Raises:
        SecateurError: unknown, unreadable, or a key is unknown, missing or out of range.
    """
    source, content = read(choice, "nodes")
    problems = Problems(source, error=SecateurError)
    head = problems.validate(_Head, content, "")
    problems.raise_if_any()
    assert head is not None
    tables: dict[str, type[Section]] = {
        "integer": Arithmetic,
        "floating": Arithmetic,
        "memory": Memory,
    }
    for key in head.picojoules.keys() - tables:
        problems.unknown("picojoules", key, tables)
    parts = {
        key: problems.validate(model, head.picojoules.get(key), f"picojoules.{key}")
        for key, model in tables.items()
    }
    problems.raise_if_any()
    return Node.model_validate({**head.model_dump(exclude={"picojoules"}), **parts})


def _per_bit(table: dict[int, float], power: int, bits: float) -> float:
    """Interpolate energy / bits^power between the widths of a table."""
    points = [(width, table[width] / float(width) ** power) for width in sorted(table)]
    if bits <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if bits <= right:
            return low + (high - low) * (bits - left) / (right - left)
    return points[-1][1]
