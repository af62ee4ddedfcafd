"""Distribute a budget over the layers of a plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal, get_args

from torch import nn

from secateur.allocation.budget import Budget
from secateur.allocation.candidates import Candidates, largest
from secateur.allocation.magnitude import Threshold
from secateur.allocation.measure import MEASURES, Costs, Measure
from secateur.allocation.result import Allocation, Share, concrete
from secateur.allocation.sensitivity import Loss, Sensitivity
from secateur.allocation.targets import at_share, least_share, with_bits
from secateur.allocation.units import KINDS
from secateur.artifact import packed
from secateur.errors import RecipeError, did_you_mean
from secateur.plan import Plan, Row

By = Literal["magnitude", "sensitivity"]
WAYS: tuple[By, ...] = get_args(By)
"""How a budget can be distributed."""


def allocate(
    model: nn.Module,
    plan: Plan,
    budget: Budget,
    *,
    by: By = "magnitude",
    loss: Loss | None = None,
    bits: Sequence[int] = (),
    fixed: Collection[str] = (),
    overhead: int | None = None,
    dense: float | None = None,
) -> Allocation:
    """Decide what every layer of a plan keeps, so that the network meets a budget.

    By ``magnitude`` one threshold cuts all layers. By ``sensitivity`` the sum of what the layers'
    projections add to the loss, each alone, is minimized. Either way the cost is measured on the
    model's weights, projected, and is at most the budget. Training changes which weights stay, so
    that bits of indices move a little afterwards.

    Args:
        model: with the trained, dense weights; it comes back unchanged.
        plan: names the sets; what their patterns keep is decided here.
        budget: of the whole network.
        by: ``magnitude`` or ``sensitivity``.
        loss: of the model on calibration data, in evaluation mode and the same at every call; for
            sensitivity, which calls it about ``8 * max(1, len(bits))`` times per layer.
        bits: widths of levels to choose from, by sensitivity; by default as the plan says.
        fixed: names of layers that keep what the plan says and count towards the budget.
        overhead: bytes of the packed file that no tensor takes (``packed.overhead_bytes``); by
            default those of a file that names no architecture.
        dense: what the dense network takes, in the budget's units (``Measure.dense``); by default
            what the model does, which is less where an earlier stage has cut it.

    Raises:
        RecipeError: an argument makes no sense, or the budget cannot be met.
        NonFiniteError: a weight or the loss is NaN or infinite.
    """
    _check(plan, by, loss, bits, fixed)
    rows = tuple(concrete(row) if row.layer in fixed else row for row in plan.rows)
    plan = replace(plan, rows=rows, keep=0)
    overhead = packed.overhead_bytes(model, reference=None) if overhead is None else overhead
    measure = MEASURES[budget.kind](model, plan, overhead)
    dense = measure.dense(model, plan) if dense is None else dense
    limit = budget.limit(dense)
    least = _least(plan, bits, fixed)
    costs = measure.of(least)
    if costs.total > limit:
        raise _impossible(budget, limit, costs, KINDS[budget.kind].name)
    candidates: Candidates = Threshold(plan, measure, fixed)
    if by == "sensitivity":
        assert loss is not None
        candidates = Sensitivity(plan, measure, fixed, loss, bits, limit)
    chosen, costs = largest(candidates, measure, limit, (least, costs))
    layers = tuple(_share(row, measure, costs, candidates) for row in chosen.compressed)
    return Allocation(chosen, budget, by, limit, costs.total, dense, measure.rest, layers)


def _share(row: Row, measure: Measure, costs: Costs, candidates: Candidates) -> Share:
    before, after = measure.weights[row.parameter], costs.projected[row.parameter]
    kept = after != 0
    energy = before.double().square()
    loss, price = candidates.why(row)
    return Share(
        layer=row.layer,
        target=str(row.set),
        weights=row.weights,
        kept=int(kept.sum()),
        cost=costs.layers[row.layer],
        share=costs.layers[row.layer] / costs.total,
        energy=float(energy[kept].sum() / energy.sum().clamp(min=1e-300)),
        loss=loss,
        price=price,
    )


def _least(plan: Plan, bits: Sequence[int], fixed: Collection[str]) -> Plan:
    """Return the plan that keeps one unit in every layer, at the fewest bits."""

    def smallest(row: Row) -> Row:
        if row.set is None or row.layer in fixed:
            return row
        target = with_bits(row.set, min(bits)) if bits else row.set
        return replace(row, set=at_share(row, target, least_share(row)), pooled=False)

    return replace(plan, rows=tuple(smallest(row) for row in plan.rows))


def _impossible(budget: Budget, limit: float, least: Costs, unit: str) -> RecipeError:
    """Return an error that says what stands in the way of a budget."""
    parts = sorted({**least.rest, **least.layers}.items(), key=lambda part: -part[1])
    largest_parts = ", ".join(f"{name} {cost:,.0f}" for name, cost in parts[:4])
    return RecipeError(
        f"budget.{budget.kind}: {limit:,.0f} {unit}, but with one unit left in each layer it is "
        f"{least.total:,.0f} still.\nOf these take {largest_parts}"
        f"{' ...' if len(parts) > 4 else ''}.\n"
        f"Remedy: ask for {least.total:,.0f} {unit} at least, or make these smaller."
    )


def _check(
    plan: Plan, by: str, loss: Loss | None, bits: Sequence[int], fixed: Collection[str]
) -> None:
    """Refuse arguments that make no sense."""
    if by not in WAYS:
        raise RecipeError(
            f"allocation: there is no way {by!r}; one of {', '.join(WAYS)}."
            f"{did_you_mean(str(by), WAYS)}"
        )
    if not plan.compressed:
        raise RecipeError("budget: the plan has no layer to spend it on; all stay dense.")
    layers = [row.layer for row in plan.compressed]
    for name in fixed:
        if name not in layers:
            raise RecipeError(
                f"fixed: '{name}' is no layer of the plan.{did_you_mean(name, layers)}"
            )
    if by == "sensitivity" and loss is None:
        raise RecipeError("loss: allocation by sensitivity needs a loss on calibration data.")
    if bits and by != "sensitivity":
        raise RecipeError(
            f"bits: {list(bits)} to choose from, but magnitudes say nothing about bits.\n"
            "Remedy: give one width, or allocate by sensitivity."
        )
    if bits and not any(row.set and row.set.split()[1] for row in plan.compressed):
        raise RecipeError(f"bits: {list(bits)} to choose from, but no set of the plan has levels.")
