"""A platform: the few numbers that decide how long a layer takes on a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from secateur.cost.shipped import read
from secateur.errors import SecateurError
from secateur.problems import Problems, Section

SkipKind = Literal["structured", "2:4", "unstructured"]


class Compute(Section):
    """How fast it multiplies; exactly one of the two is given."""

    macs_per_second: dict[int, float] | None = Field(
        None, description="map from the bits of the operands to multiply-accumulates per second"
    )
    bops_per_second: float | None = Field(
        None, gt=0, description="MACs x weight bits x activation bits per second"
    )

    @field_validator("macs_per_second")
    @classmethod
    def _check(cls, rates: dict[int, float] | None) -> dict[int, float] | None:
        ordered = [] if rates is None else [rates[width] for width in sorted(rates)]
        if rates is not None and not ordered:
            raise ValueError("should have at least one width")
        if rates and not (min(rates) >= 1 and min(ordered) > 0):
            raise ValueError("should map widths of at least 1 bit to rates above 0")
        if ordered != sorted(ordered, reverse=True):
            raise ValueError("should not be faster for wider operands")
        return rates


class Memory(Section):
    """What feeds the multipliers."""

    bytes_per_second: float = Field(gt=0, description="bandwidth of the memory outside the chip")
    on_chip_bytes: float = Field(
        0, ge=0, description="memory on the chip in which weights stay between inferences"
    )
    activations: Literal["on_chip", "off_chip"] = Field(
        "off_chip", description="where activations are between layers"
    )
    widths: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        min_length=1,
        strict=False,
        description="bits in which a number can be stored; any if not given",
    )


class Skip(Section):
    """How well zeros of one kind are skipped."""

    efficiency: float = Field(
        1.0,
        gt=0,
        le=1,
        description="useful share of the multipliers' time; index decoding takes the rest",
    )
    from_sparsity: float = Field(
        0.0, ge=0, lt=1, description="share of zeros from which a layer runs as a sparse one"
    )


class _Head(Section):
    name: str = Field(min_length=1, description="short name")
    summary: str = Field(min_length=1, description="one line on what machine this is")
    source: str = Field(
        min_length=1, description="where the numbers are from, and which are assumed"
    )
    compute: Any = Field(description="map with macs_per_second or bops_per_second")
    memory: Any = Field(description="map with bytes_per_second")
    skips: Any = Field({}, description="map from a kind of zeros to how well they are skipped")


class Platform(_Head):
    """A machine, in the terms of the roofline model.

    Attributes:
        name: short name.
        summary: one line on what machine this is.
        source: where the numbers are from, and which of them are assumed.
        compute: how fast it multiplies.
        memory: what feeds the multipliers.
        skips: which zeros it skips, and how well; zeros of any other kind are multiplied.
    """

    compute: Compute
    memory: Memory
    skips: dict[SkipKind, Skip]

    @property
    def widest(self) -> int | None:
        """Bits of the widest operand that it multiplies and stores; None if any will do."""
        limits = (self.compute.macs_per_second, self.memory.widths)
        return min((max(each) for each in limits if each), default=None)


def load_platform(choice: str | Path) -> Platform:
    """Return a platform.

    Args:
        choice: one of :func:`platform_names`, or the path of a YAML file of the same form
            (docs/platforms.md).

    Raises:
        SecateurError: unknown, unreadable, or a key is unknown, missing or out of range.
    """
    source, content = read(choice, "platforms")
    problems = Problems(source, error=SecateurError)
    head = problems.validate(_Head, content, "")
    compute = _compute(content.get("compute"), problems) if "compute" in content else None
    memory = problems.validate(Memory, content.get("memory"), "memory") if head else None
    skips = _skips(content.get("skips", {}), problems)
    problems.raise_if_any()
    assert head is not None
    parts = {"compute": compute, "memory": memory, "skips": skips}
    return Platform.model_validate({**head.model_dump(), **parts})


def _compute(raw: Any, problems: Problems) -> Compute | None:
    compute = problems.validate(Compute, raw, "compute")
    if compute and (compute.macs_per_second is None) == (compute.bops_per_second is None):
        problems.add("compute", "give either macs_per_second or bops_per_second.")
    return compute


def _skips(raw: Any, problems: Problems) -> dict[str, Skip | None]:
    known = get_args(SkipKind)
    if not isinstance(raw, dict):
        problems.not_a_map("skips", raw, known)
        return {}
    for kind in raw.keys() - set(known):
        problems.unknown("skips", kind, known)
    return {
        kind: problems.validate(Skip, {} if raw[kind] is None else raw[kind], f"skips.{kind}")
        for kind in known
        if kind in raw
    }
