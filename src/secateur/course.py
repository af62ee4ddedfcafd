"""What happens between the stages of a run: channels removed, the floor watched."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from secateur.channels import compact
from secateur.engine import checkpoint
from secateur.engine.evaluate import mean_score
from secateur.engine.trainer import Segment, Trainer
from secateur.errors import ChannelError, SecateurError
from secateur.finish import dense_copy, load_dense, save_dense
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.task import Task

REACHED = "reached.safetensors"
"""The network of the last stage that met the floor."""


@dataclass
class Course:
    """A run on its way through the stages of a recipe.

    Args:
        task: whose model is compressed.
        recipe: what was asked.
        plans: of the stages; those of stages that were undone are taken away.
        folder: of the checkpoints.
        main: whether this process writes files.

    Attributes:
        notes: what a reader of the report should know.
    """

    task: Task
    recipe: Recipe
    plans: list[Plan]
    folder: Path
    main: bool
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.untrained = copy.deepcopy(self.task.model)

    def dense(self) -> nn.Module:
        """Return the trained network as it was before the first stage."""
        return dense_copy(self.untrained, self.folder / checkpoint.DENSE)

    def after(self, segment: Segment, trainer: Trainer) -> bool:
        """Do what is due when a segment has ended; say whether training goes on.

        Raises:
            SecateurError: the first stage ended below the floor.
        """
        if segment.stage is None:
            self._save(checkpoint.DENSE)
        elif segment.closes:
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
        self.notes.append(f"stage {stage} and all after it were undone: {why}")

    def _remove_channels(self, trainer: Trainer, plans: Sequence[Plan]) -> Sequence[str]:
        """Cut the network down to the channels that matter; say what stayed, and why."""
        for plan in plans:
            if plan.positional:
                return [f"channels stay: the set '{plan.positional}' counts their places"]
        weights = (row.parameter for plan in plans for row in plan.compressed)
        example = self.task.example_input.to(trainer.accelerator.device)
        try:
            smaller = compact(self.task.model, example, fixed=set(weights))
        except ChannelError as error:
            return [f"channels stay: {error}"]
        trainer.cut(smaller)
        return smaller.notes

    def _save(self, name: str) -> None:
        if self.main:
            save_dense(self.task.model, self.folder / name)
