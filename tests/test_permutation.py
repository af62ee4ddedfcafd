"""Channels in another order: the same function, and more of it left by N:M."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur.engine.trainer import Trainer
from secateur.errors import RecipeError
from secateur.permutation import LEAST_GAIN, best_order, permute
from secateur.sets import NM
from secateur.zoo import mobilenet_v2, resnet8, vgg7
from tiny import digits_task


def kept(table: Tensor, n: int, m: int) -> float:
    """What n of each m columns keep, row by row; the last ones, which make no group, stay."""
    total = 0.0
    for row in table.tolist():
        for start in range(0, len(row), m):
            group = sorted(row[start : start + m], reverse=True)
            total += sum(group[:n] if len(group) == m else group)
    return total


@settings(max_examples=60)
@given(st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4)]), st.integers(2, 11), st.integers(0, 2**32))
def test_no_swap_of_two_channels_keeps_more(
    ratio: tuple[int, int], channels: int, seed: int
) -> None:
    n, m = ratio
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(5, channels, generator=generator, dtype=torch.float64).pow(4)
    free = [0 if each != 1 else -1 for each in range(channels)]
    order = best_order([table], [n], m, free)
    assert sorted(order.tolist()) == list(range(channels))
    assert order[1] == 1
    best = kept(table[:, order], n, m)
    assert best >= kept(table, n, m) - 1e-6
    whole = channels // m * m
    for one, other in itertools.combinations(set(range(whole)) - {1}, 2):
        swapped = order.clone()
        swapped[[one, other]] = order[[other, one]]
        assert kept(table[:, swapped], n, m) <= best + 2 * LEAST_GAIN * float(table.sum())


def test_large_channels_are_spread_over_the_groups() -> None:
    table = torch.tensor([[9.0, 8.0, 7.0, 6.0, 0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    order = best_order([table], [2], 4, [0] * 8)
    assert sorted((order[:4] < 4).tolist()) == [False, False, True, True]


class Branches(nn.Module):
    """A depthwise layer, a concatenation, an addition and a flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.three = nn.Conv2d(16, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.four = nn.Conv2d(32, 12, 1)
        self.last = nn.Linear(12 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        y = self.norm(self.three(torch.relu(self.two(x)))) + x
        return self.last(torch.relu(self.four(torch.cat([x, y], 1))).flatten(1))


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "branches": (Branches, (2, 3, 4, 4)),
    "resnet8": (resnet8, (2, 1, 28, 28)),
    "vgg7": (lambda: vgg7(channels=3, width=0.125), (2, 3, 32, 32)),
    "mobilenet_v2": (lambda: mobilenet_v2(width=0.25), (2, 1, 16, 16)),
}


def prunable(model: nn.Module, pattern: NM) -> dict[str, NM]:
    return {
        name: pattern
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not pattern.misfit(layer.weight.shape)
    }


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 8)], ids=str)
def test_networks_compute_the_same_and_keep_what_is_said(name: str, pattern: NM) -> None:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.weight.data.uniform_(0.5, 2)
    before = copy.deepcopy(model)
    x = torch.randn(shape)
    gains = permute(model, x, prunable(model, pattern))
    expected, found = before(x).detach(), model(x).detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert any(gain.after > gain.before + 1e-3 for gain in gains.values())
    for layer, gain in gains.items():
        for network, said in ((before, gain.before), (model, gain.after)):
            weight = network.get_submodule(layer).weight.detach().double()
            left = pattern.project(weight).square().sum() / weight.square().sum()
            assert float(left) == pytest.approx(said, abs=1e-9)


def test_a_network_that_takes_channels_by_number_is_left_alone() -> None:
    torch.manual_seed(0)

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.first(x))
            return self.second(hidden) + hidden[:, 2:3]

    model = Picky()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 6)
    expected = model(x)
    permute(model, x, {"second": NM(2, 4)})
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model.first.weight[2], before["first.weight"][2])


def test_a_stage_permutes_once_however_often_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {
        "train": {"epochs": 1, "batch_size": 64, "lr": 5e-3, "threads": 1},
        "stages": [{"method": "srste", "set": "nm", "n": 1, "m": 4, "epochs": 3, "permute": True}],
    }
    whole = sc.compress(digits_task(), recipe, out=tmp_path / "whole")
    save, saved = Trainer._save, 0

    def stopping(self: Trainer, *arguments: Any) -> None:
        nonlocal saved
        save(self, *arguments)
        saved += 1
        if saved == 3:  # in the second epoch of the stage
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", stopping)
        with pytest.raises(KeyboardInterrupt):
            sc.compress(digits_task(), recipe, out=tmp_path / "stopped")
    sc.compress(digits_task(), recipe, out=tmp_path / "stopped", resume=True)
    files = [(tmp_path / each / "model.secateur").read_bytes() for each in ("whole", "stopped")]
    assert files[0] == files[1]
    assert whole.report["accuracy"]["compressed"] > 0.5


def test_permutation_is_refused_where_nothing_is_n_of_m() -> None:
    stage = {"method": "gmp", "density": 0.1, "permute": True}
    with pytest.raises(RecipeError, match=r"stages\[0\]\.permute: it is for the set nm"):
        sc.load_recipe({"stages": [stage], "model": "secateur.zoo:lenet5", "data": "digits"})
