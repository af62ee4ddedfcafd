"""The recipe: every key there is, with its default and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from secateur.problems import Problems, Section, show
from secateur.recipe.stage import Stage, parse_stage

LAST = ("scratch", "floor", "compact", "round_to", "export")
"""Keys that are written after the stages."""


class DataChoice(Section):
    """Which data set, and where it is."""

    name: str = Field(min_length=1, description="digits, mnist, module:callable or a folder")
    root: str | None = Field(None, description="folder where 'secateur data get' put named sets")
    args: dict[str, Any] = Field({}, description="arguments for a module:callable or a folder")
    train_samples: int | None = Field(None, ge=1, description="train on the first so many only")
    shift: int = Field(0, ge=0, description="pixels that training images are moved at most")
    flip: bool = Field(False, description="mirror half of the training images left to right")


class Train(Section):
    """How the dense network is trained, and what stages start from."""

    epochs: int = Field(
        10, ge=0, description="epochs of dense training; 0 for a model that comes trained"
    )
    batch_size: int = Field(128, ge=1, description="samples per step")
    lr: float = Field(1e-3, gt=0, description="learning rate at the start")
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd")
    weight_decay: float = Field(0.0, ge=0, description="L2 (adam, sgd) or decoupled (adamw) decay")
    schedule: Literal["cosine", "constant"] = "cosine"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share spread over all classes")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of weights, shuffling and all else")
    threads: int | None = Field(None, ge=1, description="CPU threads; by default torch decides")
    workers: int = Field(0, ge=0, description="processes that read and vary training images")


class Export(Section):
    """What is written beside the packed file."""

    onnx: bool = Field(True, description="whether to write model.onnx")
    batch: int | None = Field(
        None,
        ge=1,
        description="samples of an inference, if linear layers may round what they read",
    )


class Head(Section):
    """The top of a recipe, while its inner maps are still unread."""

    name: str = Field(min_length=1, description="name of the run in reports")
    model: str = Field(
        pattern=r"^[\w.]+:\w+$", description="network as module:callable, e.g. secateur.zoo:lenet5"
    )
    model_args: dict[str, Any] = Field({}, description="keyword arguments of the model's callable")
    weights: str | None = Field(None, description="file of trained dense weights")
    data: Any = Field(description="data set, e.g. digits")
    train: Any = Field({})
    stages: Any = Field(description="list of stages, e.g. [{method: admm, density: 0.1}]")
    scratch: bool = Field(False, description="start the stages from the untrained network")
    floor: float | None = Field(None, gt=0, lt=1, description="lowest validation accuracy")
    compact: bool = Field(True, description="remove channels that have become useless, by stage")
    round_to: int = Field(1, ge=1, le=256, description="what widths become multiples of; 1 for any")
    export: Any = Field({})


class Recipe(Head):
    """What to compress, with which data and by which stages.

    Attributes:
        name: what reports call the run.
        model: ``module:callable`` that builds the network.
        model_args: keyword arguments of that callable.
        weights: trained dense weights (.safetensors or a packed file); trained here when None.
        data: the data set.
        train: how the dense network is trained.
        stages: the methods to run, in order; at least one.
        scratch: whether the first stage starts from the untrained network. The dense one is trained
            all the same, to compare with and to distil from.
        floor: lowest validation accuracy: the first stage that ends below it is undone, and the run
            ends with the network of the stage before.
        compact: whether channels that nothing depends on are removed after every stage.
        round_to: widths become multiples of this, 8 or 4 where runtimes work in vectors: stages
            keep so many filters or channels, and some useless ones stay where others do not fit.
        export: what is written beside the packed file.
    """

    data: DataChoice
    train: Train
    stages: tuple[Stage, ...]
    export: Export

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, with every default written out."""
        content = self.model_dump(mode="json", exclude={"stages", *LAST})
        content["stages"] = [stage.to_dict() for stage in self.stages]
        content |= {key: getattr(self, key) for key in LAST[:-1]}
        return {**content, "export": self.export.model_dump()}

    def to_yaml(self) -> str:
        """Return YAML that loads as this same recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def spelled_out(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe whose data set, if it is only a name, is a map with that name."""
    short = isinstance(content.get("data"), str)
    return {**content, "data": {"name": content["data"]}} if short else dict(content)


def parse_recipe(content: dict[str, Any], source: str, name: str | None) -> Recipe:
    """Validate a mapping.

    Args:
        content: the recipe; ``data`` may be just the name of the data set.
        source: what error messages call it.
        name: the recipe's name when it states none; by default the model's.

    Raises:
        RecipeError: anything is unknown, missing, or out of range.
    """
    problems = Problems(source)
    values = spelled_out(content)
    values.setdefault("name", name or str(values.get("model", "recipe")).rpartition(":")[2])
    head = problems.validate(Head, values, "")
    data = problems.validate(DataChoice, values["data"], "data") if "data" in values else None
    train = problems.validate(Train, values.get("train", {}), "train")
    stages = _parse_stages(values["stages"], problems) if "stages" in values else ()
    export = problems.validate(Export, values.get("export", {}), "export")
    if head and head.weights is not None and not Path(head.weights).is_file():
        problems.add("weights", f"{show(head.weights)} is not a file; remove it to train first.")
    problems.raise_if_any()
    assert head is not None
    inner = {"data": data, "train": train, "stages": stages, "export": export}
    return Recipe.model_validate({**head.model_dump(), **inner})


def _parse_stages(raw: Any, problems: Problems) -> tuple[Stage | None, ...]:
    if not isinstance(raw, list | tuple) or not raw:
        problems.add(
            "stages",
            f"{show(raw)} should be a list with at least one stage, such as:\n"
            "[{method: admm, density: 0.1}]",
        )
        return ()
    return tuple(parse_stage(each, f"stages[{at}]", problems) for at, each in enumerate(raw))
