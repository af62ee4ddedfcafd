"""What happens between the stages of a run: budgets spent, channels removed, the floor watched."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from secateur.allocation import MEASURES, Budget, allocate, apply
from secateur.artifact import packed
from secateur.channels import compact
from secateur.data import first, in_memory
from secateur.engine import checkpoint
from secateur.engine.evaluate import mean_score, outputs
from secateur.engine.trainer import Segment, Trainer
from secateur.errors import ChannelError, RecipeError, SecateurError
from secateur.files import atomic
from secateur.finish import dense_copy, load_dense, save_dense
from secateur.methods import Method
from secateur.methods.costs import dense_costs
from secateur.norms import restating
from secateur.outcome import Outcome, finished
from secateur.permutation import permute
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.report.allocation import allocation_table
from secateur.sets import NM
from secateur.task import Task

REACHED = "reached.safetensors"
"""The network of the last stage that met the floor."""

SAMPLES = 2_000
"""Training samples that losses are measured on, unless a recipe says."""

SHARED, FEWEST = 20_000, 250
"""Where a method measures each layer several times: samples times layers at most, and samples at
least. Two networks that differ in one layer are told apart by few, as long as both see the same."""

ROOM = 0.03
"""Share of a budget that a network met in training may leave without a word."""


@dataclass
class Course:
    """A run on its way through the stages of a recipe.

    Args:
        task: whose model is compressed.
        recipe: what was asked.
        plans: of the stages; those of stages that were undone are taken away.
        folder: of the checkpoints.
        main: whether this process writes files.
        console: where allocations are printed.

    Attributes:
        notes: what a reader of the report should know.
        allocations: by stage, where its budget went and why (``Allocation.to_dict``).
        outcomes: by stage, the bits that its method chose (``secateur.outcome``).
    """

    task: Task
    recipe: Recipe
    plans: list[Plan]
    folder: Path
    main: bool
    console: Console
    notes: list[str] = field(default_factory=list)
    allocations: dict[int, dict[str, Any]] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.untrained = copy.deepcopy(self.task.model)
        for stage in range(len(self.plans)):
            if self._allocation(stage).exists():
                self._spend(stage, json.loads(self._allocation(stage).read_text()))
            if self._outcome(stage).exists():
                self.outcomes[stage] = json.loads(self._outcome(stage).read_text())

    def finished(self) -> list[Plan]:
        """Return the plans of the stages with the sets that their weights ended in."""
        return [
            finished(plan, self.outcomes[number]) if number in self.outcomes else plan
            for number, plan in enumerate(self.plans)
        ]

    def spent(self) -> list[dict[str, Any]]:
        """Return, by stage with a budget, where it went, for the report."""
        found = dict(self.allocations)
        for stage, outcome in self.outcomes.items():
            if outcome["spent"] and stage < len(self.plans):
                budget = self.recipe.stages[stage].budget
                found[stage] = {"budget": budget, "by": "training", "spent": outcome["spent"]}
        return [found[stage] for stage in sorted(found)]

    def dense(self) -> nn.Module:
        """Return the trained network as it was before the first stage."""
        return dense_copy(self.untrained, self.folder / checkpoint.DENSE)

    def before(self, segment: Segment, trainer: Trainer) -> None:
        """Permute channels and distribute the budget of a stage that begins, if that is asked for.

        Layers get shares of the budget as they are now; ratios are to the dense network, whole. A
        stage that goes on was permuted before.

        Raises:
            RecipeError: the budget cannot be met.
        """
        stage, method = segment.stage, segment.method
        if stage is None or method is None:
            return
        if self.recipe.stages[stage].permute and not any(
            entry["stage"] == stage for entry in trainer.history
        ):
            self._permute(stage)
        if self.recipe.stages[stage].budget is None:
            return
        if method.budgets:
            self.tell(method, stage, trainer.progress.advance)
            return
        if stage not in self.allocations:
            self._spend(stage, self._allocate(stage))
            self._keep(self._allocation(stage), self.allocations[stage])
            trainer.accelerator.wait_for_everyone()
        self.console.print(allocation_table(self.allocations[stage], f"stage {stage}: budget"))
        method.target = self.plans[stage]

    def _permute(self, stage: int) -> None:
        rows = self.plans[stage].fitted(self.task.model).compressed
        patterns = {
            row.layer: pattern
            for row in rows
            for pattern in (row.set.split()[0] if row.set else ())
            if isinstance(pattern, NM)
        }
        gains = permute(self.task.model, self.task.example_input, patterns)
        for layer, gain in gains.items():
            self.console.print(
                f"{layer}: {gain.after:.1%} of its squared norm stays after permutation of its "
                f"inputs, {gain.before:.1%} before"
            )

    def check(self, method: Method, stage: int) -> None:
        """Refuse a budget that a method cannot meet, before anything trains.

        Raises:
            RecipeError: even the least that it can make of the network costs more.
        """
        self.tell(method, stage)
        try:
            method.attach(copy.deepcopy(self.untrained))
        except RecipeError as error:
            raise RecipeError(f"stages[{stage}].{error}") from error

    def tell(self, method: Method, stage: int, measured: Callable[[], None] = lambda: None) -> None:
        """Say how the budgets of a method are measured: ratios are to the whole dense network.

        Args:
            method: of the stage.
            stage: its number.
            measured: called whenever a loss was measured.
        """
        choice, task = self.recipe.stages[stage].allocation, self.task
        assert choice is not None
        layers = len(self.plans[stage].compressed)
        some = in_memory(task.train, choice.samples or samples_over(layers))
        example = task.example_input.cpu()
        untrained = copy.deepcopy(self.untrained).cpu()

        @torch.no_grad()
        def loss() -> float:
            with restating(task.model):
                found = float(task.loss(*outputs(task.model, some)))
            measured()
            return found

        method.told(loss, dense_costs(untrained, example), self._overhead())

    def _overhead(self) -> int:
        task = self.task
        return packed.overhead_bytes(
            task.model,
            reference=task.reference,
            arguments=task.arguments,
            metadata=task.metadata,
        )

    def _allocate(self, number: int) -> dict[str, Any]:
        stage, task = self.recipe.stages[number], self.task
        choice, whole = stage.allocation, self.plans[number]
        plan, budget = whole.fitted(task.model), Budget.parse(stage.budget)
        assert choice is not None
        assert choice.by != "training"
        some = first(task.train, choice.samples or SAMPLES)

        @torch.no_grad()
        def loss(model: nn.Module) -> float:
            return float(task.loss(*outputs(model, some)))

        try:
            return allocate(
                task.model,
                plan,
                budget,
                by=choice.by,
                loss=loss,
                bits=choice.bits,
                fixed=[row.layer for row in plan.compressed if row.stated],
                overhead=self._overhead(),
                dense=MEASURES[budget.kind].dense(self.untrained, whole),
            ).to_dict()
        except RecipeError as error:
            raise RecipeError(f"stages[{number}].{error}") from error

    def _spend(self, stage: int, allocation: dict[str, Any]) -> None:
        self.allocations[stage] = allocation
        self.plans[stage] = apply(self.plans[stage], allocation)

    def _allocation(self, stage: int) -> Path:
        return self.folder / f"allocation-{stage}.json"

    def _outcome(self, stage: int) -> Path:
        return self.folder / f"outcome-{stage}.json"

    def _keep(self, path: Path, data: Mapping[str, Any]) -> None:
        if self.main:
            with atomic(path) as temporary:
                temporary.write_text(json.dumps(data))

    def after(self, segment: Segment, trainer: Trainer) -> bool:
        """Do what is due when a segment has ended; say whether training goes on.

        Raises:
            SecateurError: the first stage ended below the floor.
        """
        if segment.stage is None:
            self._save(checkpoint.DENSE)
            if self.recipe.scratch:
                self.task.model.load_state_dict(self.untrained.state_dict())
        elif segment.closes:
            assert segment.method is not None
            self.outcomes[segment.stage] = segment.method.outcome()
            self._keep(self._outcome(segment.stage), self.outcomes[segment.stage])
            return self._close(segment.stage, trainer)
        return True

    def _close(self, stage: int, trainer: Trainer) -> bool:
        floor = self.recipe.floor
        if floor is not None:
            accuracy = mean_score(self.task, self.task.validation)
            if accuracy < floor:
                self._undo(
                    stage, f"validation accuracy {accuracy:.2%} is below the floor {floor:.2%}"
                )
                return False
        if self.recipe.compact:
            self.notes[:] = self._remove_channels(trainer, self.plans[: stage + 1])
        if floor is not None:
            self._save(REACHED)
        return True

    def _undo(self, stage: int, why: str) -> None:
        """Go back to the network of the stage before."""
        if stage == 0:
            raise SecateurError(
                f"floor: after the first stage {why}.\n"
                "Remedy: a milder first stage, more epochs, or a lower floor."
            )
        load_dense(self.task.model, self.folder / REACHED)
        del self.plans[stage:]
        self.allocations = {k: each for k, each in self.allocations.items() if k < stage}
        self.notes.append(f"stage {stage} and all after it were undone: {why}")

    def _remove_channels(self, trainer: Trainer, plans: Sequence[Plan]) -> Sequence[str]:
        """Cut the network down to the channels that matter; say what stayed, and why."""
        for plan in plans:
            if plan.positional:
                return [f"channels stay: the set '{plan.positional}' counts their places"]
        weights = (row.parameter for plan in plans for row in plan.compressed)
        example = self.task.example_input.to(trainer.accelerator.device)
        try:
            smaller = compact(self.task.model, example, self.recipe.round_to, set(weights))
        except ChannelError as error:
            return [f"channels stay: {error}"]
        trainer.cut(smaller)
        return smaller.notes

    def _save(self, name: str) -> None:
        if self.main:
            save_dense(self.task.model, self.folder / name)


def samples_over(layers: int) -> int:
    """Return how many samples to measure losses on, by default, in a network of so many layers."""
    return min(SAMPLES, max(FEWEST, SHARED // max(1, layers)))


def over(size: int, allocations: Iterable[Mapping[str, Any]]) -> list[str]:
    """Say if a packed file is larger than the last budget that was distributed for it.

    That is done with the weights that are there when its stage begins. Training then changes which
    of them stay, and with them the bits of their indices and levels.

    Args:
        size: bytes of the file.
        allocations: of the stages, in order (:meth:`Course.spent`).
    """
    distributed = [each for each in allocations if each["by"] != "training"]
    limits = [each["limit"] for each in distributed if "file" in each["budget"]]
    if not limits or size <= limits[-1]:
        return []
    return [
        f"the packed file takes {size:,} bytes, its budget was {limits[-1]:,.0f}: training has "
        "moved indices and levels since it was distributed; "
        f"budget: {{file: {int(limits[-1] ** 2 / size)}}} leaves room for that"
    ]


def unspent(allocations: Iterable[Mapping[str, Any]]) -> list[str]:
    """Say which budgets that training was to meet have room that nothing could fill.

    Args:
        allocations: of the stages, in order (:meth:`Course.spent`).
    """
    notes = []
    for each in allocations:
        shares = each.get("spent", {}) if each["by"] == "training" else {}
        kind = max(shares, key=shares.__getitem__, default=None)
        if kind is not None and shares[kind] < 1 - ROOM:
            notes.append(
                f"budget.{kind}: {shares[kind]:.1%} of it is used: no bit and no channel that the "
                "network may have fits into the rest; with more bits to start from (bits, "
                "activation_bits of the stage) there is more to spend it on"
            )
    return notes
