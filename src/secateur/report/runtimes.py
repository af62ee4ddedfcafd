"""What each runtime makes of the ONNX file, as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.report import numbers

HEAD = ("runtime", "test accuracy", "points", "differ by", "same class")
TITLE = "model.onnx by runtime; outputs differ by a share of the largest"


def rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for each runtime that ran the file, as text; none if it was not exported."""
    dense = report["accuracy"]["dense"]
    return [
        (
            f"{name} {found['version']}",
            numbers.percent(found["accuracy"]),
            numbers.points(found["accuracy"] - dense),
            numbers.scientific(found["difference"]),
            numbers.percent(found["agreement"]),
        )
        for name, found in report["parity"].get("runtimes", {}).items()
    ]
