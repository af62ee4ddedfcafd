"""The content of ``report.json``, version 1; docs/report.md says what each key means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.errors import SecateurError

SCHEMA = 1

Count = int
"""A number of things: weights, bits, bytes, operations, samples."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ValidationAccuracy(_Part):
    dense: float
    compressed: float


class Accuracy(_Part):
    dense: float
    compressed: float
    decoded: float
    onnx: float | None
    validation: ValidationAccuracy


class Ratio(_Part):
    weights: float
    bits: float
    file: float
    macs: float
    bops: float


class WeightCounts(_Part):
    dense: Count
    kept: Count


class LayerBits(_Part):
    values: Count
    index: Count
    metadata: Count


class Bits(LayerBits):
    dense: Count


class EncodedBits(LayerBits):
    total: Count
    layers_refused: Count


class Bound(_Part):
    support: float
    values: float
    total: float


class FileBytes(_Part):
    dense: Count
    packed: Count
    onnx: Count | None = None


class Storage(_Part):
    weights: WeightCounts
    bits: Bits
    file: FileBytes
    encodings: dict[str, EncodedBits]
    bound: Bound


class Operations(_Part):
    macs: float
    bops: float


class CompressedOperations(Operations):
    effective_macs: float


class Cost(_Part):
    dense: Operations
    compressed: CompressedOperations


class Joules(_Part):
    compute: float
    weights: float
    activations: float
    joules: float


class Energy(_Part):
    node: str
    dense: Joules
    compressed: Joules
    zeros_skipped: Joules
    caveat: str


class Seconds(_Part):
    dense: float | None
    without_zeros: float
    compressed: float


class Speedup(_Part):
    whole: float | None
    size: float | None
    zeros: float | None


class Platform(_Part):
    platform: str
    seconds: Seconds
    speedup: Speedup
    waits_for: Literal["compute", "memory"]
    sparsity: float
    break_even: float | None
    narrowed_to: Count | None
    text: str


class Agreement(_Part):
    decoded: float | None
    onnx: float | None


class Runtime(_Part):
    version: str
    accuracy: float
    difference: float
    agreement: float | None


class Saturation(_Part):
    error: float
    noise: float


class Parity(_Part):
    samples: Count
    decoded: float
    onnx: float | None
    agreement: Agreement
    runtimes: dict[str, Runtime] = Field(default_factory=dict)
    saturation: Saturation | None = None


class Layer(_Part):
    name: str
    kind: str
    shape: list[int]
    compressed_shape: list[int]
    parameters: Count
    weights: Count
    kept: Count
    density: float
    bits: float
    activation_bits: float = 32.0
    macs: float
    compressed_macs: float
    effective_macs: float
    set: str
    storage: LayerBits | None
    note: str


class Epoch(_Part):
    """One row of the history; a method may add figures of its own."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)

    stage: int | None
    method: str
    phase: str
    step: int = 0
    epoch: int
    loss: float
    accuracy: float
    seconds: float
    lr: float
    projected_accuracy: float | None = None
    primal: float | None = None
    dual: float | None = None
    rho: float | None = None


class Environment(_Part):
    python: str
    torch: str
    platform: str
    cpu: str
    threads: int
    device: str


class Report(_Part):
    version: Literal[1] = Field(alias="schema")
    secateur: str
    created: str
    name: str
    recipe: dict[str, Any]
    environment: Environment
    accuracy: Accuracy
    ratio: Ratio
    storage: Storage
    cost: Cost
    energy: Energy
    platforms: list[Platform]
    parity: Parity
    layers: list[Layer]
    notes: list[str]
    allocations: list[dict[str, Any]]
    history: list[Epoch]
    seconds: float


def validate(report: Mapping[str, Any]) -> None:
    """Check that a report has every key of the schema, no other, and the right types.

    Raises:
        SecateurError: it does not; the message names the first field that is wrong.
    """
    try:
        Report.model_validate(report)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise SecateurError(
            f"report: {place}: {first['msg']}.\n"
            f"Write the report again with this version of secateur (schema {SCHEMA})."
        ) from error
