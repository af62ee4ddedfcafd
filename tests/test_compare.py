"""Comparing recipes: what is fair, fronts and verdicts against known answers, kill and resume."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import secateur as sc
from secateur import cli
from secateur.comparison import crew
from secateur.comparison.fairness import (
    epochs_behind,
    epochs_of,
    require_equal_epochs,
    require_one_task,
)
from secateur.comparison.figures import Entry, Form, Seed, form_of
from secateur.comparison.jobs import plan_jobs
from secateur.comparison.statistics import Statistic, pareto_front
from secateur.comparison.verdict import Modelled, judge
from secateur.cost.platforms import load_platform
from secateur.cost.workload import LayerWork
from secateur.errors import MissingDependencyError, SecateurError
from tiny import digits_task

ray = pytest.importorskip("ray", reason="comparisons not run: no Ray")

USER_CODE = """
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 10))
"""

TASK: dict[str, Any] = {
    "model": "compared_net:net",
    "data": "digits",
    "train": {"epochs": 2, "batch_size": 64, "lr": 5e-3},
    "export": {"onnx": False},
}


def stage(method: str = "gmp", **options: Any) -> dict[str, Any]:
    return {"method": method, "density": 0.2, "epochs": 1, "retrain_epochs": 2, **options}


def recipe(name: str = "one", *stages: dict[str, Any], **more: Any) -> sc.Recipe:
    return sc.load_recipe({**TASK, "name": name, "stages": list(stages) or [stage()], **more})


# --- equal training ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 4, "snap": [0.5, 1], "retrain_epochs": 3},
        {"bits": 4, "steps": [0.5, 1], "edges_last": True},
        {"rho_schedule": "ladder", "epochs": 4},
    ],
)
def test_epochs_are_those_that_a_run_trains(options: dict[str, Any], tmp_path: Path) -> None:
    content = {
        "train": TASK["train"],
        "stages": [stage("admm", **options)],
        "export": {"onnx": False},
    }
    result = sc.compress(digits_task(), content, out=tmp_path)
    loaded = sc.load_recipe({**TASK, **content})
    assert epochs_of(loaded) == len(result.report["history"])


def test_dense_training_counts_unless_it_is_only_beside() -> None:
    scratch = recipe("a", scratch=True)
    taught = recipe("b", stage(distill=0.5), scratch=True)
    assert epochs_of(scratch) == epochs_of(taught) == epochs_behind(taught)
    assert epochs_behind(scratch) == epochs_of(scratch) - TASK["train"]["epochs"]
    assert epochs_behind(recipe("c")) == epochs_of(recipe("c"))


def test_unequal_training_is_refused_with_the_list() -> None:
    require_equal_epochs([recipe("a"), recipe("b", stage("admm"))])
    with pytest.raises(SecateurError, match=r"a 5, longer 9") as caught:
        require_equal_epochs([recipe("a"), recipe("longer", stage(retrain_epochs=6))])
    assert "--allow-unequal" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"data": "mnist"}, "data.name"),
        ({"train": {**TASK["train"], "lr": 0.1}}, "train.lr"),
        ({"model_args": {"classes": 3}}, "model_args"),
    ],
)
def test_another_task_is_refused_by_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(SecateurError, match=key):
        require_one_task([recipe("a"), recipe("b", **change)])


def test_shipped_recipes_can_be_compared() -> None:
    files = sorted((Path(__file__).parents[1] / "recipes" / "compare").glob("*.yaml"))
    recipes = [sc.load_recipe(file) for file in files]
    require_one_task(recipes)
    require_equal_epochs(recipes)
    assert {form_of(each) for each in recipes} == {"non-structured", "structured", "unpruned"}


def test_seed_and_threads_do_not_make_another_task() -> None:
    train = {**TASK["train"], "seed": 7, "threads": 3}
    require_one_task([recipe("a"), recipe("b", train=train)])


def test_recipes_share_the_dense_network_of_each_seed(tmp_path: Path) -> None:
    jobs = plan_jobs([recipe("a"), recipe("b")], [0, 3], tmp_path)
    assert [job.name for job in jobs] == [
        *("dense-seed0", "dense-seed3"),
        *("a-seed0", "b-seed0", "a-seed3", "b-seed3"),
    ]
    for job in jobs[2:]:
        seed = job.recipe.train.seed
        assert job.needs == jobs[0 if seed == 0 else 1]
        assert job.recipe.weights == str(tmp_path / "dense" / f"seed{seed}" / "dense.safetensors")
    assert sum(job.epochs for job in jobs) == 2 * 2 + 4 * 3


@pytest.mark.parametrize(
    ("stages", "form"),
    [
        ([stage()], "non-structured"),
        ([stage("admm", set="filter")], "structured"),
        ([stage("admm", set="filter"), stage("admm")], "non-structured"),
        ([{"method": "admm", "set": "levels", "bits": 1}], "unpruned"),
        ([{"method": "djpq"}], "structured"),
        ([{"method": "djpq", "gates": "none"}], "unpruned"),
    ],
)
def test_form(stages: list[dict[str, Any]], form: Form) -> None:
    assert form_of(recipe("a", *stages)) == form


@pytest.mark.parametrize(
    ("cores", "jobs", "threads"),
    [([2], 2, 1), ([2], 1, 2), ([8], 3, 2), ([8, 8], 1, 8), ([8, 4], 3, 4), ([2], 5, 1)],
)
def test_threads_of_each_job(cores: list[int], jobs: int, threads: int) -> None:
    assert crew.threads_each(cores, jobs) == threads


# --- statistics and fronts -----------------------------------------------------------------------

few = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(few, few), min_size=1, max_size=12))
def test_pareto_front_against_brute_force(points: list[tuple[float, float]]) -> None:
    def better(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    expected = {
        at for at, here in enumerate(points) if not any(better(each, here) for each in points)
    }
    found = pareto_front(points)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [points[at][0] for at in found] == sorted(points[at][0] for at in found)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6))
def test_mean_and_deviation_against_numpy(values: list[float]) -> None:
    found = Statistic.of(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-6)
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    assert found.deviation == pytest.approx(spread, abs=1e-6)
    assert found.values == tuple(values)


# --- verdicts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """A platform whose answers are given, by the seconds that a seed's report says."""

    gain: dict[str, float]
    zeros: float = 1.0
    break_even: float | None = 0.94
    name: str = "here"
    about: str = "as told"

    def speedup(self, form: str, seed: Seed) -> float:
        return self.gain[form] * seed.report["factor"]

    def by_zeros(self, seed: Seed) -> float:
        return self.zeros * seed.report["factor"]

    def needed(self, seed: Seed) -> float | None:
        return self.break_even

    def with_levels(self, seed: Seed) -> float | None:
        return None


