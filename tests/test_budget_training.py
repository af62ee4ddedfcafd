"""Budgets that are met in training: what is counted, the path to them, the landing, whole runs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

import secateur as sc
from secateur import data
from secateur.artifact import packed
from secateur.channels import compact
from secateur.cost.energy import energy
from secateur.engine.progress import Progress
from secateur.engine.reestimate import reestimate
from secateur.engine.trainer import Trainer
from secateur.errors import RecipeError
from secateur.finish import settle
from secateur.gates import Gate, HardConcreteGate, VIBGate
from secateur.methods import DJPQ
from secateur.methods.base import Phase
from secateur.methods.landing import SAMPLE, Knob, Landing, bits_knob, gate_knob, samples
from secateur.methods.pressure import ARRIVED, Pressure
from secateur.outcome import finished
from secateur.plan import build_plan
from secateur.quantizers import Quantizer, activation_bits
from secateur.sets import Levels

EIGHT = Levels(8, zero=True)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 10),
    )  # fmt: skip


def task() -> sc.Task:
    splits = data.fewer(data.load("digits"), 320)
    return sc.Task(network(), splits.train, splits.validation, splits.test, name="tiny")


def images(count: int = 16) -> Tensor:
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def attached(budget: dict[str, str], **options: Any) -> tuple[DJPQ, nn.Module, Tensor, Tensor]:
    """Attach to a network, and calibrate on noise."""
    model = network()
    x, y = images(32), torch.arange(32) % 10

    @torch.no_grad()
    def loss() -> float:
        model.eval()
        value = float(nn.functional.cross_entropy(model(x), y))
        model.train()
        return value

    method = DJPQ(build_plan(model, EIGHT), images(1), budget, tune_epochs=1, **options)
    method.told(loss, overhead=packed.overhead_bytes(model, reference=None))
    return method.attach(model), model, x, y


def landed(budget: dict[str, str], **options: Any) -> tuple[DJPQ, nn.Module]:
    """Train a few steps, then put a network onto its budget."""
    method, model, x, y = attached(budget, **options)
    search, tune = method.phases()
    optimizer = torch.optim.Adam(method.parameter_groups(3e-3))
    method.begin(search, 4)
    for _ in range(4):
        (nn.functional.cross_entropy(model.train()(x), y) + method.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step()
    method.begin(tune, 4)
    assert float(method.penalty()) == 0
    return method, model.eval()


@pytest.mark.parametrize(
    "budget",
    [
        {"bops": "40x"},
        {"bops": "10x"},
        {"macs": "2.5x"},
        {"energy": "80x"},
        {"file": "2.5kB"},
        {"bops": "60x", "macs": "1.2x", "file": "9x"},
    ],
)
def test_it_lands_on_budgets_as_others_count_them(budget: dict[str, str], tmp_path: Path) -> None:
    method, model = landed(budget, gates="hard_concrete", quantizer="linear")
    spent = method.ledger.spent(method.ledger.state())
    assert max(spent.values()) <= 1
    assert max(spent.values()) >= 0.97
    dense, plan = network(), method.plan
    method.finalize()
    small = compact(model, images(1), fixed=set(method.weights)).model
    settled = settle(small, [finished(plan, method.outcome())], images(1))
    weights = {name: bits for name, (bits, _) in method.widths.items()}
    inputs = activation_bits(small)
    bits = {"weight_bits": weights, "activation_bits": inputs}
    cost = sc.inspect(small, images(1), **bits)
    whole = sc.inspect(dense, images(1))
    found = {
        "bops": cost.bops / whole.bops,
        "macs": cost.macs / whole.macs,
        "energy": energy(small, images(1), **bits).joules / energy(dense, images(1)).joules,
    }
    for kind, share in spent.items():
        limit = method.ledger.limits[kind]
        if kind == "file":
            file = packed.save(tmp_path / "m", small, settled.quantized, reference=None).file
            assert 0.98 * share * limit < file <= share * limit
        else:
            dense_cost = method.ledger.costs[kind].dense(dense, images(1))
            assert found[kind] * dense_cost / limit == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "floor"), [({"gates": "hard_concrete"}, 4), ({"gates": "none"}, 2)]
)
def test_a_search_starts_halfway_with_bits_that_are_still_trained(
    options: dict[str, Any], floor: int
) -> None:
    method, model, _, _ = attached({"bops": "250x"}, **options)
    search, _ = method.phases()
    method.begin(search, 4)
    bits = [bits for pair in method.bops.widths().values() for bits in pair]
    assert min(bits) >= floor
    share = method.bops.hard() / method.bops.dense
    # two steps from 8 x 8 to 1/250 of 32 x 32; the last step down may be one of a large layer
    half = (1 / 16 / 250) ** 0.5
    assert half / 2 <= share <= half
    grids = [each for each in model.modules() if isinstance(each, Quantizer)]
    assert grids
    assert not any(each.fixed or each.waits for each in grids)
    method.penalty().backward()
    assert all(each.log2_step.grad is not None for each in grids)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [HardConcreteGate, VIBGate])
def test_a_frozen_gate_is_what_it_was_told(kind: type[Gate]) -> None:
    gate = kind(6, [torch.arange(3), torch.arange(3, 6)])
    knob = gate_knob(gate)
    assert (knob.count, knob.position) == (5, 4)
    for position, opened in ((0, 2), (2, 4), (4, 6)):
        assert knob.move(position - knob.position)
        assert int(gate.open().sum()) == opened
        assert gate.open()[:3].any()
        assert gate.open()[3:].any()
    assert not knob.move(1)
    chosen = torch.tensor([True, False, False, False, True, True])
    gate.freeze(chosen)
    other = kind(6, [torch.arange(3), torch.arange(3, 6)])
    other.load_state_dict(gate.state_dict())
    assert other.frozen
    assert torch.equal(other.scale() != 0, chosen)
    assert torch.equal(other.scale(), gate.scale())


def test_a_frozen_quantizer_keeps_its_range_and_trains_it() -> None:
    quantizer = Quantizer(8)
    quantizer.fit(torch.randn(999, generator=torch.Generator().manual_seed(0)))
    before = float(quantizer.limit.detach())
    quantizer.freeze(3)
    assert quantizer.width == quantizer.bits() == 3
    x = torch.linspace(-5, 5, 50)
    assert quantizer(x).unique().numel() == 7
    assert float(quantizer(x).detach().max()) == pytest.approx(before)
    quantizer(x).sum().backward()
    assert quantizer.log2_limit.grad is not None
    assert quantizer.log2_step is not None
    assert quantizer.log2_step.grad is None
    other = Quantizer(8)
    other.load_state_dict(quantizer.state_dict())
    assert other.fixed
    assert torch.equal(other(x), quantizer(x))


@pytest.mark.parametrize("power", [False, True])
def test_with_other_bits_a_range_is_the_best_and_with_its_own_the_trained_one(power: bool) -> None:
    values = torch.randn(999, generator=torch.Generator().manual_seed(0))
    quantizer = Quantizer(8, power=power)
    quantizer.fit(values)
    with torch.no_grad():
        quantizer.log2_limit.add_(0.3)
        if quantizer.power is not None:
            quantizer.power.fill_(0.7)
    trained = float(quantizer.limit.detach())
    knob = bits_knob(quantizer, range(2, 9), values)
    assert float(quantizer.limit.detach()) == trained
    assert knob.move(-5)
    warped = values.sign() * values.abs() ** (0.7 if power else 1.0)

    def error(limit: float) -> float:
        most = limit ** (0.7 if power else 1.0)
        on = torch.round(warped / most * 3).clamp(-3, 3) * most / 3
        return float((on - warped).square().sum())

    assert quantizer(values).unique().numel() == 7
    found = float(quantizer.limit.detach())
    assert found < trained
    assert error(found) <= 1.001 * min(error(found * f) for f in (0.7, 0.8, 0.9, 0.95, 1.05, 1.3))
    assert knob.move(5)
    assert float(quantizer.limit.detach()) == trained


def test_released_bits_are_trained_again_from_where_they_were_fixed() -> None:
    quantizer = Quantizer(8, widths=(2, 4, 8))
    quantizer.fit(torch.randn(999, generator=torch.Generator().manual_seed(0)))
    limit = float(quantizer.limit.detach())
    quantizer.freeze(4)
    quantizer.release((2, 4, 8))
    assert not quantizer.fixed
    assert quantizer.width == 4
    assert float(quantizer.bits().detach()) == pytest.approx(4)
    assert float(quantizer.limit.detach()) == limit
    quantizer.bits().backward()
    assert quantizer.log2_step is not None
    assert quantizer.log2_step.grad is not None


def test_landing_measures_what_it_takes_and_little_else() -> None:
    noise = [[4.0**-bits * scale for bits in range(9)] for scale in (1.0, 3.0, 0.2, 7.0, 2.0, 0.5)]
    at, calls = [8] * len(noise), [0]

    def loss() -> float:
        calls[0] += 1
        return sum(each[bits] for each, bits in zip(noise, at, strict=True))

    def excess() -> float:
        return math.log(sum(each + 1 for each in at) / 27)

    knobs = [
        Knob(9, 8, lambda to, i=i: at.__setitem__(i, to))  # type: ignore[misc]
        for i in range(len(noise))
    ]
    landing = Landing(knobs, excess, excess, loss)
    assert landing.descend()
    assert sum(at) + len(at) == 27
    steps = 9 * len(noise) - 27
    assert calls[0] <= len(noise) + 2 * steps  # one a step, and one before some of them
    best = min(
        (sum(each[bits] for each, bits in zip(noise, bits, strict=True)), bits)
        for bits in itertools.product(range(9), repeat=len(noise))
        if sum(bits) + len(bits) == 27
    )
    assert loss() == pytest.approx(best[0])


def test_samples_are_of_what_quantizers_are_given() -> None:
    inner, outer = Quantizer(4), Quantizer(4)
    batches = torch.arange(40_000.0).view(4, 10_000)

    def run() -> None:
        for batch in batches:
            outer(-inner(batch).detach())

    for grid in (inner, outer):
        grid.fit(batches)
    read = samples([inner, outer], run)
    assert all(SAMPLE <= len(values) <= 2 * SAMPLE for values in read.values())
    assert set(read[inner].tolist()) <= set(batches.flatten().tolist())
    assert float(read[inner].mean()) == pytest.approx(20_000, rel=0.01)
    assert set(read[outer].tolist()) <= set((-inner(batches)).flatten().tolist())
    assert samples([inner], lambda: None) == {}


def test_the_path_is_geometric_and_the_multiplier_its_integral() -> None:
    pressure = Pressure()
    pressure.begin(100, math.log(8.0))
    excess = torch.tensor(math.log(8.0), requires_grad=True)
    total = 0.0
    for step in range(100):
        value = pressure.penalty(excess)
        c = math.log(8.0) - math.log(8.0) * max(0.0, 1 - step / (100 * ARRIVED))
        assert float(value.detach()) == pytest.approx(total * c + 2.5 * c * c, abs=1e-4)
        (gradient,) = torch.autograd.grad(value, excess)
        assert float(gradient) == pytest.approx(total + 5 * c, abs=1e-4)
        pressure.step()
        total += c
    other = Pressure()
    other.load_state_dict(pressure.state_dict())
    assert vars(other) == vars(pressure)


@settings(max_examples=60)
@given(st.data())
def test_landing_never_exceeds_and_spends_what_can_be_spent(draw: st.DataObject) -> None:
    count = draw.draw(st.integers(2, 5))
    costs = [draw.draw(st.floats(0.5, 20)) for _ in range(count)]
    worth = [draw.draw(st.floats(-0.1, 1)) for _ in range(count)]
    sizes = [draw.draw(st.integers(1, 8)) for _ in range(count)]
    limit = draw.draw(st.floats(0.3, 1.0)) * sum(
        cost * size for cost, size in zip(costs, sizes, strict=True)
    )
    at = [draw.draw(st.integers(0, size - 1)) for size in sizes]
    knobs = [
        Knob(size, at[i], lambda to, i=i: at.__setitem__(i, to))  # type: ignore[misc]
        for i, size in enumerate(sizes)
    ]

    def total(positions: Any) -> float:
        return sum(cost * (each + 1) for cost, each in zip(costs, positions, strict=True))

    slope, seen = draw.draw(st.floats(0.8, 1.0)), [0.0]

    def excess() -> float:
        seen[0] = math.log(total(at) / limit)
        return seen[0]

    landing = Landing(
        knobs,
        excess,
        lambda: seen[0] + slope * (math.log(total(at) / limit) - seen[0]),
        lambda: -sum(w * each for w, each in zip(worth, at, strict=True)),
    )
    possible = total([0] * count) <= limit
    assert landing.land() is possible
    if not possible:
        return
    assert total(at) <= limit
    for number, knob in enumerate(knobs):  # nothing more fits
        if knob.position + 1 < knob.count and total(at) < 0.99 * limit:
            assert total(at) + costs[number] > limit * (1 - 1e-12)  # logarithms round
    best = max(
        total(each) for each in itertools.product(*map(range, sizes)) if total(each) <= limit
    )
    assert total(at) >= 0.5 * best


def test_statistics_are_those_of_the_network_without_noise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model[1].running_mean.fill_(7)
    model.train()
    model[2].eval()
    x = torch.randn(600, 1, 8, 8)
    reestimate(model, data.InMemory(x, torch.zeros(600, dtype=torch.int64)))
    made = torch.cat([model[0](part).detach() for part in x.split(256)])
    torch.testing.assert_close(model[1].running_mean, made.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, made.transpose(0, 1).flatten(1).var(1))
    assert [module.training for module in model] == [True, True, False]
    assert model[1].momentum == 0.1


TRAIN = {"epochs": 2, "batch_size": 32, "lr": 5e-3, "threads": 1}
STAGE = {
    "method": "djpq", "epochs": 2, "tune_epochs": 2, "distill": 0.5, "gates": "hard_concrete",
    "quantizer": "linear", "budget": {"bops": "40x"}, "allocation": {"samples": 100},
}  # fmt: skip


def recipe(**changes: Any) -> dict[str, Any]:
    return {"train": TRAIN, "stages": [{**STAGE, **changes}], "export": {"onnx": False}}


def test_a_run_meets_its_budget_and_a_stopped_one_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sc.compress(task(), recipe(), out=tmp_path / "whole").report
    assert 40 <= whole["ratio"]["bops"] <= 40 * 1.03
    tuned = [entry for entry in whole["history"] if entry["phase"] == "tune"]
    best = max(entry["accuracy"] for entry in tuned)
    assert whole["accuracy"]["validation"]["compressed"] == best
    assert all(0.97 <= entry["bops_of_budget"] <= 1 for entry in tuned)
    (allocation,) = whole["allocations"]
    assert allocation["by"] == "training"
    assert allocation["spent"]["bops"] == pytest.approx(40 / whole["ratio"]["bops"])
    for stop in (4, 5):  # at the end of the search, in the first frozen epoch
        stop_and_resume(tmp_path, monkeypatch, Trainer, "_save", stop)


def test_what_a_budget_takes_to_measure_is_shown(tmp_path: Path) -> None:
    counts: dict[str, int] = {}

    class Counting(Progress):
        def begin(self, label: str, steps: int | None = None) -> None:
            self.now = label
            super().begin(label, steps)

        def advance(self) -> None:
            counts[self.now] = counts.get(self.now, 0) + 1
            super().advance()

    quiet = Counting(Console(quiet=True))
    sc.compress(task(), recipe(epochs=1, tune_epochs=1), out=tmp_path, progress=quiet)
    assert counts["djpq"] == counts["tune"] == counts["train"] / 2  # of two epochs
    assert counts["before djpq"] >= 6  # each of three layers has two widths to measure
    assert counts["before tune"] >= 6


@pytest.mark.parametrize(("kind", "name", "at"), [(Trainer, "_save", 3), (Landing, "land", 1)])
def test_a_run_for_a_file_is_killed_in_its_search_and_after_landing(
    kind: type, name: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = {"file": "2.5kB"}
    whole = sc.compress(task(), recipe(budget=budget), out=tmp_path / "whole")
    assert 2400 < whole.report["storage"]["file"]["packed"] <= 2500
    stop_and_resume(tmp_path, monkeypatch, kind, name, at, budget=budget)


def stop_and_resume(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type, name: str, at: int, **changes: Any
) -> None:
    """End a run as if it were killed after the n-th call of something, resume it and compare."""
    original, calls = getattr(kind, name), 0

    def stopping(*arguments: Any) -> Any:
        nonlocal calls
        result = original(*arguments)
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return result

    out = folder / f"{name}-{at}"
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, stopping)
        with pytest.raises(KeyboardInterrupt):
            sc.compress(task(), recipe(**changes), out=out)
    sc.compress(task(), recipe(**changes), out=out, resume=True)
    files = [(each / "model.secateur").read_bytes() for each in (folder / "whole", out)]
    assert files[0] == files[1], out.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"bops": "1e6x"}}, r"^stages\[0\]\.budget\.bops: .* still\.\nOf these"),
        ({"budget": {"file": 300}}, r"^stages\[0\]\.budget\.file: 300, but"),
        ({"budget": {"macs": "2x"}, "gates": "none"}, r"^stages\[0\]\.budget\.macs"),
        ({"budget": {"weights": "9x"}}, r"budget\.weights: this method cannot"),
        ({"budget": {"bops": "9 lb"}}, r"budget\.bops: '9 lb' has the unknown"),
        ({"allocation": {"by": "magnitude"}}, r"allocation\.by: 'magnitude', but djpq"),
        ({"method": "gmp", "budget": {"bops": "9x"}}, r"budget\.bops: this method cannot"),
    ],
)
def test_budgets_that_cannot_be_are_refused_before_training(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "run", lambda *given: pytest.fail("it trains"))
    stage = {**STAGE, **changes}
    if stage["method"] == "gmp":
        stage = {"method": "gmp", "budget": stage["budget"]}
    with pytest.raises(RecipeError, match=message) as caught:
        sc.compress(task(), {"train": TRAIN, "stages": [stage]}, out=tmp_path)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_budget_in_a_loop_of_one_s_own_needs_a_loss() -> None:
    method = DJPQ(EIGHT, images(1), {"bops": "40x"}).attach(network())
    with pytest.raises(RecipeError, match=r"^budget: .*\n.*told"):
        method.begin(Phase("djpq", 1), 1)
