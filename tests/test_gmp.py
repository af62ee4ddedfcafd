"""Gradual magnitude pruning against its definition."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.methods import GMP, Phase
from secateur.plan import build_plan
from secateur.sets import Levels, Unstructured
from tiny import small_model, train

TOTAL = 128 + 48


def kept(weights: Mapping[str, Tensor]) -> list[int]:
    return [int(weight.count_nonzero()) for weight in weights.values()]


def shake(model: nn.Module) -> None:
    """Move every parameter, pruned or not, as an optimizer with momentum does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("initial", [None, 0.7])
@pytest.mark.parametrize(("epochs", "interval", "updates"), [(3, 7, 8), (2, 1, 40), (1, 99, 1)])
def test_the_number_of_weights_follows_the_cubic_schedule(
    initial: float | None, epochs: int, interval: int, updates: int
) -> None:
    """s_t = s_f + (s_i - s_f)(1 - t/n)^3, equation 1 of the paper, at every optimizer step."""
    model, final, start = small_model(), 9 / TOTAL, initial or 1.0
    method = GMP(Unstructured(keep=9), interval=interval, initial_density=initial)
    method.attach(model)
    method.begin(Phase("gmp", epochs), 20)
    steps = epochs * 20
    for step in range(steps + 1):
        done = min(step // min(interval, steps), updates)
        sparsity = (1 - final) + (final - start) * (1 - done / updates) ** 3
        assert sum(kept(method.weights)) == round(TOTAL * (1 - sparsity))
        assert method.metrics() == {"density": sum(kept(method.weights)) / TOTAL}
        shake(model)
        method.step()
    assert sum(kept(method.weights)) == 9


def test_the_smallest_weights_go_and_never_come_back() -> None:
    model = small_model()
    method = GMP(Unstructured(density=0.1), interval=3).attach(model)
    method.begin(Phase("gmp", 1), 30)
    alive = torch.ones(TOTAL, dtype=torch.bool)
    for step in range(1, 31):
        shake(model)
        before = torch.cat([weight.detach().flatten() for weight in method.weights.values()])
        method.step()
        after = torch.cat([weight.detach().flatten() for weight in method.weights.values()])
        magnitude = torch.where(alive, before.abs(), 0.0)
        left = int(after.count_nonzero()) if step % 3 == 0 else int(alive.sum())
        largest = magnitude.argsort(descending=True, stable=True)[:left]
        alive = torch.zeros(TOTAL, dtype=torch.bool)
        alive[largest] = True
        assert torch.equal(after, torch.where(alive, before, 0.0))


def test_layers_with_their_own_targets_each_follow_their_part() -> None:
    model = small_model()
    plan = build_plan(model, Unstructured(density=0.1), layers={"2": {"density": 0.5}})
    method = GMP(plan, interval=1).attach(model)
    method.begin(Phase("gmp", 1), 10)
    previous = [128, 48]
    for _ in range(10):
        shake(model)
        method.step()
        now = kept(method.weights)
        assert now[0] / 128 <= now[1] / 48
        assert all(one <= two for one, two in zip(now, previous, strict=True))
        previous = now
    assert previous == [13, 24]


def test_equal_targets_by_layer_follow_the_schedule_in_each() -> None:
    model = small_model()
    plan = build_plan(model, Unstructured(density=1 / 16), scope="layer")
    method = GMP(plan, interval=1).attach(model)
    method.begin(Phase("gmp", 1), 4)
    for step in range(1, 5):
        method.step()
        density = 1 / 16 + 15 / 16 * (1 - step / 4) ** 3
        assert kept(method.weights) == [round(128 * density), round(48 * density)]


def test_levels_come_with_retraining() -> None:
    model = small_model()
    target = Unstructured(density=0.25) & Levels(2)
    method = GMP(build_plan(model, target, scope="layer"), interval=1).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    pruning, retraining = method.phases()
    method.begin(pruning, 20)
    train(model, method, optimizer, 20 * pruning.epochs)
    assert kept(method.weights) == [32, 12]
    assert all(len(weight.unique()) > 9 for weight in method.weights.values())
    method.begin(retraining, 20)
    assert all(target.contains(weight) for weight in method.weights.values())


def test_levels_alone_prune_nothing() -> None:
    model = small_model()
    method = GMP(Levels(3), epochs=1).attach(model)
    method.begin(method.phases()[0], 20)
    train(model, method, torch.optim.Adam(model.parameters(), 1e-2), 20)
    assert method.metrics() == {"density": 1.0}
    method.finalize()
    assert all(Levels(3).contains(weight) for weight in method.weights.values())


def test_a_network_pruned_before_starts_from_its_own_density() -> None:
    model = small_model()
    with torch.no_grad():
        model[0].weight[:, 3:] = 0
    method = GMP(Unstructured(density=0.1)).attach(model)
    method.begin(Phase("gmp", 1), 300)
    assert (method.interval, method.updates) == (3, 100)
    for _ in range(3):
        shake(model)
        method.step()
    now = (16 * 3 + 48) / TOTAL
    final = 18 / TOTAL
    assert sum(kept(method.weights)) == round(TOTAL * (final + (now - final) * 0.99**3))
    assert not model[0].weight[:, 3:].any()


def test_the_penalty_is_zero() -> None:
    assert float(GMP(Unstructured(density=0.1)).attach(small_model()).penalty()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_density": 0}, "initial_density"),
        ({"interval": 0}, "interval"),
        ({"rho": 1}, "rho"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GMP(Unstructured(density=0.1), **options)
