"""The main job: train into the constraint sets, write the artifacts, prove them, report."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor, nn

from secateur import data
from secateur.artifact import onnx
from secateur.attention import separate
from secateur.course import Course, over, unspent
from secateur.data import InMemory
from secateur.engine import checkpoint
from secateur.engine.evaluate import outputs
from secateur.engine.progress import Progress
from secateur.engine.trainer import Segment, Trainer
from secateur.errors import RecipeError, SecateurError
from secateur.files import atomic
from secateur.finish import finish, load_dense, save_dense, settle
from secateur.methods import METHODS, Method, Phase
from secateur.methods.admm import unsettled
from secateur.plan import Plan, build_plan
from secateur.recipe import Recipe, Stage, load_recipe
from secateur.reference import build, fetches_weights, is_known
from secateur.report.html import write_html
from secateur.report.plan import plan_table
from secateur.report.schema import validate
from secateur.report.terminal import print_report
from secateur.task import Task

NO_LABELS = "the data has no labels: accuracy is agreement with the dense network"

REPORT = "report.json"
RECIPE = "recipe.yaml"

DENSE_KEYS = ("model", "model_args", "weights", "data", "train")
"""Keys of a recipe that decide what its dense network is."""


@dataclass(frozen=True)
class Result:
    """What a finished run left behind.

    Attributes:
        folder: holds ``model.secateur``, ``model.onnx``, ``report.json``, ``report.html``,
            ``recipe.yaml`` and ``checkpoint/``.
        report: the content of ``report.json`` (docs/report.md).
        model: the compressed network, in evaluation mode; the packed file holds the same.
    """

    folder: Path
    report: dict[str, Any]
    model: nn.Module


def compress(
    task: Task | None,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    out: str | Path,
    resume: bool = False,
    console: Console | None = None,
    progress: Progress | None = None,
) -> Result:
    """Compress a network as a recipe says.

    Args:
        task: model and data; None builds both from the recipe.
        recipe: a recipe, its content, or the path of its YAML file. With a task its ``model``
            and ``data`` may be left out.
        out: folder for everything that is written.
        resume: continue the run in ``out`` that was stopped.
        console: where progress and the report are printed; None prints nothing.
        progress: shows the training; by default bars on the console.

    Raises:
        RecipeError: the recipe asks for what cannot be.
        ParityError: an artifact does not compute what the trained model computes.
        SecateurError: anything else a user can cause.
    """
    started = time.perf_counter()
    recipe = load_recipe(completed(recipe, task))
    folder = Path(out)
    accelerator = Accelerator()
    main = accelerator.is_main_process
    if main and not resume:
        _refuse_unfinished(folder)
    console = console if console and main else Console(quiet=True)
    if recipe.export.onnx:
        onnx.require()
    task = _begin(task, recipe)
    dense = copy.deepcopy(task.model) if recipe.scratch else task.model
    if recipe.weights:
        load_dense(dense, Path(recipe.weights))
    for model in (task.model, dense):
        separate(model)
    if not task.labelled:
        label(task, dense)
    plans = [_plan(task, recipe, number) for number in range(len(recipe.stages))]
    for number, plan in enumerate(plans):
        console.print(plan_table(plan, f"stage {number}: {recipe.stages[number].method}"))
    checkpoints = folder / checkpoint.FOLDER
    if main:
        if not resume:
            _clear(folder)
        _write_text(folder / RECIPE, recipe.to_yaml())
        if recipe.weights:
            save_dense(dense, checkpoints / checkpoint.DENSE)
    accelerator.wait_for_everyone()

    course = Course(task, recipe, plans, checkpoints, main, console)
    for number, (stage, plan) in enumerate(zip(recipe.stages, plans, strict=True)):
        if METHODS[stage.method].meets and stage.budget:
            course.check(_method(task, stage, plan), number)
    trainer = Trainer(
        task,
        recipe.train,
        checkpoints,
        _identity(recipe.to_yaml()),
        progress or Progress(console),
        accelerator,
        teacher=course.dense,
    )
    trainer.run(_segments(task, recipe, course.plans), resume, course.before, course.after)
    kept = [row for row in trainer.history if (row["stage"] or 0) < len(course.plans)]
    notes = [*unsettled(kept), *course.notes, *([] if task.labelled else [NO_LABELS])]
    settled = settle(task.model, course.finished(), task.example_input, notes)
    if main:
        report = finish(task, course.dense(), recipe, settled, trainer, folder)
        report["allocations"] = course.spent()
        report["notes"] += over(report["storage"]["file"]["packed"], report["allocations"])
        report["notes"] += unspent(report["allocations"])
        report["seconds"] = trainer.earlier + time.perf_counter() - started
        _publish(report, folder, console)
    accelerator.wait_for_everyone()
    return Result(folder, json.loads((folder / REPORT).read_text()), task.model)


def train_dense(
    task: Task | None, recipe: Recipe, *, out: str | Path, progress: Progress | None = None
) -> Path:
    """Train the dense network that a recipe starts from, and no more; continue if stopped.

    Args:
        task: model and data; None builds both from the recipe.
        recipe: of which only :func:`dense_part` is read.
        out: folder for ``recipe.yaml`` (that part), the checkpoint, and the weights.
        progress: shows the training; by default nothing does.

    Returns:
        The file of the weights, which recipes of the same task can name in ``weights``.

    Raises:
        SecateurError: the folder belongs to another task, or training diverged.
    """
    folder, asked = Path(out), dense_part(recipe)
    task = _begin(task, recipe)
    _write_text(folder / RECIPE, asked)
    trainer = Trainer(
        task,
        recipe.train,
        folder / checkpoint.FOLDER,
        _identity(asked),
        progress or Progress(Console(quiet=True)),
        Accelerator(),
        teacher=lambda: task.model,
    )
    trainer.run([_dense_segment(recipe)], resume=True)
    save_dense(task.model, folder / checkpoint.DENSE)
    return folder / checkpoint.DENSE


def dense_part(recipe: Recipe) -> str:
    """Return, as YAML, what a recipe says about its dense network: task and training."""
    content = recipe.to_dict()
    return yaml.safe_dump({key: content[key] for key in DENSE_KEYS}, sort_keys=False)


def _begin(task: Task | None, recipe: Recipe) -> Task:
    """Set threads and seed, and only then build a task that is not given."""
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    set_seed(recipe.train.seed)
    return task or build_task(recipe)


def _identity(asked: str) -> str:
    return hashlib.sha256(asked.encode()).hexdigest()


def completed(recipe: Any, task: Task | None) -> Any:
    """Fill in the keys that a task stands for."""
    if task is None or not isinstance(recipe, Mapping):
        return recipe
    return {"name": task.name, "model": task.reference or "task:model", "data": "task", **recipe}


def _refuse_unfinished(folder: Path) -> None:
    """Raise if starting afresh would throw away a run that can be continued."""
    state = folder / checkpoint.FOLDER / checkpoint.NAME
    if state.exists() and not (folder / REPORT).exists():
        raise SecateurError(
            f"out: {folder} holds an unfinished run.\n"
            "Add --resume to continue it, or delete the folder, or choose another --out."
        )


def _clear(folder: Path) -> None:
    """Make the folder ready for a new run; a finished one in it is replaced.

    Raises:
        SecateurError: it cannot be written.
    """
    try:
        (folder / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
        (folder / REPORT).unlink(missing_ok=True)
        for old in (folder / checkpoint.FOLDER).iterdir():
            if old.is_file():
                old.unlink()
    except OSError as error:
        raise SecateurError(f"out: cannot write to {folder} ({error.strerror}).") from error


def _publish(report: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Write the report for programs and for people. Its JSON is what marks a run as finished."""
    validate(report)
    write_html(report, folder / "report.html")
    _write_text(folder / REPORT, json.dumps(report, indent=1))
    print_report(report, console)


