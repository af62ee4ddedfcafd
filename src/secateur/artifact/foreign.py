"""Operators of other domains than ONNX's own, for the exporter to write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def operator(domain: str, name: str, inputs: Sequence[str], attributes: Sequence[str]) -> Any:
    """Return an operator that a translation can call.

    Args:
        domain: of the operator, version 1.
        name: of the operator.
        inputs: names of its inputs; the first has the type of the one output.
        attributes: names of its attributes, all integers; one called ``rounding_mode`` is text.
    """
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    kinds = [f"T{at}" for at in range(len(inputs))]
    every = ["tensor(float)", "tensor(uint8)", "tensor(int8)", "tensor(int64)"]
    kind = OpSchema.AttrType
    schema = OpSchema(
        name,
        domain,
        1,
        inputs=[OpSchema.FormalParameter(*pair) for pair in zip(inputs, kinds, strict=True)],
        outputs=[OpSchema.FormalParameter("Y", kinds[0])],
        type_constraints=[(each, every, "") for each in kinds],
        attributes=[
            OpSchema.Attribute(each, kind.STRING if each == "rounding_mode" else kind.INT, "")
            for each in attributes
        ],
    )
    return Op(Opset(domain, 1), name, schema)
