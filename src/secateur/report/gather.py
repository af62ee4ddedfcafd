"""The figures of a report: what every layer became, and the three accountings."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.artifact.architecture import Architecture
from secateur.codec import Quantized, Storage
from secateur.cost import FULL_BITS, bits_by_layer, inspect, storage_table
from secateur.cost.account import LayerCost
from secateur.cost.energy import CAVEAT, NODE, Energy, energy_of
from secateur.cost.node import load_node
from secateur.cost.platforms import assess, load_platform, platform_names
from secateur.cost.workload import workload
from secateur.plan import Row
from secateur.quantizers import activation_bits
from secateur.sets import ConstraintSet


def layers(
    dense: nn.Module,
    model: nn.Module,
    example_input: Tensor,
    rows: Sequence[Row],
    sets: Mapping[str, ConstraintSet],
    stored: Mapping[str, Storage],
) -> list[dict[str, Any]]:
    """Return one entry per row of the plan: what became of it and what it takes.

    A weight that several layers share counts where it was planned.

    Args:
        dense: the network before it was compressed.
        model: the finished network.
        example_input: a batch of one, for counting MACs.
        rows: of the plan.
        sets: by layer, the set its weight is a member of.
        stored: by first name of a tensor, the bits it takes in the packed file.
    """
    before = {layer.name: layer for layer in inspect(dense, example_input).layers}
    after = {layer.name: layer for layer in inspect(model, example_input).layers}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first_names, inputs = Architecture.of(model).first_names, activation_bits(model)
    entries = []
    for row in rows:
        weight, bias = parameters.get(row.parameter), parameters.get(row.bias)
        target = sets.get(row.owner or row.layer)
        own = 0 if row.owner else row.weights
        kept = row.weights if weight is None else int(weight.count_nonzero())
        size = None if row.owner else stored.get(first_names.get(row.parameter, ""))
        was, now = before.get(row.layer), after.get(row.layer)
        entries.append(
            {
                "name": row.layer,
                "kind": row.kind,
                "shape": list(row.shape),
                "compressed_shape": list(row.shape if weight is None else weight.shape),
                "parameters": own + (0 if bias is None else bias.numel()),
                "weights": own,
                "kept": 0 if row.owner else kept,
                "density": kept / row.weights,
                "bits": _bits(target),
                "activation_bits": inputs.get(row.layer, FULL_BITS),
                "macs": was.macs if was else 0,
                "compressed_macs": now.macs if now else 0,
                "effective_macs": now.effective_macs if now else 0,
                "set": "dense" if target is None else str(target),
                "storage": dataclasses.asdict(size) if size else None,
                "note": row.note,
            }
        )
    known = {row.layer for row in rows}
    others = [each for name, each in before.items() if each.macs and name not in known]
    return entries + [_products(each, after.get(each.name)) for each in others]


def _products(was: LayerCost, now: LayerCost | None) -> dict[str, Any]:
    """Return the entry of a module that multiplies activations with each other: attention."""
    return {
        "name": was.name,
        "kind": was.kind,
        "shape": [],
        "compressed_shape": [],
        "parameters": 0,
        "weights": 0,
        "kept": 0,
        "density": 1.0,
        "bits": FULL_BITS,
        "activation_bits": FULL_BITS,
        "macs": was.macs,
        "compressed_macs": now.macs if now else 0,
        "effective_macs": now.effective_macs if now else 0,
        "set": "dense",
        "storage": None,
        "note": "products of activations",
    }


def storage(
    entries: Sequence[Mapping[str, Any]], dense: nn.Module, packed_bytes: int, onnx: Path
) -> dict[str, Any]:
    """Return the three accountings: weights counted, bits of weights and indices, whole files.

    The first two are over weights of convolutions and linear layers; biases and norms are only in
    the third.
    """
    matrices = [entry for entry in entries if len(entry["shape"]) > 1]
    bits = {
        kind: sum(entry["storage"][kind] for entry in matrices if entry["storage"])
        for kind in ("values", "index", "metadata")
    }
    weights = sum(entry["weights"] for entry in matrices)
    return {
        "weights": {"dense": weights, "kept": sum(entry["kept"] for entry in matrices)},
        "bits": {"dense": weights * FULL_BITS, **bits},
        "file": {
            "dense": sum(4 * tensor.numel() for tensor in dense.state_dict().values()),
            "packed": packed_bytes,
            "onnx": onnx.stat().st_size if onnx.exists() else None,
        },
    }


def encodings(model: nn.Module, quantized: Mapping[str, Quantized]) -> dict[str, Any]:
    """Return what the weights of the finished network take as platforms encode them.

    Args:
        model: the finished network.
        quantized: by tensor name, levels and scale of what is quantized.
    """
    total = storage_table(model, quantized).to_dict()["total"]
    rows = {
        name: bits | {"layers_refused": total["refused"][name]}
        for name, bits in total["encodings"].items()
    }
    return {"encodings": rows, "bound": total["bound"]}


def modelled(
    dense: nn.Module, model: nn.Module, example_input: Tensor, quantized: Mapping[str, Quantized]
) -> dict[str, Any]:
    """Return the modelled energy of both networks, and what compression pays on each platform.

    As in :func:`cost`, a number that is not quantized has 32 bits.

    Args:
        dense: the network before it was compressed.
        model: the finished network.
        example_input: a batch of one.
        quantized: by tensor name, levels and scale of what is quantized.
    """
    before = workload(dense, example_input)
    after = workload(
        model,
        example_input,
        weight_bits=bits_by_layer(quantized),
        activation_bits=activation_bits(model),
    )
    node = load_node(NODE)
    energies = {
        "dense": energy_of(before, node),
        "compressed": energy_of(after, node),
        "zeros_skipped": energy_of(after, node, skip_zeros=True),
    }
    found = (assess(load_platform(name), after, before) for name in platform_names())
    return {
        "energy": {
            "node": node.name,
            **{network: _joules(each) for network, each in energies.items()},
            "caveat": CAVEAT,
        },
        "platforms": [each.to_dict() for each in found],
    }


def _joules(energy: Energy) -> dict[str, float]:
    parts = energy.total.to_dict()
    del parts["name"]
    return parts


def cost(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return MACs and BOPs of the dense and the compressed network.

    Removed channels count no more; zeros that are left are not skipped: on a machine that does not
    exploit them they are multiplied like any other weight. ``effective_macs`` is what a machine
    that skips every zero weight would do.
    """
    macs = sum(entry["macs"] for entry in entries)
    return {
        "dense": {"macs": macs, "bops": macs * FULL_BITS**2},
        "compressed": {
            "macs": sum(entry["compressed_macs"] for entry in entries),
            "bops": sum(
                entry["compressed_macs"] * entry["bits"] * entry["activation_bits"]
                for entry in entries
            ),
            "effective_macs": sum(entry["effective_macs"] for entry in entries),
        },
    }


def ratios(storage: Mapping[str, Any], cost: Mapping[str, Any]) -> dict[str, float]:
    """Return dense / compressed of weights, bits (values, indices and record headers), file bytes,
    MACs and BOPs."""
    bits = storage["bits"]
    stored = bits["values"] + bits["index"] + bits["metadata"]
    dense, compressed = cost["dense"], cost["compressed"]
    return {
        "weights": storage["weights"]["dense"] / max(1, storage["weights"]["kept"]),
        "bits": bits["dense"] / max(1, stored),
        "file": storage["file"]["dense"] / storage["file"]["packed"],
        "macs": dense["macs"] / max(1, compressed["macs"]),
        "bops": dense["bops"] / max(1, compressed["bops"]),
    }


def environment(device: str) -> dict[str, Any]:
    """Return what the run depended on besides the recipe."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": device,
    }


def _bits(target: ConstraintSet | None) -> int:
    levels = target.split()[1] if target else None
    return levels.bits if levels else FULL_BITS