def layer(weights: int, nonzeros: int, **more: Any) -> LayerWork:
    facts = {"macs": 1000 * weights, "weight_bits": 16, "activation_bits": 16, "index_bits": 0}
    return LayerWork(
        **{"name": "fc", "weights": weights, "nonzeros": nonzeros, "inputs": 1, "outputs": 1,
           "pattern": "dense" if weights == nonzeros else "unstructured", **facts, **more}
    )  # fmt: skip


def entry(name: str, form: Form, loss: float, network: LayerWork, factors: list[float]) -> Entry:
    dense = (layer(1000, 1000),)
    seeds = {
        number: Seed({"factor": factor}, dense, (network,)) for number, factor in enumerate(factors)
    }
    same = Statistic.of(0.9 for _ in factors)
    return Entry(name, form, same, Statistic.of(loss for _ in factors), {}, seeds)


ANYWHERE = entry("admm", "non-structured", 0.002, layer(1000, 30), [0.95, 1.05])
GROUPS = entry("rows", "structured", 0.004, layer(240, 240), [0.95, 1.05])


def test_verdict_has_the_numbers_that_carry_it() -> None:
    platform = Told({"non-structured": 1.3, "structured": 4.1}, zeros=1.3)
    verdict = judge(platform, [ANYWHERE, GROUPS], 0.005)
    assert verdict.text == (
        "Non-structured pruning needs 94.0 % sparsity to break even; at equal accuracy 'admm' "
        "(loses 0.20 points) reaches 97.0 %: it pays 1.30 ± 0.09x. Structured pruning, 'rows' "
        "(loses 0.40 points, 76.0 % sparsity), pays 4.10 ± 0.29x. The faster one is structured."
    )
    assert verdict.break_even == 0.94
    assert verdict.structured is not None
    assert verdict.structured.speedup.deviation == pytest.approx(4.1 * 0.1 / math.sqrt(2))


