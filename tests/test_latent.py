"""Trained scales and snapping against their papers; layers that get their levels last."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.methods import ADMM, GMP, Method
from secateur.methods.latent import LatentLevels, scale_slope, trained_scale
from secateur.plan import build_plan
from secateur.sets import Filter, Levels, Unstructured
from tiny import small_model, train

LEVELS = [
    Levels(1),
    Levels(2),
    Levels(2, zero=True),
    Levels(4, zero=True),
    Levels(3, spacing="power_of_two"),
]

LR = 0.005


def fake_quantize(v: Tensor, q: Tensor, levels: Levels) -> Tensor:
    """Quantize as LSQ's authors do, with a search for the nearest level and autograd for the rest.

    One magnitude has nothing to round: q sign(v).
    """
    if len(levels.grid) == 1:
        return q * torch.where(v < 0, -torch.ones_like(v), torch.ones_like(v))
    signed = v.new_tensor([sign * level for level in levels.grid for sign in (1, -1)])
    clipped = (v / q).clamp(-levels.grid[-1], levels.grid[-1])
    nearest = signed[(clipped.detach()[:, None] - signed).abs().argmin(1)]
    return (clipped + (nearest - clipped).detach()) * q


@given(
    st.sampled_from(LEVELS),
    st.lists(st.floats(-3, 3), min_size=1, max_size=20),
    st.floats(0.05, 2),
    st.integers(0, 99),
)
def test_slope_is_the_gradient_of_fake_quantization(
    levels: Levels, values: list[float], scale: float, seed: int
) -> None:
    v = torch.tensor(values, dtype=torch.float64) + 1e-3 * math.sqrt(2)  # ties and ends are moot
    gradient = torch.randn(len(v), generator=torch.Generator().manual_seed(seed)).double()
    q = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    fake_quantize(v, q, levels).backward(gradient)
    slope = scale_slope(v, scale, levels.grid)
    assert float(gradient @ slope) == pytest.approx(float(q.grad), abs=1e-9)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_under_sgd_a_trained_scale_takes_the_steps_of_lsq(levels: Levels) -> None:
    """A second implementation with q as a parameter, its gradient scaled by 1/sqrt(n Qmax)."""
    torch.manual_seed(0)
    model = nn.Linear(40, 3, dtype=torch.float64)
    method = GMP(levels, scale="trained", retrain_epochs=1).attach(model)
    method.begin(method.phases()[-1], 20)
    (held,) = method.support.latent.values()
    n, start = len(held.index), held.scale
    v, q = held.latent.clone(), torch.tensor(start, dtype=torch.float64)
    optimizer = torch.optim.SGD([model.weight], LR)
    for step in range(20):
        inputs, labels = torch.randn(32, 40).double(), torch.randint(3, (32,))
        q.requires_grad_()
        quantized = fake_quantize(v, q, levels)
        quantized.retain_grad()
        weight = torch.zeros(120).double().index_put((held.index,), quantized).view(3, 40)
        torch.testing.assert_close(model.weight.detach(), weight.detach(), rtol=0, atol=1e-6)
        logits = nn.functional.linear(inputs, weight, model.bias.detach())
        nn.functional.cross_entropy(logits, labels).backward()
        v = v - LR * quantized.grad
        q = (q - LR * q.grad / math.sqrt(n * levels.magnitudes[-1])).detach()
        halves = zip(inputs.split(16), labels.split(16), strict=True)
        for part, wanted in halves if step % 2 else [(inputs, labels)]:  # also accumulated
            loss = nn.functional.cross_entropy(model(part), wanted)
            (loss * len(part) / 32).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step()
        assert held.scale == pytest.approx(float(q), rel=1e-5)
    assert abs(held.scale / start - 1) > 1e-3


def test_a_fitted_scale_needs_no_gradient_and_a_trained_one_stays_without() -> None:
    for scale in ("fitted", "trained"):
        model = small_model()
        method = ADMM(Levels(3), scale=scale, retrain_epochs=1).attach(model)
        method.begin(method.phases()[-1], 5)
        hooked = [bool(weight._post_accumulate_grad_hooks) for weight in method.weights.values()]
        assert hooked == [scale == "trained"] * 2
        before = [held.scale for held in method.support.latent.values()]
        with torch.no_grad():
            model[0].weight.mul_(1.01)
        method.step()
        after = [held.scale for held in method.support.latent.values()]
        assert (after == before) == (scale == "trained")


@given(
    st.sampled_from(LEVELS),
    st.sampled_from([1e-30, 1.0, 1e30, math.inf, math.nan]),
    st.sampled_from([-1e30, -1.0, 0.0, 1.0, 1e30]),
)
def test_scales_stay_positive_and_finite(levels: Levels, size: float, step: float) -> None:
    weight = torch.randn(50, generator=torch.Generator().manual_seed(0))
    held = LatentLevels(weight, levels.project(weight), levels)
    held.snap(1.0)
    for _ in range(5):
        part = weight[held.index].double()
        held.scale = trained_scale(
            held.scale, held.latent, size * part, step * part, held.levels.grid
        )
        assert 0 < held.scale < math.inf
        assert held.scale == float(torch.tensor(held.scale))


def deep_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU()),
        *(nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 3)),
    )


def through(model: nn.Module, method: Method, check: Any = lambda phase: None) -> None:
    """Train every phase, checking after each of its optimizer steps."""
    for number, phase in enumerate(method.phases()):
        method.begin(phase, 10)
        check(phase)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=1e-2)
        for step in range(10 * phase.epochs):
            train(model, method, optimizer, 1, seed=100 * number + step)
            check(phase)


@pytest.mark.parametrize("kind", [ADMM, GMP])
@pytest.mark.parametrize("scale", ["fitted", "trained"])
@pytest.mark.parametrize("levels", [Levels(1), Levels(3), Levels(2, zero=True)], ids=str)
def test_shares_snap_the_nearest_and_freeze_them(kind: type, scale: str, levels: Levels) -> None:
    model = small_model()
    target = Unstructured(density=0.5) & levels
    plan = build_plan(model, target, scope="layer")
    options = {"epochs": 1, "retrain_epochs": 3, "snap": [0.3, 0.65, 1.0], "scale": scale}
    method = kind(plan, **options).attach(model)
    frozen: dict[str, Tensor] = {}
    zeros: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    before: dict[str, Tensor] = {}
    shares = []

    def snapped(phase: Any) -> None:
        """Check the state right after a share was snapped."""
        for name, weight in method.weights.items():
            held = method.support.latent[name]
            zeros.setdefault(name, method.plan.project(before)[name] == 0)
            live = ~zeros[name]
            assert held.scale == scales.setdefault(name, held.scale)
            signed = torch.tensor([s * level for level in levels.grid for s in (1, -1)])
            distances = (before[name][live][:, None] - signed * held.scale).abs().amin(1)
            on = held.snapped
            assert int(on.sum()) == round(phase.snap * int(live.sum()))
            assert float(distances[on].max()) <= float(
                distances[~on].min() if phase.snap < 1 else 9
            )
            nearest = torch.zeros_like(weight, dtype=torch.bool)
            nearest[live] = on
            changed = weight.detach() != before[name]
            assert not bool((changed & live & ~nearest).any())
            if name in frozen:
                assert torch.equal(weight[live][~frozen[name].isnan()], old(frozen[name]))
            frozen[name] = torch.where(on, weight.detach()[live], math.nan)

    def old(values: Tensor) -> Tensor:
        return values[~values.isnan()]

    def check(phase: Any) -> None:
        if phase.name != "retrain":
            assert method.approximate
        elif phase.snap not in shares:
            shares.append(phase.snap)
            snapped(phase)
        for name, weight in method.weights.items() if shares else ():
            assert bool((weight[zeros[name]] == 0).all())
            if phase.snap < 1:
                values = weight.detach()[~zeros[name]]
                assert torch.equal(values[~frozen[name].isnan()], old(frozen[name]))
                assert method.approximate
                assert method.support.latent[name].scale == scales[name]
            else:
                assert target.contains(weight)
                assert not method.approximate
        before.update({n: weight.detach().clone() for n, weight in method.weights.items()})
        if method.approximate:
            with method.projected():
                assert all(target.contains(weight) for weight in method.weights.values())
            assert all(torch.equal(before[n], weight) for n, weight in method.weights.items())

    before.update({n: weight.detach().clone() for n, weight in method.weights.items()})
    through(model, method, check)
    assert shares == [0.3, 0.65, 1.0]


def test_free_values_move_between_shares_and_all_move_at_the_end() -> None:
    model = small_model()
    method = GMP(Levels(2), epochs=1, retrain_epochs=2, snap=[0.5, 1.0]).attach(model)
    _, first, last = method.phases()
    for phase in (first, last):
        method.begin(phase, 20)
        held = method.support.latent["2.weight"]
        start = held.latent.clone()
        train(model, method, torch.optim.AdamW(model.parameters(), 1e-2), 20)
        assert torch.equal(held.latent == start, held.snapped & (phase is first))


def test_without_levels_no_step_is_for_the_edges() -> None:
    model = deep_model()
    method = ADMM(Unstructured(density=0.3), edges_last=True).attach(model)
    assert method.plan is method.full_plan


def test_phases_share_the_epochs_and_only_levels_have_shares() -> None:
    options = {"epochs": 3, "retrain_epochs": 10, "steps": [0.5, 1.0], "snap": [0.3, 0.6, 1.0]}

    def epochs(target: Any, **more: Any) -> list[tuple[str, int, int, float]]:
        phases = ADMM(target, **options, **more).phases()
        return [(phase.name, phase.step, phase.epochs, phase.snap) for phase in phases]

    plain = [("admm", 0, 3, 1.0), ("retrain", 0, 10, 1.0), ("admm", 1, 3, 1.0)]
    shares = [("retrain", 1, 3, 0.3), ("retrain", 1, 3, 0.6), ("retrain", 1, 4, 1.0)]
    pattern = Unstructured(density=0.1)
    assert epochs(pattern) == epochs(pattern, edges_last=True)
    assert epochs(pattern) == [*plain, ("retrain", 1, 10, 1.0)]
    assert epochs(pattern & Levels(2)) == [*plain, *shares]
    more = [("admm", 2, 3, 1.0), *((name, 2, *rest) for name, _, *rest in shares)]
    assert epochs(pattern & Levels(2), edges_last=True) == [*plain, *shares, *more]


@pytest.mark.parametrize("snap", [[1.0], [0.5, 1.0]])
@pytest.mark.parametrize(
    ("target", "scope"),
    [
        (Levels(2), "layer"),
        (Levels(2, zero=True), "layer"),
        (Unstructured(density=0.3) & Levels(2), "global"),
        (Filter(density=0.5) & Levels(1), "layer"),
    ],
    ids=str,
)
def test_the_first_and_the_last_layer_get_their_levels_in_the_last_step(
    target: Any, scope: str, snap: list[float]
) -> None:
    model = deep_model()
    plan = build_plan(model, target, scope=scope)
    options = {"epochs": 1, "retrain_epochs": 2, "edges_last": True, "interval": 3}
    method = ADMM(plan, **options, snap=snap).attach(model)
    patterns, levels = target.split()
    edges, inner = ["0.weight", "6.weight"], ["2.weight", "4.weight"]
    frozen: dict[str, Tensor] = {}
    steps = []

    def check(phase: Any) -> None:
        steps.append(phase.step)
        kept = sum(int(weight.count_nonzero()) for weight in method.weights.values())
        if phase.name == "retrain" and scope == "global":
            assert kept <= plan.keep
        quantized = {
            name
            for name in method.weights
            if (Unstructured(density=1.0) & levels).contains(method.weights[name])
        }
        final = phase.name == "retrain" and phase.snap == 1
        if phase.step == 0:
            assert not set(edges) & quantized
            assert not final or set(inner) <= quantized
            assert set(method.z) <= {*inner, *(edges if patterns else [])}
        else:
            assert set(inner) <= quantized
            assert not final or set(edges) <= quantized
            assert set(method.z) == (set(edges) if phase.name == "admm" else set())
            for name in edges:
                zero = method.weights[name] == 0
                assert torch.equal(zero & frozen[name], frozen[name])
        if phase.step == 0 and final:
            frozen.update({name: method.weights[name] == 0 for name in edges})

    through(model, method, check)
    assert set(steps) == {0, 1}
    method.finalize()
    sets = plan.sets(method.weights)
    assert all(sets[row.layer].contains(method.weights[row.parameter]) for row in plan.compressed)


@pytest.mark.parametrize("number", range(6))
def test_finalize_ends_on_the_target_from_any_phase(number: int) -> None:
    target = Unstructured(density=0.4) & Levels(2)
    for scope in ("global", "layer"):
        model = deep_model()
        plan = build_plan(model, target, scope=scope)
        options = {"epochs": 1, "retrain_epochs": 2, "snap": [0.4, 1.0], "scale": "trained"}
        method = ADMM(plan, **options, edges_last=True, interval=3).attach(model)
        for phase in method.phases()[: number + 1]:
            method.begin(phase, 10)
            train(model, method, torch.optim.Adam(model.parameters(), 1e-2), 7)
        method.finalize()
        assert not method.approximate
        sets = plan.sets(method.weights)
        for row in plan.compressed:
            assert sets[row.layer].contains(method.weights[row.parameter])
        kept = sum(int(weight.count_nonzero()) for weight in method.weights.values())
        assert kept <= round(0.4 * sum(weight.numel() for weight in method.weights.values()))


@pytest.mark.parametrize("kind", [ADMM, GMP])
def test_values_at_level_zero_come_back_after_resuming(kind: type) -> None:
    """Zero as a level is not zero by pruning: neither the value nor its bias is frozen."""
    model = small_model()
    method = kind(Levels(2, zero=True), epochs=1, retrain_epochs=1).attach(model)
    method.begin(method.phases()[-1], 20)
    held = method.support.latent["0.weight"]
    with torch.no_grad():
        model[0].weight[2] *= 0.01  # the step of an optimizer that takes the values near zero
    method.step()
    assert not model[0].weight[2].any()
    assert model[0].bias[2] != 0
    saved = copy.deepcopy((model.state_dict(), method.state_dict()))
    other = small_model()
    other.load_state_dict(saved[0])
    resumed = kind(Levels(2, zero=True), epochs=1, retrain_epochs=1).attach(other)
    resumed.load_state_dict(saved[1])
    with torch.no_grad():
        for each in (model, other):
            each[0].weight[2] += held.scale
    for each in (method, resumed):
        each.step()
    assert bool(model[0].weight[2].any())
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_biases_of_dead_outputs_go_where_the_last_layer_stays_dense() -> None:
    model = small_model()
    with torch.no_grad():
        model[0].weight[4] = 0
        model[2].weight[1] = 0
    plan = build_plan(model, Unstructured(density=0.5), layers={"2": "dense"})
    method = ADMM(plan, interval=1).attach(model)
    train(model, method, torch.optim.Adam(model.parameters(), 1e-2), 10)
    assert model[0].bias[4] == 0
    assert bool(model[2].bias.all())
    assert bool(model[2].weight[1].any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snap": [0.5]}, "rise from above 0 to 1"),
        ({"snap": [0.5, 0.3, 1.0]}, "rise from above 0 to 1"),
        ({"snap": []}, "snap"),
        ({"scale": "learned"}, "scale"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    for kind in (ADMM, GMP):
        with pytest.raises(RecipeError, match=message):
            kind(Levels(2), **options)
