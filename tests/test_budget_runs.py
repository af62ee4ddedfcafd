"""Budgets in recipes: distributed when a stage begins, the same after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import secateur as sc
from secateur.course import Course, over, samples_over, unspent
from secateur.engine.trainer import Trainer
from secateur.errors import RecipeError
from tiny import digits_network, digits_task

TRAIN = {"epochs": 2, "batch_size": 64, "lr": 5e-3, "threads": 1}
LIGHT = {"method": "admm", "epochs": 1, "retrain_epochs": 2}


def recipe(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"train": TRAIN, "stages": [{**LIGHT, **stage} for stage in stages]}


def test_a_file_budget_by_sensitivity_is_met(tmp_path: Path) -> None:
    stage = {
        "budget": {"file": "1.6kB"},
        "bits": 4,
        "allocation": {"by": "sensitivity", "bits": [2, 3, 4], "samples": 200},
    }
    report = sc.compress(digits_task(), recipe(stage), out=tmp_path).report
    assert 0.8 * 1600 < report["storage"]["file"]["packed"] <= 1600
    assert report["accuracy"]["compressed"] > 0.7


def test_the_report_says_if_the_file_is_over_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Course, "_overhead", lambda self: -400)  # as if training had added it
    report = sc.compress(
        digits_task(), recipe({"budget": {"file": 1500}, "bits": 4}), out=tmp_path
    ).report
    packed = report["storage"]["file"]["packed"]
    assert packed > 1500
    (note,) = [each for each in report["notes"] if "budget" in each]
    assert f"{packed:,} bytes" in note
    assert "1,500" in note
    assert f"{{file: {1500 * 1500 // packed}}}" in note


def test_only_the_last_budget_of_the_file_counts() -> None:
    def spent(**budget: float) -> dict[str, Any]:
        return {"budget": budget, "by": "magnitude", "limit": next(iter(budget.values()))}

    stages = [spent(file=900), spent(file=1000), spent(weights=10)]
    trained = {"budget": {"file": 10}, "by": "training", "spent": {"file": 0.9}}
    assert over(1000, [*stages, trained]) == over(9999, [spent(weights=10)]) == over(9999, []) == []
    (note,) = over(1250, stages)
    assert "1,250 bytes" in note
    assert "{file: 800}" in note


def test_a_deep_network_is_measured_on_fewer_samples() -> None:
    assert [samples_over(layers) for layers in (0, 10, 53, 1000)] == [2000, 2000, 377, 250]


def test_a_budget_that_is_met_in_training_is_said_to_have_room() -> None:
    def trained(**shares: float) -> dict[str, Any]:
        return {"budget": dict.fromkeys(shares, 1), "by": "training", "spent": shares}

    by_size = {"budget": {"file": 9}, "by": "magnitude", "limit": 9}
    assert unspent([trained(bops=0.5, file=0.971), by_size]) == []
    (note,) = unspent([trained(bops=0.5, file=0.25)])
    assert note.startswith("budget.bops: 50.0% of it")


def test_a_run_says_that_nothing_was_left_to_spend_a_budget_on(tmp_path: Path) -> None:
    stage = {"method": "djpq", "gates": "none", "bits": 4, "budget": {"bops": "2x"}}
    stage |= {"epochs": 1, "tune_epochs": 1}
    found = sc.compress(digits_task(), {"train": TRAIN, "stages": [stage]}, out=tmp_path).report
    # 4-bit weights and at most 16-bit inputs are 16 times fewer bit operations than 32 x 32
    (allocation,) = found["allocations"]
    (note,) = [each for each in found["notes"] if each.startswith("budget.bops")]
    assert f"{allocation['spent']['bops']:.1%} of it is used" in note


def test_two_budgets_with_a_cut_between_and_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = recipe(
        {"set": "filter", "budget": {"weights": "4x"}},
        {"budget": {"weights": "20x"}, "path_aware": True},
    )
    whole = sc.compress(digits_task(), stages, out=tmp_path / "whole")
    assert whole.model[1].weight.shape[0] < 24
    dense = sum(layer.weight.numel() for layer in digits_network() if hasattr(layer, "weight"))
    kept = whole.report["storage"]["weights"]["kept"]
    assert 0.9 * dense / 20 < kept <= dense / 20
    assert [each["dense"] for each in whole.report["allocations"]] == [dense, dense]
    save, saved = Trainer._save, 0

    def stopping(self: Trainer, *arguments: Any) -> None:
        nonlocal saved
        save(self, *arguments)
        saved += 1
        if saved == 6:  # in the first epoch of the second stage
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", stopping)
        with pytest.raises(KeyboardInterrupt):
            sc.compress(digits_task(), stages, out=tmp_path / "stopped")
    sc.compress(digits_task(), stages, out=tmp_path / "stopped", resume=True)
    files = [(tmp_path / each / "model.secateur").read_bytes() for each in ("whole", "stopped")]
    assert files[0] == files[1]


def test_what_a_layer_is_told_by_name_stays(tmp_path: Path) -> None:
    stages = recipe({"budget": {"weights": "10x"}, "layers": {"3": {"keep": 200}}})
    report = sc.compress(digits_task(), stages, out=tmp_path).report
    assert {entry["name"]: entry["kept"] for entry in report["layers"]}["3"] in range(150, 201)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"budget": {"weights": "10x"}, "density": 0.1}, r"stages\[0\]\.budget: .* beside density"),
        ({"budget": {"weigths": "10x"}}, r"stages\[0\]\.budget: there is no kind 'weigths'"),
        ({"budget": {"file": "1.5 lb"}}, r"stages\[0\]\.budget\.file: '1\.5 lb' has the unknown"),
        ({"budget": 7}, r"stages\[0\]\.budget: 7 is not a map"),
        ({"allocation": {"by": "magnitude"}}, r"stages\[0\]\.allocation: there is no budget"),
        (
            {"budget": {"weights": "9x"}, "allocation": {"by": "guess"}},
            r"stages\[0\]\.allocation\.by",
        ),
    ],
)
def test_recipes_that_make_no_sense(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        sc.load_recipe({"model": "a:b", "data": "digits", **recipe(stage)})


def test_an_impossible_budget_is_refused_when_its_stage_begins(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\[0\]\.budget\.file: 100 bytes"):
        sc.compress(digits_task(), recipe({"budget": {"file": 100}, "bits": 2}), out=tmp_path)


def test_a_recipe_with_a_budget_survives_writing_and_reading() -> None:
    stage = {"budget": {"file": "1.5kB"}, "bits": 3, "allocation": {"by": "sensitivity"}}
    first = sc.load_recipe({"model": "a:b", "data": "digits", **recipe(stage)})
    assert sc.load_recipe(first.to_dict()).to_dict() == first.to_dict()
    assert first.to_dict()["stages"][0]["budget"] == {"file": 1500}
