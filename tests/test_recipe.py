"""Recipes: defaults, overrides, round trips, and what a broken one says."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from secateur import cli
from secateur.documents import parse_yaml
from secateur.errors import RecipeError
from secateur.methods import METHODS
from secateur.plan import build_plan
from secateur.recipe import Recipe, load_recipe
from secateur.recipe.stage import Stage
from secateur.reference import build, fetches_weights
from secateur.sets import Block, Column, Filter, Levels, Unstructured
from secateur.zoo import lenet5

FIVE_LINES = """\
model: secateur.zoo:lenet5
data: digits
stages:
  - method: admm
    density: 0.05
"""


def good() -> dict:
    return yaml.safe_load(FIVE_LINES)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "five.yaml"
    path.write_text(FIVE_LINES)
    return path


def test_five_lines_are_enough(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.name == "five"
    assert (recipe.train.epochs, recipe.train.lr, recipe.train.optimizer) == (10, 1e-3, "adam")
    assert recipe.data.name == "digits"
    assert recipe.export.onnx
    assert recipe.weights is None
    (stage,) = recipe.stages
    assert (stage.method, stage.scope, stage.layers) == ("admm", "global", {})
    assert stage.target == Unstructured(density=0.05)


def test_density_defaults_to_a_tenth_and_a_map_takes_its_name_from_the_model() -> None:
    recipe = load_recipe({**good(), "stages": [{"method": "admm"}]})
    assert recipe.name == "lenet5"
    assert recipe.stages[0].target == Unstructured(density=0.1)


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"keep": 7}, Unstructured(keep=7)),
        ({"bits": 3}, Unstructured(density=0.1) & Levels(3)),
        (
            {"set": ["levels", "unstructured"], "keep": 9, "bits": 2},
            Unstructured(keep=9) & Levels(2),
        ),
        ({"set": "levels", "bits": 4, "zero": True}, Levels(4, zero=True)),
        ({"bits": 3, "spacing": "power_of_two", "keep": 2},
         Unstructured(keep=2) & Levels(3, spacing="power_of_two")),
        ({"set": ["block", "levels"], "rows": 2, "columns": 4, "keep": 3, "bits": 1},
         Block(2, 4, keep=3) & Levels(1)),
        ({"set": ["column", "filter"]}, Column(density=0.1) & Filter(density=0.1)),
        ({"set": {"column": {"density": 0.2}, "filter": {"keep": 3}, "levels": {"bits": 2}}},
         Column(density=0.2) & Filter(keep=3) & Levels(2)),
        ({"set": {"levels": {"bits": 2}, "filter": {"keep": 3}, "column": None}},
         Filter(keep=3) & Column(density=0.1) & Levels(2)),
    ],
)  # fmt: skip
def test_options_reach_their_sets(options: dict, target: object) -> None:
    recipe = load_recipe({**good(), "stages": [{"method": "admm", **options}]})
    assert recipe.stages[0].target == target


def test_options_reach_the_method_and_the_layers() -> None:
    layers = {"conv1": "dense", "fc*": {"keep": 40}, "Conv2d": {"bits": 5}}
    stage = {"method": "admm", "rho": 0.01, "bits": 3, "scope": "layer", "layers": layers}
    parsed = load_recipe({**good(), "stages": [stage]}).stages[0]
    assert parsed.options.rho == 0.01
    assert parsed.layers == layers
    assert parsed.scope == "layer"


def test_overrides_are_yaml_with_dotted_keys_and_positions(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        ["train.epochs=3", "train.lr=1e-2", "stages.0.density=0.2", "stages[0].bits=4",
         "name=other", "data={name: mnist, root: /x}", "export.onnx=false"],
    )  # fmt: skip
    assert (recipe.train.epochs, recipe.train.lr, recipe.name) == (3, 0.01, "other")
    assert recipe.stages[0].target == Unstructured(density=0.2) & Levels(4)
    assert (recipe.data.name, recipe.data.root, recipe.export.onnx) == ("mnist", "/x", False)


@given(st.floats(1e-12, 1e12))
def test_every_way_to_write_a_float_is_a_number(number: float) -> None:
    for text in (repr(number), f"{number:e}", f"{number:.3g}"):
        assert load_recipe(good(), [f"train.lr={text}"]).train.lr == float(text)


@pytest.mark.parametrize(
    "stage",
    [
        {"method": "admm"},
        {"method": "admm", "set": "levels", "bits": 2, "zero": True},
        {"method": "admm", "set": ["column", "filter", "levels"], "bits": 3},
        {
            "method": "admm",
            "set": {"filter": {"density": 0.5}, "column": {"keep": 7}, "levels": {"bits": 3}},
            "metric": "batchnorm",
            "layers": {"conv1": {"column": {"density": 0.5}, "bits": 2}, "fc*": "dense"},
        },
        {"method": "admm", "set": {"block": {"rows": 2, "columns": 4, "density": 0.3}}},
        {"method": "admm", "keep": 5, "bits": 2, "steps": [0.5, 1.0], "layers": {"fc1": "dense"}},
    ],
)
def test_resolved_yaml_loads_as_the_same_recipe(stage: dict, tmp_path: Path) -> None:
    recipe = load_recipe(
        {**good(), "stages": [stage, {"method": "admm", "set": "levels", "bits": 1}]}
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    assert load_recipe(recipe) == recipe
    assert load_recipe(recipe, ["train.seed=7"]).train.seed == 7


def test_exceptions_say_which_of_two_patterns_they_change() -> None:
    sets = {"column": {"density": 0.2}, "filter": {"density": 0.5}, "levels": {"bits": 3}}
    layers = {"conv1": {"filter": {"keep": 4}, "bits": 2}, "fc1": {"column": {"density": 0.05}}}
    stage = {"method": "admm", "set": sets, "layers": layers}
    (parsed,) = load_recipe({**good(), "stages": [stage]}).stages
    assert parsed.layers == {
        "conv1": {"filter": {"keep": 4}, "levels": {"bits": 2}},
        "fc1": {"column": {"density": 0.05}},
    }
    plan = build_plan(lenet5(), parsed.target, layers=parsed.layers)
    found = {row.layer: row.set for row in plan.rows}
    assert found["conv1"] == Column(density=0.2) & Filter(keep=4) & Levels(2)
    assert found["fc1"] == Column(density=0.05) & Filter(density=0.5) & Levels(3)
    assert found["fc2"] == parsed.target


def test_a_map_of_sets_can_be_overridden_key_by_key(recipe_file: Path) -> None:
    settings = ["stages.0={method: admm, set: {column: {density: 0.2}, filter: {density: 0.5}}}"]
    recipe = load_recipe(recipe_file, [*settings, "stages.0.set.filter.density=0.4"])
    assert recipe.stages[0].target == Column(density=0.2) & Filter(density=0.4)


IMAGES = {"cifar10": (3, 32, 32), "imagenet": (3, 64, 64)}
SHIPPED = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))
BASELINES = [path for path in SHIPPED if path.stem.endswith("-gmp")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_fit_their_models(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    arguments = {k: v for k, v in recipe.model_args.items() if not fetches_weights(k)}
    model = build(recipe.model, arguments)
    image = torch.zeros(1, *IMAGES.get(recipe.data.name, (1, 28, 28)))
    for stage in recipe.stages:
        plan = build_plan(
            model, stage.target, scope=stage.scope, layers=stage.layers, metric=stage.metric
        )
        assert plan.compressed
        kind = METHODS[stage.method]
        budget = stage.budget if kind.meets else None
        method = kind(plan, image, budget, **stage.options.model_dump())
        method.attach(copy.deepcopy(model))


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_the_baseline_gets_the_same_training(path: Path) -> None:
    baseline = load_recipe(path)
    named = [path.with_name(path.name.replace("-gmp", end)) for end in ("-admm", "")]
    other = load_recipe(next(each for each in named if each.exists()))
    assert [epochs(stage) for stage in baseline.stages] == [epochs(s) for s in other.stages]
    assert shared(baseline, other) == shared(other, baseline)


def shared(recipe: Recipe, other: Recipe) -> dict[str, Any]:
    """Return all that a recipe says but what only its methods know, and how epochs are divided."""
    stages = [
        {
            key: value
            for key, value in mine.to_dict().items()
            if key in theirs.to_dict() and key not in ("method", "epochs", "retrain_epochs")
        }
        for mine, theirs in zip(recipe.stages, other.stages, strict=True)
    ]
    return {**recipe.to_dict(), "name": None, "stages": stages}


def epochs(stage: Stage) -> tuple[int, int]:
    """Return the epochs of a stage's training into its sets, and of its retraining."""
    phases = METHODS[stage.method](stage.target, **stage.options.model_dump()).phases()
    split = [sum(p.epochs for p in phases if (p.name == "retrain") == late) for late in (0, 1)]
    return split[0], split[1]