def test_verdict_says_what_comes_of_emptied_channels() -> None:
    platform = Told({"non-structured": 2.0, "structured": 1.0}, zeros=1.0, break_even=None)
    text = judge(platform, [ANYWHERE, GROUPS], 0.005).text
    assert "gain nothing by themselves, however many" in text
    assert "pays 2.00 ± 0.14x, 1.00 ± 0.07x by its zeros and the rest by channels" in text
    assert "does not pay: 1.00 ± 0.07x" in text
    assert "The faster one is non-structured." in text


def test_verdict_at_another_accuracy_is_none() -> None:
    platform = Told({"non-structured": 1.3, "structured": 0.9})
    verdict = judge(platform, [ANYWHERE, GROUPS], 0.003)
    assert verdict.structured is None
    assert "No structured recipe is as accurate as dense: the nearest, 'rows', loses 0.40" in (
        verdict.text
    )
    alone = judge(platform, [GROUPS], 0.005)
    assert alone.non_structured is None
    assert alone.break_even is None
    assert "No non-structured recipe was compared." in alone.text
    assert "faster" not in alone.text
    slow = Told({"non-structured": 0.8, "structured": 0.9})
    assert "Neither pays." in judge(slow, [ANYWHERE, GROUPS], 0.005).text


def test_modelled_platform_against_the_roofline_by_hand() -> None:
    indexed = load_platform("weight-stationary-indexed")
    efficiency = indexed.skips["unstructured"].efficiency
    cut = Seed({}, (layer(1000, 1000),), (layer(500, 30),))
    platform = Modelled(indexed)
    assert platform.by_zeros(cut) == pytest.approx(efficiency / 0.03)
    assert platform.speedup("non-structured", cut) == pytest.approx(2 * efficiency / 0.06)
    assert platform.needed(cut) == pytest.approx(1 - efficiency, abs=2e-3)


