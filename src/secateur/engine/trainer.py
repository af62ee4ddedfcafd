"""The one training loop, used by every method and knowing none."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler

from secateur.channels import Compacted, Kept, replay
from secateur.data import collate_fn
from secateur.engine import checkpoint
from secateur.engine.distill import distillation_loss
from secateur.engine.evaluate import mean_score
from secateur.engine.progress import Progress
from secateur.engine.reestimate import reestimate
from secateur.engine.teacher import Teacher
from secateur.errors import SecateurError
from secateur.methods import FrozenAdam, Method, Phase
from secateur.quantizers import grids, regrid
from secateur.task import Task


class TrainOptions(Protocol):
    """What the engine reads of a recipe's ``train``."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def workers(self) -> int: ...


class EpochSampler(Sampler[int]):
    """A permutation that depends on the seed and the epoch alone, so that resuming repeats it."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.seed = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        yield from torch.randperm(self.length, generator=generator).tolist()


@dataclass(frozen=True)
class Segment:
    """A phase of a run: dense training (no method), or one phase of a stage's method.

    Attributes:
        phase: its name, length and learning rate.
        stage: index into the recipe's stages, or None for dense training.
        method: the stage's method, shared by all its segments.
        opens: whether it is the first of its stage.
        closes: whether it is the last of its stage.
    """

    phase: Phase
    stage: int | None = None
    method: Method | None = None
    opens: bool = True
    closes: bool = True


@dataclass
class Trainer:
    """Trains a task through segments, with a checkpoint after every epoch.

    All randomness of an epoch derives from the seed, the segment and the epoch, so a resumed run
    repeats an uninterrupted one bit for bit (same machine, same number of threads).

    Args:
        task: model and data; the model is trained in place.
        options: the recipe's ``train``.
        folder: where checkpoints are kept.
        identity: what the run was asked; a checkpoint of another request is refused.
        progress: where progress is shown.
        accelerator: devices and processes, as their launcher set them up.
        teacher: returns the trained dense network, for phases that distil from it.

    Attributes:
        history: one entry per epoch.
        kept: what :meth:`cut` has left of the network's channels, one cut after the other.
        earlier: seconds of the epochs that were trained before the run was resumed.
    """

    task: Task
    options: TrainOptions
    folder: Path
    identity: str
    progress: Progress
    accelerator: Accelerator
    teacher: Callable[[], nn.Module]
    history: list[dict[str, Any]] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    earlier: float = 0.0

    def __post_init__(self) -> None:
        self.adam: torch.optim.Adam | None = None
        self._prepare()
        self.sampler = EpochSampler(len(self.task.train))  # type: ignore[arg-type]
        self.loader = self._loader(self.task.train)

    def run(
        self,
        segments: Sequence[Segment],
        resume: bool = False,
        before: Callable[[Segment, Trainer], None] = lambda segment, trainer: None,
        after: Callable[[Segment, Trainer], bool] = lambda segment, trainer: True,
    ) -> None:
        """Train through all segments.

        Args:
            segments: in order.
            resume: continue from ``folder`` if it holds a checkpoint of the same request.
            before: called with each segment that opens a stage, or in which training resumes.
            after: called with each segment at its end, and again if resumed from there; training
                ends when it returns False.

        Raises:
            SecateurError: the checkpoint belongs to another request, or training diverged.
        """
        saved = checkpoint.load(self.folder) if resume else None
        if saved and saved["identity"] != self.identity:
            raise SecateurError(
                "resume: the checkpoint belongs to another recipe or other options.\n"
                "Use another --out, or leave out --resume to start afresh."
            )
        if saved:
            for kept in saved["kept"]:
                self._cut(kept)
            # what a method adds to the network is there once it is attached
            regrid(self.task.model, saved["grids"])
            self.task.model.load_state_dict(saved["model"], strict=False)
            self.history[:] = saved["history"]
            self.earlier = sum(entry["seconds"] for entry in self.history)
        total = sum(segment.phase.epochs for segment in segments)
        distilled = sum(each.phase.epochs for each in segments if each.phase.distill)
        teacher = Teacher(self._frozen_teacher, self.task.train, distilled)
        with self.progress.running(total, len(self.history)):
            for number, segment in enumerate(segments):
                if saved and number < saved["segment"]:
                    continue
                if segment.opens or saved:
                    before(segment, self)
                self._segment(number, segment, saved, teacher)
                saved = None
                if not after(segment, self):
                    break

    def _loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        loader = DataLoader(
            dataset,
            batch_size=self.options.batch_size,
            sampler=self.sampler,
            collate_fn=collate_fn(dataset),
            num_workers=self.options.workers,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare_data_loader(loader)
        return prepared

    def cut(self, smaller: Compacted) -> None:
        """Make the task's network the smaller one, in place, between two segments."""
        if smaller.kept:
            self._cut(smaller.kept)
            self.task.model.load_state_dict(smaller.model.state_dict())

    def _cut(self, kept: Kept) -> None:
        replay(kept, self.task.model)
        self.kept.append(kept)
        self._prepare()

    def _prepare(self) -> None:
        # On one core a step of LeNet-5 takes 26 ms with channels-last weights, 43 ms without.
        self.task.model.to(memory_format=torch.channels_last)
        self.model = self.accelerator.prepare_model(self.task.model)

    def _segment(
        self, number: int, segment: Segment, saved: dict[str, Any] | None, teacher: Teacher
    ) -> None:
        """Train one segment, from where ``saved`` left it if that is given."""
        phase, method = segment.phase, segment.method
        if method and (segment.opens or saved):
            method.attach(self.task.model)
            self._prepare()
        optimizer = self.accelerator.prepare_optimizer(self._optimizer(method, phase.frozen))
        if saved:
            self.task.model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            if method:
                method.load_state_dict(saved["method"])
        elif method:
            self.progress.begin(f"before {phase.name}")
            method.begin(phase, len(self.loader))
        loader, network = self.loader, None
        if phase.distill:
            samples, network = teacher.ready()
            loader = self._loader(samples)
        average = self._average(phase, saved)
        best: dict[str, Any] | None = saved["best"] if saved else None
        for epoch in range(saved["epochs"] if saved else 0, phase.epochs):
            set_seed(_derived_seed(self.options.seed, number, epoch))
            self.sampler.seed = _derived_seed(self.options.seed, number, epoch)
            started = time.perf_counter()
            loss = self._epoch(segment, optimizer, epoch, loader, network, average)
            if method and method.reestimates:
                reestimate(self.task.model, self.task.train)
            entry = {
                "stage": segment.stage,
                "method": method.name if method else "dense",
                "phase": phase.name,
                "step": phase.step,
                "epoch": epoch,
                "loss": loss,
                "accuracy": mean_score(self.task, self.task.validation),
                "lr": self._rate(phase, epoch * len(self.loader)),
            }
            if method:
                entry |= method.metrics()
                if method.approximate:
                    with method.projected():
                        entry["projected_accuracy"] = mean_score(self.task, self.task.validation)
            entry["seconds"] = time.perf_counter() - started
            self.history.append(entry)
            self.progress.epoch(entry, phase.epochs)
            if phase.best and (best is None or entry["accuracy"] > best["accuracy"]):
                state = copy.deepcopy(self.task.model.state_dict())
                best = {"accuracy": entry["accuracy"], "model": state}
            self._save(number, epoch + 1, optimizer, method, average, best)
        if average:
            self.task.model.load_state_dict(average.module.state_dict())
            if method:
                method.step()  # an average of members need not be one
        if best:
            self.task.model.load_state_dict(best["model"])
        if method and segment.closes:
            method.finalize()
            self._prepare()
            if method.reestimates:
                reestimate(self.task.model, self.task.train)

    def _epoch(
        self,
        segment: Segment,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        loader: DataLoader[Any],
        teacher: nn.Module | None,
        average: AveragedModel | None,
    ) -> float:
        """Train for one epoch and return the mean loss, without the method's penalty."""
        method = segment.method
        self.model.train()
        total = torch.zeros((), device=self.accelerator.device)
        self.progress.begin(segment.phase.name, len(self.loader))
        for step, (inputs, targets, *goals) in enumerate(loader):
            rate = self._rate(segment.phase, epoch * len(self.loader) + step)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            logits = self.model(inputs)
            loss = self.task.loss(logits, targets)
            if teacher:
                with torch.no_grad():
                    goals = [teacher(inputs)]
            if goals:
                loss = torch.lerp(loss, distillation_loss(logits, goals[0]), segment.phase.distill)
            total += loss.detach()
            self.accelerator.backward(loss + method.penalty() if method else loss)
            optimizer.step()
            optimizer.zero_grad()
            if method:
                method.step(rate)
            if average:
                average.update_parameters(self.task.model)
            self.progress.advance()
        mean = float(total) / len(self.loader)
        if not math.isfinite(mean):
            raise SecateurError(
                f"train.lr: the loss became {mean} at lr {rate:g}; lower it or check the data."
            )
        return mean

    def _rate(self, phase: Phase, step: int) -> float:
        """Return the learning rate of a step counted from the start of the phase."""
        peak = self.options.lr if phase.lr is None else phase.lr
        if self.options.schedule == "constant":
            return peak
        done = step * phase.cycles / (phase.epochs * len(self.loader))
        return peak * (1 + math.cos(math.pi * (done % 1))) / 2

    def _frozen_teacher(self) -> nn.Module:
        return self.teacher().to(self.accelerator.device).eval().requires_grad_(False)

    def _average(self, phase: Phase, saved: dict[str, Any] | None) -> AveragedModel | None:
        """Return the moving average of the weights, if the phase wants one."""
        if not phase.average:
            return None
        decay = get_ema_multi_avg_fn(phase.average)  # type: ignore[no-untyped-call]
        average = AveragedModel(self.task.model, multi_avg_fn=decay, use_buffers=True)
        if saved:
            average.load_state_dict(saved["average"])
        return average

    def _optimizer(self, method: Method | None, frozen: bool) -> torch.optim.Optimizer:
        """Return a fresh optimizer: moments from before a projection must not outlive it.

        Args:
            method: that says which parameters are trained, and how fast.
            frozen: whether Adam keeps the second moments of the last one.
        """
        o = self.options
        parameters: Any = method.parameter_groups(o.lr) if method else self.model.parameters()
        if o.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, o.lr, momentum=o.momentum, weight_decay=o.weight_decay, fused=True
            )
        kind = torch.optim.AdamW if o.optimizer == "adamw" else torch.optim.Adam
        adam = kind(parameters, o.lr, weight_decay=o.weight_decay, fused=True)
        if frozen:
            return FrozenAdam(self.adam or adam)
        self.adam = adam
        return adam

    def _save(
        self,
        number: int,
        epochs: int,
        optimizer: torch.optim.Optimizer,
        method: Method | None,
        average: AveragedModel | None,
        best: dict[str, Any] | None,
    ) -> None:
        if self.accelerator.is_main_process:
            state = {
                "identity": self.identity,
                "segment": number,
                "epochs": epochs,
                "kept": self.kept,
                "grids": grids(self.task.model),
                "model": self.task.model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "method": method.state_dict() if method else None,
                "average": average.state_dict() if average else None,
                "best": best,
                "history": self.history,
            }
            checkpoint.save(self.folder, state)


def _derived_seed(seed: int, segment: int, epoch: int) -> int:
    """Return a seed of 32 bits for one epoch of one segment."""
    digest = hashlib.sha256(f"{seed}/{segment}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
