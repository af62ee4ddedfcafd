"""SR-STE where weights are spread over processes (FSDP2), or the loop is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.methods import SRSTE
from secateur.sets import NM
from tiny import small_model, train

RANK = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import secateur as sc
from tiny import small_model, train

dist.init_process_group("gloo")
model = small_model()
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
try:
    sc.methods.SRSTE(sc.sets.NM(2, 4, rows=4)).attach(model)
    raise SystemExit("shared rows of shards are not refused")
except sc.SecateurError as error:
    assert "shard" in str(error)


def method():
    return sc.methods.SRSTE(sc.sets.NM(2, 4), decay=0.3).attach(model)


def optimizer():
    return torch.optim.SGD(model.parameters(), 0.1)


first, made = method(), optimizer()
train(model, first, made, 6)
state = first.state_dict()
second = method()
second.load_state_dict(state)
del first
train(model, second, optimizer(), 6, seed=2)
second.finalize()
weights = {name: each.full_tensor() for name, each in model.state_dict().items()}
if dist.get_rank() == 0:
    torch.save(weights, "sharded.pt")
dist.destroy_process_group()
"""


def test_shards_train_as_the_whole_and_resume(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "tiny.py").write_text((Path(__file__).parent / "tiny.py").read_text())
    launch = "torch.distributed.run --standalone --nproc_per_node 2 rank.py"
    done = subprocess.run(
        [sys.executable, "-m", *launch.split()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = small_model()
    method = SRSTE(NM(2, 4), decay=0.3).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, method, optimizer, 6)
    train(model, method, optimizer, 6, seed=2)
    method.finalize()
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(sharded[name], weight)
        assert weight.ndim == 1 or NM(2, 4).contains(sharded[name])


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_compiled_model_trains_as_it_does_uncompiled(mode: str) -> None:
    weights = []
    for compiled in (False, True):
        model = small_model()
        method = SRSTE(NM(2, 4), decay=0.3, mode=mode).attach(model)
        run: nn.Module = model
        if compiled:
            run = torch.compile(model, fullgraph=True, backend="aot_eager")  # type: ignore[assignment]
        train(run, method, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 8)
        weights.append(method.finalize().state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight)