# --- the command ---------------------------------------------------------------------------------


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, ["compare", *arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with recipes, one of which fails only while it trains, and their network."""
    (tmp_path / "compared_net.py").write_text(USER_CODE)
    stages = {
        "gmp": stage("gmp"),
        "admm": stage("admm", bits=4),
        "bad": stage("admm", lr=1e30),
        "long": stage("gmp", retrain_epochs=40),
    }
    for name, each in stages.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**TASK, "stages": [each]}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gmp.yaml"], "recipes: 1 given"),
        (["gmp.yaml", "gmp.yaml"], "are called 'gmp'"),
        (["gmp.yaml", "long.yaml"], "gmp 5, long 43"),
        (["gmp.yaml", "admm.yaml", "--seeds", "0;1"], "--seeds: '0;1'"),
        (["gmp.yaml", "admm.yaml", "--seeds", "1,1"], "seeds: 1, 1"),
        (["gmp.yaml", "admm.yaml", "--jobs", "0"], "jobs: 0"),
        (["gmp.yaml", "admm.yaml", "--margin", "-1"], "margin: -1"),
        (["gmp.yaml", "admm.yaml", "--platform", "edge-cpo"], "Did you mean 'edge-cpu'"),
        (["gmp.yaml", "adm.yaml"], "Did you mean 'admm.yaml'"),
        (["gmp.yaml", "admm.yaml", "--set", "name=dense"], "called 'dense'"),
    ],
)
def test_errors_before_anything_trains(folder: Path, arguments: list[str], words: str) -> None:
    result = run(*arguments, "--out", "out", code=2)
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 3
    assert not (folder / "out").exists()


def test_missing_ray_names_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert (
        'pip install "secateur[compare]"'
        in run("gmp.yaml", "admm.yaml", "--out", "out", code=2).stderr
    )
    with pytest.raises(MissingDependencyError):
        crew.require()


def test_folder_of_another_recipe_is_refused(folder: Path) -> None:
    (folder / "out" / "runs" / "gmp-seed0").mkdir(parents=True)
    (folder / "out" / "runs" / "gmp-seed0" / "recipe.yaml").write_text("model: other\n")
    result = run("gmp.yaml", "admm.yaml", "--out", "out", code=2)
    assert "gmp-seed0 was made by another recipe" in result.stderr


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A session of Ray that is there already, as on a cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # or nothing moves beside busy programs
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


def test_task_from_python(cluster: None, tmp_path: Path) -> None:
    content = {key: TASK[key] for key in ("train", "export")}
    recipes = [
        {**content, "name": "few", "stages": [stage(density=0.1)]},
        {**content, "name": "rows", "stages": [stage("admm", set="filter", layers={"3": "dense"})]},
    ]
    task = digits_task()
    before = [weight.clone() for weight in task.model.parameters()]
    done = sc.compare(task, recipes, out=tmp_path, seeds=(4, 5), margin=100, measure=0.1)
    assert done.failed == {}
    assert done.report["verdicts"][0]["platform"] == "here"
    few, rows = done.report["recipes"]
    assert few["seeds"] == [4, 5]
    assert few["costs"]["weights"]["mean"] <= round(0.1 * (784 * 24 + 240))
    assert rows["costs"]["macs"]["mean"] == 5 * (784 + 10)
    assert all(map(torch.equal, before, task.model.parameters()))
    measured = (tmp_path / "breakeven.json").stat().st_mtime_ns
    sc.compare(task, recipes, out=tmp_path, seeds=(4, 5), margin=100, measure=0.1)
    assert (tmp_path / "breakeven.json").stat().st_mtime_ns == measured


def test_killed_in_the_middle_it_goes_on_without_redoing(cluster: None, folder: Path) -> None:
    """One run finished, one under way, then kill -9; a run that fails does not end the others."""
    arguments = ["gmp.yaml", "long.yaml", "bad.yaml", "--out", "out", "--seeds", "0"]
    arguments += ["--jobs", "1", "--allow-unequal", "--measure", "0", "--margin", "100"]
    victim = subprocess.Popen(
        [sys.executable, "-m", "secateur", "compare", *arguments], stdout=subprocess.DEVNULL
    )
    runs = folder / "out" / "runs"
    state = runs / "long-seed0" / "checkpoint" / "state.pt"
    deadline = time.monotonic() + 300
    while not state.exists() and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.kill()
    victim.wait()
    finished = [folder / "out" / "dense" / "seed0" / "dense.safetensors"]
    finished.append(runs / "gmp-seed0" / "report.json")
    before = [path.stat().st_mtime_ns for path in finished]
    assert not (runs / "long-seed0" / "report.json").exists()

    result = run(*arguments, code=1)
    assert [path.stat().st_mtime_ns for path in finished] == before
    trained = re.findall(r"retrain +(\d+)/40 ", (runs / "long-seed0.log").read_text())
    assert [int(epoch) for epoch in dict.fromkeys(trained)] == list(range(1, 41))
    assert len(trained) <= 41  # one that the kill left without a checkpoint may be trained again
    assert "bad-seed0 failed: " in result.stdout
    report = json.loads((folder / "out" / "compare.json").read_text())
    assert list(report["failed"]) == ["bad-seed0"]
    assert [each["name"] for each in report["recipes"]] == ["gmp", "long"]
    assert not report["equal_epochs"]
    assert_figures_are_those_of_the_runs(report, runs)

    reports = {path: path.stat().st_mtime_ns for path in runs.glob("*/report.json")}
    run(*[each for each in arguments if each != "bad.yaml"])
    assert {path: path.stat().st_mtime_ns for path in reports} == reports
    assert json.loads((folder / "out" / "compare.json").read_text())["failed"] == {}


def assert_figures_are_those_of_the_runs(report: dict[str, Any], runs: Path) -> None:
    for each in report["recipes"]:
        own = json.loads((runs / f"{each['name']}-seed0" / "report.json").read_text())
        assert each["accuracy"]["values"] == [own["accuracy"]["compressed"]]
        assert each["costs"]["file"]["mean"] == own["storage"]["file"]["packed"]
        size = (runs / f"{each['name']}-seed0" / "model.secateur").stat().st_size
        assert each["costs"]["file"]["mean"] == size
        assert each["costs"]["weights"]["mean"] == own["storage"]["weights"]["kept"]
        assert report["dense"]["accuracy"]["values"] == [own["accuracy"]["dense"]]
    dense = report["dense"]["costs"]
    assert dense["weights"]["mean"] == 784 * 24 + 24 * 10
    assert all(cost["mean"] > 0 for cost in dense.values())
    assert {verdict["platform"] for verdict in report["verdicts"]} == {
        name.removeprefix("time on ") for name in dense if name.startswith("time on ")
    }