STAGE = "stages.0."
MAP = "stages.0={method: admm, set: {column: {density: 0.2}, filter: {density: 0.5}}"
BROKEN = [
    # what --set changes in the good recipe, and the words the message must hold
    ("train.epocs=3", "train.epocs", "Did you mean 'epochs'?"),
    ("trian={epochs: 3}", "trian", "Did you mean 'train'?"),
    ("train.epochs=ten", "train.epochs", "'ten'", "whole number"),
    ("train.epochs=-1", "train.epochs", "-1", "greater than or equal to 0"),
    ("train.epochs=2.5", "train.epochs", "2.5", "whole number"),
    ("train.lr=-1", "train.lr", "-1", "greater than 0", "0.001 by default"),
    ("train.lr=.inf", "train.lr", "inf", "finite"),
    ("train.batch_size=true", "train.batch_size", "true"),
    ("train.optimizer=adamm", "train.optimizer", "'adamm'", "Did you mean 'adam"),
    ("train.schedule=cosin", "train.schedule", "'cosin'", "Did you mean 'cosine'?"),
    ("train.seed=-1", "train.seed", "-1"),
    ("train=[1, 2]", "train", "[1, 2]", "a list, but a map belongs here", "epochs"),
    ("train=3", "train", "3", "map"),
    ("model=lenet5", "model", "'lenet5'", "module:callable"),
    ("model=null", "model", "null", "text"),
    ("model_args=[1]", "model_args", "[1]", "map"),
    ("data={nane: digits}", "data.nane", "Did you mean 'name'?"),
    ("data=[digits]", "data", "['digits']", "a map belongs here"),
    ("weights=no/such.safetensors", "weights", "'no/such.safetensors'", "not a file"),
    ("export.onx=true", "export.onx", "Did you mean 'onnx'?"),
    ("export.onnx=1.5", "export.onnx", "1.5", "true or false"),
    ("stages=[]", "stages", "[]", "at least one stage"),
    ("stages={method: admm}", "stages", "{'method': 'admm'}", "list"),
    ("stages=[admm]", "stages[0]", "'admm'", "map"),
    ("stages=[{density: 0.1}]", "stages[0].method", "missing", "admm"),
    (STAGE + "method=adm", "stages[0].method", "'adm'", "Did you mean 'admm'?"),
    (STAGE + "densty=0.1", "stages[0].densty", "Did you mean 'density'?"),
    (STAGE + "density=0", "stages[0].density", "0", "(0, 1]"),
    (STAGE + "density=1.2", "stages[0].density", "1.2", "(0, 1]"),
    (STAGE + "density=lots", "stages[0].density", "'lots'", "number"),
    (STAGE + "keep=3", "stages[0].keep", "3", "give only one"),
    (STAGE + "bits=-2", "stages[0].bits", "-2", "1..8"),
    (STAGE + "bits=true", "stages[0].bits", "true", "number"),
    (STAGE + "zero=true", "stages[0].bits", "missing", "width"),
    ("stages=[{method: admm, bits: 3, zero: 3}]", "stages[0].zero", "3", "true or false"),
    (STAGE + "set=levels", "stages[0].density", "0.05", "Remedy"),
    (STAGE + "set=unstructred", "stages[0].set", "'unstructred'", "Did you mean 'unstructured'?"),
    (STAGE + "set=[]", "stages[0].set", "[]", "unstructured"),
    (STAGE + "set=[levels, levels]", "stages[0].set", "['levels', 'levels']", "one"),
    (STAGE + "set=3", "stages[0].set", "3", "a map of names to options"),
    (STAGE + "set={}", "stages[0].set", "{}", "unstructured"),
    (STAGE + "set=[column, filter]", "stages[0].density", "0.05 could be of column or of filter",
     "column: {density: 0.05}"),
    (STAGE + "set={filter: {keep: 3}}", "stages[0].density", "0.05", "filter: {density: 0.05}"),
    ("stages.0={method: admm, set: {colum: {}}}", "stages[0].set", "Did you mean 'column'?"),
    ("stages.0={method: admm, set: {column: 3}}", "stages[0].set.column", "3", "density, keep"),
    ("stages.0={method: admm, set: {column: {densty: 1}}}", "stages[0].set.column.densty",
     "Did you mean 'density'?"),
    ("stages.0={method: admm, set: {column: {bits: 1}}}", "stages[0].set.column.bits", "unknown"),
    ("stages.0={method: admm, set: {column: {density: 3}}}", "stages[0].set.column.density", "3"),
    ("stages.0={method: admm, set: {column: {density: 1, keep: 2}}}", "stages[0].set.column.keep",
     "give only one"),
    ("stages.0={method: admm, set: {column: {}, levels: {}}}", "stages[0].set.levels.bits",
     "missing"),
    ("stages.0={method: admm, set: {block: {rows: 2}}}", "stages[0].set.block.columns", "missing",
     "GEMM columns in a block"),
    ("stages.0={method: admm, set: block, rows: 0, columns: 2}", "stages[0].rows", "0"),
    (MAP + ", layers: {fc1: {density: 0.1}}}", "stages[0].layers.fc1.density", "column or of"),
    (MAP + ", layers: {fc1: {column: {keep: -1}}}}", "stages[0].layers.fc1.column.keep", "-1"),
    (MAP + ", layers: {fc1: {column: 3}}}", "stages[0].layers.fc1.column", "3", "map"),
    (MAP + ", layers: {fc1: {filter: {kep: 3}}}}", "stages[0].layers.fc1.filter.kep", "'keep'"),
    (MAP + ", layers: {fc1: {kernel: {keep: 3}}}}", "stages[0].layers.fc1.kernel", "unknown key"),
    ("stages.0={method: admm, bits: 3, spacing: log}", "stages[0].spacing", "'log'",
     "uniform, power_of_two"),
    ("stages.0={method: admm, bits: 5, spacing: power_of_two}", "stages[0].bits", "5", "1..4"),
    (STAGE + "metric=batch", "stages[0].metric", "'batch'", "Did you mean 'batchnorm'?"),
    (STAGE + "scope=everywhere", "stages[0].scope", "'everywhere'", "global, layer"),
    (STAGE + "rho=high", "stages[0].rho", "'high'", "number"),
    (STAGE + "steps=[]", "stages[0].steps", "[]"),
    (STAGE + "layers=[conv1]", "stages[0].layers", "['conv1']", "a map belongs here"),
    (STAGE + "layers={conv1: sparse}", "stages[0].layers.conv1", "'sparse'", "'dense'"),
    (STAGE + "layers={conv1: {density: 2}}", "stages[0].layers.conv1.density", "2", "(0, 1]"),
    (STAGE + "layers={fc1: {densit: 1}}", "stages[0].layers.fc1.densit", "Did you mean 'density'?"),
    (STAGE + "layers={fc1: {bits: 3}}", "stages[0].layers.fc1.bits", "3", "Remedy"),
    ("stages.4.density=0.1", "stages.4.density=0.1", "position from 0 to 0"),
    ("model.root=/x", "model.root=/x", "lenet5", "Remedy"),
    ("train.epochs", "'train.epochs'", "key=value"),
    ("train.epochs=[", "train.epochs", "invalid YAML"),
]  # fmt: skip


