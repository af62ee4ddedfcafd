"""Linear layers as compressed-tensors packs them, ``pack-quantized``: for vLLM and transformers.

Levels of 1 to 8 bits are packed densely into int32, 32 of them in as many words as they have bits;
each output has a scale. All other tensors stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from secateur.codec import Quantized
from secateur.errors import ArtifactError, MissingDependencyError
from secateur.files import atomic
from secateur.quantizers import grids

FORMAT = "pack-quantized"
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(model: nn.Module, quantized: Mapping[str, Quantized], folder: Path) -> list[Path]:
    """Write ``model.safetensors`` and ``config.json``; of a transformer, ready for its loader.

    Args:
        model: a network; that of transformers brings its ``config``.
        quantized: levels of its weights, by name of the tensor. Layers that are not linear, and
            levels that reach 128, stay floats.
        folder: for both files.

    Returns:
        The files.

    Raises:
        MissingDependencyError: the extra ``compressed-tensors`` is not installed.
        ArtifactError: layers read through grids, which the format has no place for, no linear layer
            is on levels, or the file would not be smaller.
    """
    if grids(model):
        raise ArtifactError(
            f"{FORMAT}: layers of this network round what they read, and the format holds weights "
            "alone.\nRemedy: --format onnx, or compress without activation_bits."
        )
    pack = _packer()
    layers = {
        name: (levels, bits)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (levels := quantized.get(f"{name}.weight")) is not None
        and (bits := bits_of(levels)) is not None
    }
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    dense = sum(tensor.nbytes for tensor in tensors.values())
    for name, (levels, bits) in layers.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": each for part, each in _packed(levels, bits, pack).items()}
    stored = sum(tensor.nbytes for tensor in tensors.values())
    if stored >= dense:
        raise ArtifactError(
            f"{FORMAT}: no linear layer gets smaller ({dense} bytes of tensors, then {stored}).\n"
            "It holds linear layers on levels of up to 8 bits: give their stage bits."
        )
    config = _config(model, {name: bits for name, (_, bits) in layers.items()})
    files = [folder / WEIGHTS, folder / CONFIG]
    with atomic(files[0]) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    with atomic(files[1]) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")
    return files


def bits_of(quantized: Quantized) -> int | None:
    """Return the fewest bits b with all levels in -2^(b-1) ... 2^(b-1) - 1, None beyond 8."""
    levels = quantized.levels
    if not levels.numel():
        return None
    reach = max(-1 - int(levels.min()), int(levels.max()))
    return reach.bit_length() + 1 if reach < 128 else None


def _packed(quantized: Quantized, bits: int, pack: Any) -> dict[str, Tensor]:
    """Return the tensors of a layer by the names that the format gives them."""
    levels = quantized.levels
    return {
        "weight_packed": pack(levels.to(torch.int8), bits),
        "weight_scale": quantized.scales().float().expand(len(levels), 1).contiguous(),
        "weight_shape": torch.tensor(levels.shape),
    }


def _config(model: nn.Module, bits: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration of a network, with that of its packed layers."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    groups = {}
    for width in sorted(set(bits.values())):
        arguments = QuantizationArgs(num_bits=width, symmetric=True, strategy="channel")
        targets = [name for name, each in bits.items() if each == width]
        groups[f"bits_{width}"] = QuantizationScheme(targets=targets, weights=arguments)
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    quantization = QuantizationConfig(
        config_groups=groups,
        format=FORMAT,
        quantization_status="compressed",
        ignore=[name for name in linear if name not in bits],
    )
    own: Any = getattr(model, "config", None)
    config: dict[str, Any] = {"architectures": [type(model).__name__]}
    if hasattr(own, "to_dict"):
        config = own.to_dict() | config
    return config | {"quantization_config": quantization.to_dict()}


def _packer() -> Any:
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError as error:
        raise MissingDependencyError(
            "compressed-tensors: the package is not installed, or too old.\n"
            'Install it with: pip install "secateur[compressed-tensors]"'
        ) from error
    return pack_to_int32
