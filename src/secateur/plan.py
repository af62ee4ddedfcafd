"""What each layer of a model will become: one row per layer, printable before any training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur import norms
from secateur.by_layer import changed, first_match, matches
from secateur.channels import ChannelGraph
from secateur.errors import NonFiniteError, RecipeError, did_you_mean
from secateur.paths import useless, without_useless
from secateur.sets import ConstraintSet, Levels, Unstructured, join
from secateur.sets.base import energy, put_parts, top_k
from secateur.sets.intersection import cover

PRUNABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers whose weight has outputs in dimension 0 and a GEMM matrix behind it."""

BIAS = Levels(bits=8, zero=True)
"""What the bias of a compressed layer becomes when training is over."""


@dataclass(frozen=True)
class Row:
    """One layer of a plan.

    Attributes:
        layer: the module's name, for example ``features.0``.
        kind: the module's class name.
        shape: of its weight.
        set: the constraint set its weight will be a member of, or None if it stays dense.
        pooled: whether its ``keep`` is a share of the plan's global budget.
        note: why it stays dense, in plain words.
        norm: the BatchNorm whose scale weighs its filters; empty if they count as they are.
        stated: whether what it keeps was said for it by name.
        owner: the layer whose weight this is, planned there alone; empty if it is its own.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    set: ConstraintSet | None = None
    pooled: bool = False
    note: str = ""
    norm: str = ""
    stated: bool = False
    owner: str = ""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()

    @property
    def parameter(self) -> str:
        """The weight's name in the model's state dict."""
        return f"{self.layer}.weight" if self.layer else "weight"

    @property
    def bias(self) -> str:
        """The bias's name in the model's state dict, if the layer has one."""
        return f"{self.layer}.bias" if self.layer else "bias"


@dataclass(frozen=True)
class Plan:
    """Rows for every layer, and one budget for those that share it.

    Attributes:
        rows: in the order of ``model.named_modules()``.
        keep: number of non-zeros over all pooled rows together.
        graph: of the model's channels, if budgets are path-aware.
    """

    rows: tuple[Row, ...]
    keep: int = 0
    graph: ChannelGraph | None = field(default=None, compare=False, repr=False)

    @property
    def compressed(self) -> tuple[Row, ...]:
        """The rows whose weights get a constraint set."""
        return tuple(row for row in self.rows if row.set is not None)

    def project(
        self, weights: Mapping[str, Tensor], model: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """Project every planned weight onto its set; pooled rows share one top-k by magnitude.

        With a path-aware budget, weights that no longer reach an output, or that nothing but a
        constant reaches, are dropped and what they took goes to the next largest, until none is
        left.

        Args:
            weights: parameter name to tensor, for the rows of :attr:`compressed`.
            model: where rows that name a ``norm`` find it, as it is now.

        Raises:
            NonFiniteError: a weight holds NaN or infinity; the message names its layer.
        """
        if self.graph is None:
            return self._project(weights, model)
        if all(row.pooled for row in self.compressed):  # the same, without projecting every time
            gains = self._gains(weights, self.metrics(model))
            weights = without_useless(
                self.graph, {name: weights[name] for name in gains}, gains, self.keep
            )
        while True:
            projected = self._project(weights, model)
            spent = useless(self.graph, projected)
            if not any(bool(each.any()) for each in spent.values()):
                return projected
            weights = {
                name: weight.detach().masked_fill(spent[name], 0) if name in spent else weight
                for name, weight in weights.items()
            }

    def part_(
        self,
        weights: Mapping[str, Tensor],
        rest: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        model: nn.Module,
        factor: float = 1.0,
    ) -> None:
        """Take every planned weight with its rest apart, in place; see ``ConstraintSet.part_``.

        Raises:
            NonFiniteError: as :meth:`project`, unless a set lets what is not finite stay.
        """
        rows = self.compressed
        if self.graph is None and not any(row.pooled or row.norm for row in rows):
            for row in rows:
                assert row.set is not None
                name = row.parameter
                row.set.part_(weights[name], rest[name], masks[name], factor)
            return
        names = [row.parameter for row in rows]
        whole = {name: weights[name] + factor * rest[name] for name in names}
        for name, member in self.project({**weights, **whole}, model).items():
            put_parts(whole[name], member, weights[name], rest[name], masks[name])

    def metrics(self, model: nn.Module | None) -> dict[str, Tensor]:
        """Return what the elements of each layer count for, by layer; those absent count as 1."""
        return {
            row.layer: norms.metric(model.get_submodule(row.norm), len(row.shape))
            for row in self.compressed
            if row.norm and model is not None
        }

    def _project(self, weights: Mapping[str, Tensor], model: nn.Module | None) -> dict[str, Tensor]:
        metrics = self.metrics(model)
        sets = self._share(weights, metrics)
        projected = {}
        for row in self.compressed:
            weight = weights[row.parameter]
            try:
                projected[row.parameter] = sets[row.layer].project(weight, metrics.get(row.layer))
            except NonFiniteError as error:
                raise NonFiniteError(f"{row.layer}: {error}") from error
        return projected

    def sets(self, weights: Mapping[str, Tensor]) -> dict[str, ConstraintSet]:
        """Return, by layer, the set that holds these projected weights."""
        return {
            row.layer: _with_keep(row.set, int(weights[row.parameter].count_nonzero()))
            if row.pooled
            else row.set
            for row in self.compressed
            if row.set is not None
        }

    def within(self, weights: Mapping[str, Tensor]) -> Plan:
        """Return this plan for weights that an earlier stage pruned: zeros are not levels.

        Where a row asks for levels without zero and its weight has zeros in what would be kept
        whole, "no more non-zeros than now" goes before the row's set.
        """

        def narrowed(row: Row) -> Row:
            patterns, levels = row.set.split() if row.set else ((), None)
            if levels is None or levels.zero or any(each.elementwise for each in patterns):
                return row
            live = weights[row.parameter] != 0
            if torch.equal(live, cover(patterns, live)):
                return row
            return replace(row, set=join((Unstructured(keep=int(live.sum())), *patterns), levels))

        return replace(self, rows=tuple(narrowed(row) for row in self.rows))

    def fitted(self, model: nn.Module) -> Plan:
        """Return this plan for a model that has lost channels since: shares become the counts that
        they are of the network as it was."""
        parameters = dict(model.named_parameters(remove_duplicate=False))

        def narrower(row: Row) -> Row:
            shape = tuple(parameters[row.parameter].shape) if row.parameter in parameters else None
            if shape is None or shape == row.shape:
                return row
            return replace(row, shape=shape, set=row.set.fixed(row.shape) if row.set else None)

        rows = tuple(narrower(row) for row in self.rows)
        if rows == self.rows:
            return self
        graph = self.graph and ChannelGraph(model, self.graph.example_input)
        return replace(self, rows=rows, graph=graph)

    @property
    def positional(self) -> str:
        """Name of a set for which channels must stay where they are, or empty."""
        patterns = (part for row in self.compressed if row.set for part in row.set.split()[0])
        return next((part.name for part in patterns if part.positional), "")

    def without_levels(self) -> Plan:
        """Return the plan of zeros alone, for methods that prune first and quantize later."""

        def pruned(row: Row) -> Row:
            patterns, levels = row.set.split() if row.set else ((), None)
            if patterns:
                return replace(row, set=join(patterns, None))
            late = "values are quantized later"
            return replace(row, set=None, note=late if levels else row.note)

        return replace(self, rows=tuple(pruned(row) for row in self.rows))

    def relaxed(self, exponent: float) -> Plan:
        """Return an easier plan on the way to this one: density ``d`` becomes ``d ** exponent``.

        Levels are left to the full plan, whose exponent is 1.
        """
        if exponent == 1:
            return self

        def easier(row: Row) -> Row:
            target = row.set.relaxed(row.shape, exponent) if row.set else None
            late = "values are quantized in the last step"
            return replace(row, set=target, note=late if row.set and not target else row.note)

        total = sum(row.weights for row in self.rows if row.pooled)
        keep = round(total * (self.keep / total) ** exponent) if total else 0
        return replace(self, rows=tuple(easier(row) for row in self.rows), keep=keep)

    def _share(
        self, weights: Mapping[str, Tensor], metrics: Mapping[str, Tensor]
    ) -> dict[str, ConstraintSet]:
        """Return each row's set; pooled rows get their part of the budget as ``keep``."""
        sets = {row.layer: row.set for row in self.compressed if row.set is not None}
        pooled = [row for row in self.compressed if row.pooled]
        if pooled:
            gains = [each.flatten() for each in self._gains(weights, metrics).values()]
            marks = top_k(torch.cat(gains).nan_to_num(), self.keep)
            for row, part in zip(pooled, torch.split(marks, [len(g) for g in gains]), strict=True):
                sets[row.layer] = _with_keep(row.set, int(part.sum()))
        return sets

    def _gains(
        self, weights: Mapping[str, Tensor], metrics: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return, by parameter name, what elements of pooled rows compete with for the budget."""
        return {
            row.parameter: energy(weights[row.parameter].detach(), metrics.get(row.layer))
            for row in self.compressed
            if row.pooled
        }


def build_plan(
    model: nn.Module,
    target: ConstraintSet,
    *,
    scope: str = "global",
    layers: Mapping[str, Mapping[str, Any] | str] | None = None,
    metric: str = "plain",
    path_aware: Tensor | None = None,
    round_to: int = 1,
) -> Plan:
    """Match a constraint set to the layers of a model.

    Args:
        model: its convolutions and linear layers are planned, everything else stays dense. A weight
            that several layers share is planned as that of the first.
        target: the set of every layer that ``layers`` does not mention.
        scope: ``global`` for one budget over all those layers, ``layer`` for one each. A set other
            than ``Unstructured``, with or without levels, always has one each.
        layers: exceptions by layer name, glob of names or module type (in this order of
            precedence): fields of the set to change, also by the name of the set they belong to
            (``{"column": {"keep": 3}}``), or ``"dense"``.
        metric: ``batchnorm`` weighs the filters of a layer by the scale of the BatchNorm that
            directly follows it (:func:`secateur.norms.following`), ``plain`` never does.
        path_aware: an example input, a batch of one; with it no budget is spent on weights that
            do not matter to any output (:meth:`Plan.project`).
        round_to: how many filters and channels a layer keeps becomes a multiple of this.

    Raises:
        ChannelError: budgets are to be path-aware and the model cannot be traced.
        RecipeError: a pattern matches no layer, a field does not exist or belongs to two parts of
            the set, or no layer is followed by a BatchNorm.
    """
    exceptions = dict(layers or {})
    candidates = [(n, m) for n, m in model.named_modules() if isinstance(m, PRUNABLE)]
    if not candidates:
        raise RecipeError("model: it has no convolution or linear layer to compress.")
    for pattern in exceptions:
        if not any(matches(pattern, name, module) for name, module in candidates):
            names = [name for name, _ in candidates]
            raise RecipeError(
                f"layers: '{pattern}' matches no layer.{did_you_mean(pattern, names)}\n"
                f"Layers are {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}."
            )
    patterns, _ = target.split()
    alone = len(patterns) == 1 and scope == "global"
    sharing = [each for each in patterns if alone and isinstance(each, Unstructured)]
    owners: dict[Any, str] = {}
    for name, module in candidates:
        owners.setdefault(module.weight, name)
    rows = [
        _shared(name, module, owner)
        if (owner := owners[module.weight]) != name
        else _row(name, module, target, bool(sharing), exceptions)
        for name, module in candidates
    ]
    rows = [replace(row, set=row.set and row.set.rounded(row.shape, round_to)) for row in rows]
    if metric == "batchnorm":
        rows = _with_norms(rows, norms.following(model))
    rows.extend(_left_dense(model, {name for name, _ in candidates}, owners))
    total = sum(row.weights for row in rows if row.pooled)
    graph = None if path_aware is None else ChannelGraph(model, path_aware)
    return Plan(tuple(rows), sum(each.count(total) for each in sharing), graph)


def _row(
    name: str,
    module: nn.Module,
    target: ConstraintSet,
    pooled: bool,
    exceptions: Mapping[str, Mapping[str, Any] | str],
) -> Row:
    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    row = Row(name, type(module).__name__, shape)
    pattern = first_match(exceptions, name, module)
    if pattern is None:
        return replace(_fitting(row, target), pooled=pooled)
    change = exceptions[pattern]
    if isinstance(change, str):
        return replace(row, note=f"left dense by '{pattern}'")
    stated = any(
        key in ("density", "keep")
        for part in (change, *(each for each in change.values() if isinstance(each, Mapping)))
        for key in part
    )
    return replace(_fitting(row, changed(target, change, pattern)), stated=stated)


def _fitting(row: Row, target: ConstraintSet) -> Row:
    """Give a row the parts of a set that fit its shape; the note says which do not, and why."""
    patterns, levels = target.split()
    reasons = {each: each.misfit(row.shape) for each in patterns}
    kept = [each for each in patterns if not reasons[each]]
    note = ", ".join(f"not {each}: {reason}" for each, reason in reasons.items() if reason)
    if kept or levels:
        return replace(row, set=join(kept, levels), note=note)
    return replace(row, note=f"left dense, {note}")


def _shared(name: str, module: nn.Module, owner: str) -> Row:
    """Return the row of a layer whose weight is planned as that of another."""
    row = Row(name, type(module).__name__, tuple(module.weight.shape))  # type: ignore[arg-type]
    return replace(row, note=f"its weight is that of {owner}", owner=owner)


def _left_dense(model: nn.Module, planned: set[str], owners: Mapping[Any, str]) -> Iterator[Row]:
    """Yield a row for every other module that holds parameters of its own."""
    for name, module in model.named_modules():
        if name in planned:
            continue
        own = dict(module.named_parameters(recurse=False))
        for parameter in own.values():
            kind = type(module).__name__
            if parameter in owners:
                yield _shared(name, module, owners[parameter])
            else:
                yield Row(name, kind, tuple(parameter.shape), note=f"left dense: {kind}")
            break


def _with_norms(rows: list[Row], following: Mapping[str, str]) -> list[Row]:
    rows = [replace(row, norm=following.get(row.layer, "") if row.set else "") for row in rows]
    if not any(row.norm for row in rows):
        raise RecipeError(
            "metric: 'batchnorm', but no layer to compress is directly followed by a BatchNorm.\n"
            "Remedy: remove it, or register each BatchNorm right after its convolution."
        )
    return rows


def _with_keep(target: ConstraintSet | None, keep: int) -> ConstraintSet:
    return join((Unstructured(keep=keep),), target.split()[1] if target else None)
