"""SR-STE against its update rule, written out by hand, and what its decay does to masks."""

from __future__ import annotations

import functools
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import secateur as sc
from secateur import data
from secateur.errors import RecipeError
from secateur.methods import GMP, SRSTE, FrozenAdam
from secateur.plan import build_plan
from secateur.sets import NM, Levels
from tiny import OPTIMIZERS, digits_network, digits_task, small_model, train

START = [1.0, -2.0, 0.5, 3.0, 0.25, 0.0, -0.125, 0.0625]
"""Two groups of four; with 2:4 the first keeps -2 and 3, the second 0.25 and -0.125."""


def line() -> nn.Sequential:
    """Return a linear layer without bias that sees one group of weights a row."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(START).view(2, 4))
    return model


def dense(method: SRSTE) -> Tensor:
    """Return W, which the model and the method hold between them."""
    return method.weights["0.weight"].detach() + method.rest["0.weight"]


def one_step(mode: str, decay: float, momentum: float = 0.0, steps: int = 1) -> Tensor:
    """Train with the gradient 1, 2, ..., 8 by each weight."""
    model = line()
    method = SRSTE(NM(2, 4), decay=decay, mode=mode).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum)
    slope = torch.arange(1.0, 9.0).view(2, 4)
    for _ in range(steps):
        ((model[0].weight * slope).sum() + method.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step(0.1)
    return dense(method)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_one_step_is_that_of_the_paper_with_its_sign(mode: str) -> None:
    """W - 0.1 (g + 0.5 (1 - E) W): pruned weights shrink, kept ones do not decay."""
    expected = [
        1.0 - 0.1 * (1 + 0.5 * 1.0),
        -2.0 - 0.1 * 2,
        0.5 - 0.1 * (3 + 0.5 * 0.5),
        3.0 - 0.1 * 4,
        0.25 - 0.1 * 5,
        0.0 - 0.1 * 6,
        -0.125 - 0.1 * 7,
        0.0625 - 0.1 * (8 + 0.5 * 0.0625),
    ]
    torch.testing.assert_close(one_step(mode, 0.5), torch.tensor(expected).view(2, 4))


def test_without_a_gradient_pruned_weights_shrink_and_kept_ones_stay() -> None:
    model = line()
    method = SRSTE(NM(2, 4), decay=0.5).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()  # no gradient at all: no decay, as with that of the optimizer
    method.step()
    torch.testing.assert_close(dense(method), torch.tensor(START).view(2, 4))
    model[0].weight.grad = torch.zeros(2, 4)
    optimizer.step()
    method.step()
    shrunk = [1 - 0.05, -2.0, 0.5 * 0.95, 3.0, 0.25, 0.0, -0.125, 0.0625 * 0.95]
    torch.testing.assert_close(dense(method), torch.tensor(shrunk).view(2, 4))


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.3)])
def test_many_steps_are_those_of_a_loop_on_the_dense_weight(
    momentum: float, decay: float, interval: int
) -> None:
    """The reference keeps W itself and masks it in a graph; with decay 0 it is plain STE."""
    model = small_model()
    method = SRSTE(NM(2, 4), decay=decay, interval=interval).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum)
    train(model, method, optimizer, 12)

    reference = small_model()
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, momentum=momentum)
    generator = torch.Generator().manual_seed(1)
    weights = {"0.weight": reference[0].weight, "2.weight": reference[2].weight}
    masks: dict[str, Tensor] = {}
    for number in range(12):
        if number % interval == 0:
            masks = {name: NM(2, 4).project(w) != 0 for name, w in weights.items()}
        used = {
            name: w + (w * masks[name] - w).detach() if name in masks else w
            for name, w in reference.named_parameters()
        }
        inputs = torch.randn(32, 8, generator=generator)
        logits = torch.func.functional_call(reference, used, (inputs,))
        nn.functional.cross_entropy(logits, inputs[:, :3].argmax(1)).backward()
        for name, w in weights.items():
            assert w.grad is not None
            w.grad += decay * (~masks[name] * w.detach())
        optimizer.step()
        optimizer.zero_grad()
    for name, w in weights.items():
        held = method.weights[name].detach() + method.rest[name]
        torch.testing.assert_close(held, w.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_model_always_computes_with_members(optimizer: str) -> None:
    model = small_model()
    method = SRSTE(NM(1, 4), decay=0.1, interval=3).attach(model)
    made = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(10):
        train(model, method, made, 1)
        assert all(NM(1, 4).contains(weight) for weight in method.weights.values())
        for name, rest in method.rest.items():
            assert not bool(((rest != 0) & (method.weights[name] != 0)).any())
            assert bool(rest.any())


def test_pruned_weights_come_back_but_not_in_layers_without_a_pattern() -> None:
    model = small_model()
    with torch.no_grad():
        model[0].weight[:, 0] = 0
        model[2].weight[:, 0] = 0
    plan = build_plan(model, NM(2, 4) & Levels(8, zero=True))
    rows = [
        replace(row, set=Levels(8, zero=True)) if row.layer == "2" else row for row in plan.rows
    ]
    method = SRSTE(replace(plan, rows=tuple(rows)), decay=0).attach(model)
    before = method.masks["0.weight"].clone()
    train(model, method, torch.optim.SGD(model.parameters(), 0.5), 30)
    assert bool((method.masks["0.weight"] & ~before).any())
    assert bool(model[0].weight[:, 0].any())
    assert not bool(model[2].weight[:, 0].any())


def test_decay_rises_to_its_value() -> None:
    method = SRSTE(NM(2, 4), decay=0.5, anneal=4).attach(small_model())
    seen = []
    for _ in range(6):
        seen.append(method.metrics()["decay"])
        method.step()
    assert seen == [0, 0.125, 0.25, 0.375, 0.5, 0.5]


ALMOST = {"rtol": 1e-6, "atol": 1e-7}


def test_the_term_joins_accumulated_gradients_once() -> None:
    model = line()
    method = SRSTE(NM(2, 4), decay=0.5).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    slope = torch.arange(1.0, 9.0).view(2, 4)
    for _ in range(4):
        ((model[0].weight * slope).sum() / 4 + method.penalty()).backward()
    optimizer.step()
    method.step()
    torch.testing.assert_close(dense(method), one_step("coupled", 0.5), **ALMOST)


@pytest.mark.parametrize("fused", [False, True])
def test_the_term_is_not_scaled_with_the_loss(fused: bool) -> None:
    """Fused optimizers unscale gradients by themselves, in the step that the term joins."""
    model = line()
    method = SRSTE(NM(2, 4), decay=0.5).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    slope = torch.arange(1.0, 9.0).view(2, 4)
    scaler.scale((model[0].weight * slope).sum() + method.penalty()).backward()
    scaler.step(optimizer)
    method.step()
    torch.testing.assert_close(dense(method), one_step("coupled", 0.5), **ALMOST)


def test_the_term_is_not_clipped_with_the_gradient() -> None:
    model = line()
    method = SRSTE(NM(2, 4), decay=0.5).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (1e6 * model[0].weight).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-12)
    optimizer.step()
    method.step()
    shrunk = [1 - 0.05, -2.0, 0.5 * 0.95, 3.0, 0.25, 0.0, -0.125, 0.0625 * 0.95]
    torch.testing.assert_close(dense(method), torch.tensor(shrunk).view(2, 4), **ALMOST)


def test_the_term_joins_gradients_of_a_closure() -> None:
    model = line()
    method = SRSTE(NM(2, 4), decay=0.5).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model[0].weight * torch.arange(1.0, 9.0).view(2, 4)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    method.step()
    torch.testing.assert_close(dense(method), one_step("coupled", 0.5), **ALMOST)


def test_the_term_joins_no_other_gradients_and_ends_with_the_method() -> None:
    hooks = _global_optimizer_pre_hooks
    gc.collect()
    before = len(hooks)
    model, other = line(), line()
    method = SRSTE(NM(2, 4), decay=0.5).attach(model)
    other[0].weight.grad = torch.zeros(2, 4)
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert other[0].weight.flatten().tolist() == START
    assert len(hooks) == before + 1
    method.finalize()
    assert len(hooks) == before
    SRSTE(NM(2, 4)).attach(line())
    gc.collect()
    assert len(hooks) == before


def test_decoupled_decay_is_not_multiplied_by_momentum() -> None:
    free = one_step("decoupled", 0.0, momentum=0.9, steps=1)
    held = one_step("decoupled", 0.5, momentum=0.9, steps=1)
    torch.testing.assert_close(held[0, 0] - free[0, 0], torch.tensor(-0.1 * 0.5 * 1.0))
    method = SRSTE(NM(2, 4), mode="decoupled").attach(line())
    assert float(method.penalty()) == 0
    with pytest.raises(RecipeError, match="decoupled needs the learning rate"):
        method.step()


def test_sad_counts_what_changed_by_layer() -> None:
    model = small_model()
    plan = build_plan(model, NM(2, 4), layers={"2": {"m": 8}})
    method = SRSTE(plan, decay=0).attach(model)
    start = {name: mask.clone() for name, mask in method.masks.items()}
    assert method.metrics()["sad"] == method.metrics()["flip_rate"] == 0
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for number in range(20):
        before = {name: weight != 0 for name, weight in method.weights.items()}
        train(model, method, optimizer, 1, seed=number)
        metrics, now = method.metrics(), {n: w != 0 for n, w in method.weights.items()}
        flipped = sum(int((before[name] != now[name]).sum()) for name in now)
        assert metrics["flip_rate"] == flipped / 176
        for layer in "02":
            name = f"{layer}.weight"
            assert metrics[f"sad.{layer}"] == int((start[name] != now[name]).sum())
        assert metrics["sad"] == metrics["sad.0"] + metrics["sad.2"]
    assert metrics["sad"] > 0
    method.finalize()
    assert method.metrics() == {}


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return the training digits as 9x9 pixels, and their classes."""
    images, classes = zip(*data.load("digits").train, strict=True)
    return nn.functional.avg_pool2d(torch.stack(images), 3), torch.tensor([int(c) for c in classes])


