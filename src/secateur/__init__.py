"""secateur: joint pruning and quantization of PyTorch networks.

    import secateur as sc

    result = sc.compress(task, recipe, out="runs/lenet5")
    comparison = sc.compare(task, [recipe, other_recipe], out="runs/compare")
    cost = sc.inspect(model, example_input, bits=(8, 8))
    joules = sc.energy(model, example_input, bits=(8, 8)).joules
    model = sc.load("runs/lenet5/model.secateur")

Names are imported on first use, so that ``import secateur`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from secateur._version import __version__

if TYPE_CHECKING:
    from secateur import channels, methods, sets
    from secateur.artifact.onnx import export_onnx
    from secateur.artifact.packed import load
    from secateur.artifact.saturation import saturation
    from secateur.comparison.compare import Comparison, compare
    from secateur.compression import Result, compress
    from secateur.cost import inspect
    from secateur.cost.energy import energy
    from secateur.errors import SecateurError
    from secateur.plan import Plan, build_plan
    from secateur.posttraining import quantize, reconstruct
    from secateur.recipe import Recipe, load_recipe
    from secateur.task import Task

__all__ = [
    "Comparison",
    "Plan",
    "Recipe",
    "Result",
    "SecateurError",
    "Task",
    "__version__",
    "build_plan",
    "channels",
    "compare",
    "compress",
    "energy",
    "export_onnx",
    "inspect",
    "load",
    "load_recipe",
    "methods",
    "quantize",
    "reconstruct",
    "saturation",
    "sets",
]

_HOMES = {
    "Comparison": "secateur.comparison.compare",
    "Plan": "secateur.plan",
    "Recipe": "secateur.recipe",
    "Result": "secateur.compression",
    "SecateurError": "secateur.errors",
    "Task": "secateur.task",
    "build_plan": "secateur.plan",
    "compare": "secateur.comparison.compare",
    "compress": "secateur.compression",
    "energy": "secateur.cost.energy",
    "export_onnx": "secateur.artifact.onnx",
    "inspect": "secateur.cost",
    "load": "secateur.artifact.packed",
    "load_recipe": "secateur.recipe",
    "quantize": "secateur.posttraining",
    "reconstruct": "secateur.posttraining",
    "saturation": "secateur.artifact.saturation",
}


def __getattr__(name: str) -> Any:
    if name in ("channels", "methods", "sets"):
        return importlib.import_module(f"secateur.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'secateur' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