def check_message(message: str, words: tuple[str, ...]) -> None:
    assert message.count("\n") <= 2, message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(("setting", "words"), [(case[0], case[1:]) for case in BROKEN])
def test_broken_key(setting: str, words: tuple[str, ...], recipe_file: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_file, [setting])
    check_message(str(error.value), words)
    run = CliRunner().invoke(cli.app, ["compress", str(recipe_file), "--set", setting])
    assert run.exit_code == 2
    check_message(run.stderr.strip(), words)


BROKEN_FILES = [
    (b"", "is empty", "model:"),
    (b"# only a comment\n", "is empty"),
    (b"- model: x\n- data: y\n", "is a list", "a recipe is a map"),
    (b"just words\n", "'just words'", "a recipe is a map"),
    (b"model: m:f\n\tdata: digits\n", "line 2", "spaces, never tabs"),
    (b"model: [m\n", "line 2", "invalid YAML"),
    (b"model: a: b\n", "line 1", "invalid YAML"),
    (b"model: m:f\ndata: digits\nmodel: m:g\n", "line 3", "'model' is given twice"),
    (b"model: !!python/object/apply:os.system [ls]\n", "line 1", "could not determine"),
    (b"\x93NUMPY\xff\xfe\x00\x00", "not a text file"),
    (b"model: \x00\x01\n", "invalid YAML"),
    (b"a: &a [*a]\n", "unknown key 'a'"),
    (b"1: 2\n", "unknown key '1'"),
    (b"[" * 5000, "invalid YAML"),
    (b"model: m:f\n", "data: is missing", "and 1 more problem"),
    (b"model: m:f\ndata: digits\nepochs: 3\nseed: 1\n", "unknown key 'epochs'", "2 more problems"),
]