def divergence(seed: int, **options: Any) -> tuple[float, int]:
    """Train from scratch at 2:4 on digits; return SAD and the sum of SAD over single steps."""
    images, classes = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(81, 32), nn.ReLU(), nn.Linear(32, 10))
    method = SRSTE(NM(2, 4), **options).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    steps = 0
    for _ in range(80):
        some = torch.randint(len(images), (32,))
        loss = nn.functional.cross_entropy(model(images[some]), classes[some])
        (loss + method.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.step()
        steps += sum(method.flips.values())
    return method.metrics()["sad"], steps


@pytest.mark.parametrize("seed", range(5))
def test_decay_settles_the_masks_on_digits(seed: int) -> None:
    free, held = divergence(seed, decay=0.0), divergence(seed, decay=0.02)
    assert held[0] < free[0]
    assert held[1] < free[1]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_second_moments_are_frozen_as_they_were(kind: type[torch.optim.Adam]) -> None:
    """Against the update written out; its spread is that of Adam's own last step."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 4.0]))
    idle = nn.Parameter(torch.ones(2))
    adam = kind([weight, idle], 0.1, betas=(0.9, 0.99), weight_decay=0.1)
    for number in range(5):
        weight.grad = torch.tensor([0.1, 2.0, -1.0, 0.0]) * (number + 1)
        adam.step()
    spread = (adam.state[weight]["exp_avg_sq"] / (1 - 0.99**5)).sqrt() + 1e-8
    spread[adam.state[weight]["exp_avg_sq"] == 0] = torch.inf
    assert spread.isinf().any() == (kind is torch.optim.AdamW)  # Adam's decay is in the gradient
    frozen = FrozenAdam(adam)
    expected, mean = weight.detach().clone(), torch.zeros(4)
    for number in range(1, 4):
        gradient = torch.tensor([100.0, 0.0, -1.0, 1.0])
        weight.grad = gradient.clone()
        frozen.step()
        if kind is torch.optim.AdamW:
            expected *= 1 - 0.1 * 0.1
        else:
            gradient += 0.1 * expected
        mean = 0.9 * mean + 0.1 * gradient
        expected = expected - 0.1 * mean / (1 - 0.9**number) / spread
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(idle.detach(), torch.ones(2))


def test_dense_training_ahead_has_no_masks() -> None:
    model = small_model()
    method = SRSTE(NM(2, 4), mode="decoupled", precondition=1, epochs=1).attach(model)
    ahead, masked, _ = method.phases()
    method.begin(ahead, 20)
    assert method.approximate
    assert method.metrics() == {}
    untouched = small_model()
    assert torch.equal(model[0].weight, untouched[0].weight)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    train(model, method, adam, 20)
    assert bool(model[0].weight.all())
    method.begin(masked, 20)
    assert masked.frozen
    train(model, method, FrozenAdam(adam), 20)
    assert NM(2, 4).contains(model[0].weight)


def test_levels_come_with_masked_retraining() -> None:
    model = small_model()
    target = NM(2, 4) & Levels(3)
    method = SRSTE(target, retrain_epochs=1, scale="trained").attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    assert method.approximate
    masked, retraining = method.phases()
    method.begin(masked, 20)
    train(model, method, optimizer, 20)
    method.begin(retraining, 20)
    masks = {name: weight != 0 for name, weight in method.weights.items()}
    train(model, method, optimizer, 20)
    for name, weight in method.weights.items():
        assert target.contains(weight)
        assert not bool(((weight != 0) & ~masks[name]).any())


@pytest.mark.parametrize("zero", [False, True])
def test_joint_levels_are_those_of_a_loop_with_lsq(zero: bool) -> None:
    """The reference keeps W and the scale, and takes the slope of rounding from autograd."""
    levels, pattern, lr, decay = Levels(3, zero=zero), NM(2, 4), 0.02, 0.3
    model = small_model()
    method = SRSTE(pattern & levels, decay=decay, joint=True, scale="trained").attach(model)
    names = list(method.weights)
    whole = {name: dict(small_model().named_parameters())[name].detach().clone() for name in names}
    scales = {name: method.moving[name].scale for name in names}
    optimizer = torch.optim.SGD(model.parameters(), lr)
    generator = torch.Generator().manual_seed(1)
    highest = levels.magnitudes[-1]
    for _ in range(12):
        latent = {name: pattern.project(weight) for name, weight in whole.items()}
        inputs = torch.randn(32, 8, generator=generator)
        nn.functional.cross_entropy(model(inputs), inputs[:, :3].argmax(1)).backward()
        gradients = {name: method.weights[name].grad.detach().clone() for name in names}
        for name, value in latent.items():
            scale = torch.tensor(scales[name], requires_grad=True)
            ratio = value / scale
            size = (ratio.abs() - 0.5).ceil().clamp(levels.grid[0], highest).detach()
            level = torch.where(value == 0, 0, torch.where(value < 0, -size, size))
            inside = ratio.abs() < highest
            used = torch.where(inside, (level - ratio).detach() + ratio, level) * scale
            torch.testing.assert_close(used.detach(), method.weights[name].detach())
            (used * gradients[name]).sum().backward()
            assert scale.grad is not None
            kept = int((value != 0).sum())
            scales[name] -= lr * float(scale.grad) / (kept * highest) ** 0.5
            whole[name] -= lr * (gradients[name] + decay * (value == 0) * whole[name])
        optimizer.step()
        optimizer.zero_grad()
        method.step()
        for name in names:
            assert method.moving[name].scale == pytest.approx(scales[name], rel=1e-4)
            assert (pattern & levels).contains(method.weights[name])
    assert not method.approximate
    used = {name: weight.detach().clone() for name, weight in method.weights.items()}
    method.finalize()
    assert all(torch.equal(used[name], method.weights[name]) for name in names)


def test_one_shot_masks_are_magnitude_pruning_without_a_schedule() -> None:
    """ASP: mask the trained network once, by magnitude, and train again."""
    model = small_model()
    expected = NM(2, 4).project(model[0].weight)
    method = GMP(NM(2, 4), epochs=0, retrain_epochs=2).attach(model)
    (phase,) = method.phases()
    assert (phase.name, phase.epochs) == ("retrain", 2)
    method.begin(phase, 20)
    assert torch.equal(model[0].weight, expected)
    train(model, method, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 20)
    assert torch.equal(model[0].weight != 0, expected != 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": -1e-4}, "decay"),
        ({"interval": 0}, "interval"),
        ({"mode": "both"}, "mode"),
        ({"precondition": 2}, "precondition: .*needs mode: decoupled"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SRSTE(NM(2, 4), **options)


def test_stages_may_start_from_the_untrained_network(tmp_path: Path) -> None:
    """The dense network is trained only to be compared with; its weights may also be given."""
    stage = {"method": "srste", "set": "nm", "n": 2, "m": 4, "epochs": 1, "lr": 1e-9}
    recipe = {
        "train": {"epochs": 1, "batch_size": 64, "lr": 5e-3, "threads": 1},
        "scratch": True,
        "stages": [{**stage, "layers": {"3": "dense"}}],
        "export": {"onnx": False},
    }
    first = sc.compress(digits_task(), recipe, out=tmp_path / "first")
    recipe["weights"] = str(tmp_path / "first" / "checkpoint" / "dense.safetensors")
    second = sc.compress(digits_task(), recipe, out=tmp_path / "second")
    untrained = digits_network()
    for result in (first, second):
        weight = result.model[1].weight
        assert NM(2, 4).contains(weight)
        torch.testing.assert_close(weight, NM(2, 4).project(untrained[1].weight), atol=1e-6, rtol=0)
        torch.testing.assert_close(result.model[3].weight, untrained[3].weight, atol=1e-6, rtol=0)
        assert result.report["accuracy"]["dense"] > 0.7
        assert result.report["history"][-1]["sad"] == result.report["history"][-1]["sad.1"] >= 0
    assert first.report["accuracy"]["dense"] == second.report["accuracy"]["dense"]
    assert len(second.report["history"]) == 1