def _write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text)


def build_task(recipe: Recipe) -> Task:
    """Build model and data from what the recipe names."""
    model = build(recipe.model, recipe.model_args)
    splits = data.load(recipe.data.name, root=recipe.data.root, **recipe.data.args)
    if recipe.data.train_samples:
        splits = data.fewer(splits, recipe.data.train_samples)
    if recipe.data.shift or recipe.data.flip:
        splits = data.augmented(splits, recipe.data.shift, recipe.data.flip)
    shape = [1, *splits.validation[0][0].shape]
    return Task(
        model,
        splits.train,
        splits.validation,
        splits.test,
        loss=nn.CrossEntropyLoss(label_smoothing=recipe.train.label_smoothing),
        name=recipe.name,
        reference=recipe.model,
        arguments=_without_weights(recipe),
        metadata=_described(shape, splits.normalization or {}),
        classes=splits.classes,
        labelled=splits.labelled,
    )


def _without_weights(recipe: Recipe) -> dict[str, Any]:
    """Return how to build the architecture: a packed file has weights of its own."""
    known = is_known(recipe.model)
    return {
        key: value
        for key, value in recipe.model_args.items()
        if not (known and fetches_weights(key))
    }


def _described(shape: Sequence[int], normalization: Mapping[str, Any]) -> dict[str, str]:
    """Say what the network takes, to seven digits as float32 has them: a packed file notes it."""
    numbers = {
        key: ",".join(f"{value:.7g}" for value in values) for key, values in normalization.items()
    }
    return {"input": "x".join(map(str, shape)), **numbers}


