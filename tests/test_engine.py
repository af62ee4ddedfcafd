"""Pieces of the training loop against their definitions."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

import secateur as sc
from secateur import data
from secateur.engine import checkpoint
from secateur.engine.distill import TEMPERATURE, distillation_loss
from secateur.engine.progress import Progress
from secateur.engine.trainer import EpochSampler, Segment, Trainer
from secateur.errors import SecateurError
from secateur.files import atomic
from secateur.methods import ADMM, Phase


def trainer(folder: Path) -> Trainer:
    splits = data.load("digits")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    task = sc.Task(model, splits.train, splits.validation, splits.test)
    options = SimpleNamespace(
        epochs=1, batch_size=64, lr=0.1, optimizer="sgd", momentum=0.0, weight_decay=0.0,
        schedule="cosine", seed=0, workers=0,
    )  # fmt: skip
    progress = Progress(Console(quiet=True))
    return Trainer(task, options, folder, "test", progress, Accelerator(), teacher=lambda: model)


def test_distillation_equals_softened_cross_entropy_minus_entropy() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    p = (teacher / TEMPERATURE).softmax(1)
    log_q = (student / TEMPERATURE).log_softmax(1)
    expected = (p * (p.log() - log_q)).sum(1).mean() * TEMPERATURE**2
    torch.testing.assert_close(distillation_loss(student, teacher), expected)
    assert distillation_loss(student, student).item() == pytest.approx(0, abs=1e-6)


def test_learning_rate_restarts_with_each_cycle(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    phase = Phase("admm", epochs=4, lr=1.0, cycles=2)
    steps = 2 * len(made.loader)
    rates = [made._rate(phase, step) for step in range(2 * steps)]
    assert rates[:steps] == pytest.approx(rates[steps:])
    assert rates[0] == 1.0
    assert rates[steps // 2] == pytest.approx(0.5)
    assert sorted(rates[:steps], reverse=True) == rates[:steps]


def test_the_average_of_the_weights_replaces_them(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    weight = made.task.model[1].weight
    seen = []
    advance = made.progress.advance

    def watch() -> None:
        seen.append(weight.detach().clone())
        advance()

    made.progress.advance = watch
    made.run([Segment(Phase("train", 1, average=0.8))])
    expected = seen[0]
    for each in seen[1:]:
        expected = 0.8 * expected + 0.2 * each
    torch.testing.assert_close(weight.detach(), expected)


def test_every_epoch_has_its_own_permutation_that_repeats() -> None:
    sampler = EpochSampler(50)
    first = list(sampler)
    sampler.seed = 1
    second = list(sampler)
    sampler.seed = 0
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert list(sampler) == first


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def interrupted() -> None:
        with atomic(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    with atomic(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert target.stat().st_mode & stat.S_IRGRP


class Evil:
    """Touches a file when it is unpickled."""

    path = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))


def test_a_damaged_or_malicious_checkpoint_is_refused(tmp_path: Path) -> None:
    evil = Evil()
    evil.path = str(tmp_path / "touched")
    (tmp_path / checkpoint.NAME).write_bytes(b"garbage")
    with pytest.raises(SecateurError, match="cannot be read"):
        checkpoint.load(tmp_path)
    torch.save({"identity": evil}, tmp_path / checkpoint.NAME)
    with pytest.raises(SecateurError, match="cannot be read"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "touched").exists()


def test_a_resumed_run_knows_how_long_it_had_trained(tmp_path: Path) -> None:
    first, again = trainer(tmp_path), trainer(tmp_path)
    first.run([Segment(Phase("train", 2))])
    assert first.earlier == 0
    again.run([Segment(Phase("train", 2))], resume=True)
    assert again.earlier == sum(entry["seconds"] for entry in first.history) > 0


def test_averaging_takes_the_statistics_of_norms_along(tmp_path: Path) -> None:
    """Weights of an average with the statistics of the last step would not fit each other."""
    made = trainer(tmp_path)
    made.task.model.append(nn.BatchNorm1d(10))
    norm, names = made.task.model[2], ("weight", "running_mean", "running_var")
    seen: list[dict[str, Tensor]] = []
    advance = made.progress.advance

    def watch() -> None:
        seen.append({name: norm.state_dict()[name].clone() for name in names})
        advance()

    made.progress.advance = watch
    made.run([Segment(Phase("train", 1, average=0.8))])
    for name in names:
        expected = seen[0][name]
        for each in seen[1:]:
            expected = 0.8 * expected + 0.2 * each[name]
        torch.testing.assert_close(norm.state_dict()[name], expected)
        assert not torch.equal(norm.state_dict()[name], seen[-1][name])


def test_the_engine_trains_any_method_phase_by_phase(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    method = ADMM(sc.sets.Unstructured(density=0.1), epochs=1, retrain_epochs=1)
    phases = method.phases()
    made.run([Segment(p, 0, method, p is phases[0], p is phases[-1]) for p in phases])
    assert int(made.task.model[1].weight.count_nonzero()) == 784
    assert [entry["phase"] for entry in made.history] == ["admm", "retrain"]
