"""Layers that share one weight: planned once, trained once, stored once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.data import InMemory
from secateur.plan import build_plan
from secateur.sets import Levels, Unstructured


class Tied(nn.Module):
    """The second and the third layer share a weight, and have biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(16, 8), nn.Linear(8, 4)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.stem(x).relu()).relu()).relu())  # type: ignore[no-any-return]


class TiedTokens(nn.Module):
    """The output layer has the weight of the embedding, which comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(12, 4), nn.Linear(4, 12, bias=False)
        self.head.weight = self.tokens.weight


STAGES = [
    {"method": "admm", "density": 0.4, "bits": 4, "epochs": 1, "retrain_epochs": 1},
    {"method": "gmp", "density": 0.4, "bits": 4, "epochs": 1},
    {"method": "srste", "set": "nm", "n": 2, "m": 4, "epochs": 1},
    {"method": "post_training", "bits": 4, "set": "levels", "samples": 32},
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: str(stage["method"]))
def test_a_shared_weight_goes_through_every_method(stage: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    images = torch.randn(64, 16)
    some = InMemory(images, images[:, :4].argmax(1))
    recipe = {"train": {"epochs": 1}, "export": {"onnx": False}, "stages": [stage]}
    done = sc.compress(sc.Task(Tied(), some, some, some, name="tied"), recipe, out=tmp_path)
    rows = {row["name"]: row for row in done.report["layers"]}
    assert rows["b"]["note"] == "its weight is that of a"
    assert rows["b"]["weights"] == 0
    assert rows["b"]["storage"] is None
    assert all(rows["b"][key] == rows["a"][key] for key in ("set", "bits", "density"))
    found = sc.load(tmp_path / "model.secateur", Tied())
    kept = sum(int(p.count_nonzero()) for p in found.parameters() if p.ndim > 1)  # each once
    assert done.report["storage"]["weights"] == {"dense": 16 * 8 + 8 * 8 + 8 * 4, "kept": kept}
    with torch.no_grad():
        assert torch.equal(found(images), done.model(images))


def test_a_shared_weight_is_one_row_of_a_plan_whatever_its_first_name() -> None:
    plan = build_plan(TiedTokens(), Unstructured(density=0.5))
    assert [(row.layer, row.owner) for row in plan.rows] == [("head", ""), ("tokens", "head")]
    assert plan.keep == 24
    method = sc.methods.GMP(Unstructured(density=0.5) & Levels(4)).attach(model := TiedTokens())
    method.finalize()
    assert int(model.tokens.weight.count_nonzero()) == 24