def _plan(task: Task, recipe: Recipe, number: int) -> Plan:
    stage = recipe.stages[number]
    try:
        return build_plan(
            task.model,
            stage.target,
            scope=stage.scope,
            layers=stage.layers,
            metric=stage.metric,
            path_aware=task.example_input if stage.path_aware else None,
            round_to=recipe.round_to,
        )
    except RecipeError as error:
        raise RecipeError(f"stages[{number}].{error}") from error


def label(task: Task, dense: nn.Module) -> None:
    """Let data without labels have those that the dense network gives them."""
    seen: dict[int, InMemory] = {}
    for split in ("train", "validation", "test"):
        samples = getattr(task, split)
        if id(samples) not in seen:
            found, _ = outputs(dense, samples)
            seen[id(samples)] = InMemory(samples.inputs, found.argmax(dim=1))
        setattr(task, split, seen[id(samples)])


def _method(task: Task, stage: Stage, plan: Plan) -> Method:
    kind = METHODS[stage.method]
    budget = stage.budget if kind.meets else None
    return kind(plan, _seen(task, stage), budget, **stage.options.model_dump())


def _segments(task: Task, recipe: Recipe, plans: Sequence[Plan]) -> list[Segment]:
    """Return dense training, unless trained weights are given, and every stage's phases."""
    segments = [] if recipe.weights else [_dense_segment(recipe)]
    for number, (stage, plan) in enumerate(zip(recipe.stages, plans, strict=True)):
        method = _method(task, stage, plan)
        phases = method.phases()
        segments += [
            Segment(phase, number, method, opens=at == 0, closes=at == len(phases) - 1)
            for at, phase in enumerate(phases)
        ]
    trained = next((each.phase for each in segments if each.phase.epochs), None)
    if trained and not task.labelled:
        raise RecipeError(
            f"data: '{recipe.data.name}' has no labels, so '{trained.name}' cannot train.\n"
            "Remedy: give weights: FILE, or train: {epochs: 0} for a model that comes trained,\n"
            "and stages of method: post_training without retrain_epochs."
        )
    return segments


def _seen(task: Task, stage: Stage) -> Tensor:
    """Return the inputs that a method looks at: one, or as many training inputs as it asks for."""
    samples: int | None = getattr(stage.options, "samples", None)
    if samples is None:
        return task.example_input
    return data.inputs(task.train, samples)


def _dense_segment(recipe: Recipe) -> Segment:
    return Segment(Phase("train", recipe.train.epochs))
