"""What this machine has: versions, cores, instruction sets, accelerators, optional packages."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from secateur._version import __version__
from secateur.kernels import native

REQUIRED = (
    "torch",
    "accelerate",
    "numpy",
    "psutil",
    "pydantic",
    "pyyaml",
    "rich",
    "safetensors",
    "typer",
)
OPTIONAL = {
    "onnx": 'pip install "secateur[onnx]"',
    "onnxscript": 'pip install "secateur[onnx]"',
    "onnxruntime": 'pip install "secateur[onnx]"',
    "scikit-learn": 'pip install "secateur[data]"',
    "torchvision": 'pip install "secateur[vision]"',
    "ray": 'pip install "secateur[compare]"',
    "scipy": 'pip install "secateur[measure]"',
    "openvino": 'pip install "secateur[openvino]"',
    "compressed-tensors": 'pip install "secateur[compressed-tensors]"',
    "zeus": 'pip install "secateur[energy]"',
}
"""Packages that a feature may need, with the command that brings each."""

INSTRUCTIONS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni"),
    *("avx512_bf16", "amx_int8", "amx_bf16"),  # x86
    *("neon", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),  # ARM
)
"""Instruction sets that decide how fast pruned and quantized layers run."""


Profile = Literal["vnni", "no_vnni"]
"""How a processor multiplies int8: exactly (VNNI, ARM), or on x86 in pairs that saturate."""


def int8_profile() -> Profile:
    """Return how this machine multiplies 8-bit integers.

    Without VNNI, x86 adds two products of an unsigned and a signed byte in 16 bits, which saturates
    unless one of them has 7 bits. Where the instructions are not known, that is assumed.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return "vnni"
    known = _cpu()["instructions"]
    return "vnni" if {"avx512_vnni", "avx_vnni"} & set(known) else "no_vnni"


def doctor() -> dict[str, Any]:
    """Return the facts that a bug report or a benchmark needs, as plain data.

    Keys: ``secateur``, ``python``, ``platform`` (text); ``packages`` (version by name);
    ``optional`` (version or None, and the command that installs it); ``kernels`` (likewise; the
    version is the instructions that are used); ``cpu``; ``int8`` (:func:`int8_profile`);
    ``accelerators``.
    """
    return {
        "secateur": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in REQUIRED},
        "optional": {
            name: {"version": _version(name), "install": command}
            for name, command in OPTIONAL.items()
        },
        "kernels": {"nm": native.facts()},
        "cpu": _cpu(),
        "int8": int8_profile(),
        "accelerators": _accelerators(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    information = _cpu_information()
    flags = set(information.get("flags", information.get("Features", "")).split())
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {
        "name": information.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": [each for each in INSTRUCTIONS if each in flags],
    }


def _cpu_information() -> dict[str, str]:
    """Return the first processor of /proc/cpuinfo; empty where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _accelerators() -> list[str]:
    found = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("Apple MPS")
    return found