@pytest.mark.parametrize(("content", "words"), [(case[0], case[1:]) for case in BROKEN_FILES])
def test_broken_file(content: bytes, words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    check_message(str(error.value), ("broken.yaml", *words))
    run = CliRunner().invoke(cli.app, ["compress", str(path)])
    assert run.exit_code == 2
    check_message(run.stderr.strip(), ("broken.yaml", *words))


def test_path_that_is_no_readable_file(tmp_path: Path, recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=r"Did you mean 'five.yaml'"):
        load_recipe(tmp_path / "fiv.yaml")
    with pytest.raises(RecipeError, match=r"Recipes in .*five.yaml"):
        load_recipe(tmp_path / "something-else.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(tmp_path / "no" / "such.yaml")
    if os.geteuid() != 0:  # root may read everything
        recipe_file.chmod(0)
        with pytest.raises(RecipeError, match="cannot be read"):
            load_recipe(recipe_file)


def test_the_program_itself_exits_2_without_a_traceback(recipe_file: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from secateur.cli import main; main()",
         "compress", str(recipe_file), "--set", "stages.0.bits=99"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("secateur: ")
    assert "stages[0].bits: 99" in run.stderr
    assert run.stderr.count("\n") <= 3


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "stages.0.layers={convv1: dense}",
            ("stages[0].layers", "convv1", "Did you mean 'conv1'?"),
        ),
        (
            "stages.0.metric=batchnorm",
            ("stages[0].metric", "'batchnorm'", "directly followed by a BatchNorm", "Remedy"),
        ),
        ("data=mnist", ("data", "'mnist' is not here", "secateur data get mnist")),
        ("data=mnits", ("data", "'mnits'", "Did you mean 'mnist'?")),
        ("model=secateur.zoo:lenet6", ("model", "lenet6", "Did you mean 'lenet5'?")),
        ("model=secateur.zooo:lenet5", ("model", "secateur.zooo", "Check the spelling")),
    ],
)
def test_what_only_the_run_can_find(
    setting: str, words: tuple[str, ...], recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_DATA", str(recipe_file.parent))
    out = str(recipe_file.parent / "out")
    run = CliRunner().invoke(
        cli.app, ["compress", str(recipe_file), "--out", out, "--set", setting]
    )
    assert run.exit_code == 2, run.output
    check_message(run.stderr.strip(), words)


def test_keys_of_a_data_set_that_is_only_a_name_can_be_set() -> None:
    short = {"model": "a:b", "data": "mnist", "stages": [{"method": "admm"}]}
    recipe = load_recipe(short, ["data.shift=2", "data.train_samples=100"])
    assert (recipe.data.name, recipe.data.shift, recipe.data.train_samples) == ("mnist", 2, 100)
    assert load_recipe(short, ["data=digits"]).data.name == "digits"


def test_yaml_means_what_it_looks_like() -> None:
    text = "{a: 2:4, 2:4: 1e-3, b: -12, c: 0x1f, d: 0, e: 1_000, f: 1.5, g: 12:30:45}"
    assert parse_yaml(text, "text") == {
        "a": "2:4",
        "2:4": 0.001,
        "b": -12,
        "c": 31,
        "d": 0,
        "e": 1000,
        "f": 1.5,
        "g": "12:30:45",
    }
