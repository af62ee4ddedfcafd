"""What each layer of a model will become: one row per layer, printable before any training."""

from __future__ import annotations

import fnmatch
import functools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import NonFiniteError, RecipeError, did_you_mean
from secateur.sets import ConstraintSet, Intersection, Levels, Unstructured
from secateur.sets.base import top_k

PRUNABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers whose weight has outputs in dimension 0 and a GEMM matrix behind it."""


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
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    set: ConstraintSet | None = None
    pooled: bool = False
    note: str = ""

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
    """

    rows: tuple[Row, ...]
    keep: int = 0

    @property
    def compressed(self) -> tuple[Row, ...]:
        """The rows whose weights get a constraint set."""
        return tuple(row for row in self.rows if row.set is not None)

    def project(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Project every planned weight onto its set; pooled rows share one top-k by magnitude.

        Args:
            weights: parameter name to tensor, for the rows of :attr:`compressed`.

        Raises:
            NonFiniteError: a weight holds NaN or infinity; the message names its layer.
        """
        sets = self._share(weights)
        projected = {}
        for row in self.compressed:
            try:
                projected[row.parameter] = sets[row.layer].project(weights[row.parameter])
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

        Where a row asks for levels alone and its weight has zeros, the levels are joined with
        "no more non-zeros than now".
        """

        def narrowed(row: Row) -> Row:
            if not isinstance(row.set, Levels) or row.set.zero:
                return row
            kept = int(weights[row.parameter].count_nonzero())
            if kept == row.weights:
                return row
            return replace(row, set=Intersection(Unstructured(keep=kept), row.set))

        return replace(self, rows=tuple(narrowed(row) for row in self.rows))

    def relaxed(self, exponent: float) -> Plan:
        """Return an easier plan on the way to this one: density ``d`` becomes ``d ** exponent``.

        Levels are left to the full plan, whose exponent is 1.
        """
        if exponent == 1:
            return self
        rows = tuple(_relaxed(row, exponent) for row in self.rows)
        total = sum(row.weights for row in rows if row.pooled)
        keep = round(total * (self.keep / total) ** exponent) if total else 0
        return Plan(rows, keep)

    def _share(self, weights: Mapping[str, Tensor]) -> dict[str, ConstraintSet]:
        """Return each row's set; pooled rows get their part of the budget as ``keep``."""
        sets = {row.layer: row.set for row in self.compressed if row.set is not None}
        pooled = [row for row in self.compressed if row.pooled]
        if pooled:
            magnitudes = [weights[row.parameter].detach().abs().flatten() for row in pooled]
            marks = top_k(torch.cat(magnitudes).nan_to_num(), self.keep)
            for row, part in zip(
                pooled, torch.split(marks, [len(m) for m in magnitudes]), strict=True
            ):
                sets[row.layer] = _with_keep(row.set, int(part.sum()))
        return sets


def build_plan(
    model: nn.Module,
    target: ConstraintSet,
    *,
    scope: str = "global",
    layers: Mapping[str, Mapping[str, Any] | str] | None = None,
) -> Plan:
    """Match a constraint set to the layers of a model.

    Args:
        model: its convolutions and linear layers are planned, everything else stays dense.
        target: the set of every layer that ``layers`` does not mention.
        scope: ``global`` for one budget over all those layers, ``layer`` for one each.
        layers: exceptions by layer name, glob of names or module type (in this order of
            precedence): fields of the set to change, or ``"dense"``.

    Raises:
        RecipeError: a pattern matches no layer, or a field does not exist.
    """
    exceptions = dict(layers or {})
    candidates = [(n, m) for n, m in model.named_modules() if isinstance(m, PRUNABLE)]
    if not candidates:
        raise RecipeError("model: it has no convolution or linear layer to compress.")
    for pattern in exceptions:
        if not any(_matches(pattern, name, module) for name, module in candidates):
            names = [name for name, _ in candidates]
            raise RecipeError(
                f"layers: '{pattern}' matches no layer.{did_you_mean(pattern, names)}\n"
                f"Layers are {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}."
            )
    rows = [_row(name, module, target, scope, exceptions) for name, module in candidates]
    rows.extend(_left_dense(model, {name for name, _ in candidates}))
    base = _pattern(target)
    total = sum(row.weights for row in rows if row.pooled)
    keep = base.count(total) if isinstance(base, Unstructured) else 0
    return Plan(tuple(rows), keep)


def _row(
    name: str,
    module: nn.Module,
    target: ConstraintSet,
    scope: str,
    exceptions: Mapping[str, Mapping[str, Any] | str],
) -> Row:
    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    row = Row(name, type(module).__name__, shape)
    ranks = (name, *(p for p in exceptions if p != name and _matches(p, name, module)))
    matching = sorted((p for p in ranks if p in exceptions), key=lambda p: _rank(p, name))
    if not matching:
        pooled = scope == "global" and isinstance(_pattern(target), Unstructured)
        return replace(row, set=target, pooled=pooled)
    change = exceptions[matching[0]]
    if isinstance(change, str):
        return replace(row, note=f"left dense by '{matching[0]}'")
    return replace(row, set=_changed(target, change, matching[0]))


def _rank(pattern: str, name: str) -> int:
    return 0 if pattern == name else 1 if any(c in pattern for c in "*?[") else 2


def _matches(pattern: str, name: str, module: nn.Module) -> bool:
    return (
        pattern == name
        or fnmatch.fnmatchcase(name, pattern)
        or pattern in {kind.__name__ for kind in type(module).__mro__}
    )


def _left_dense(model: nn.Module, planned: set[str]) -> Iterator[Row]:
    """Yield a row for every other module that holds parameters of its own."""
    for name, module in model.named_modules():
        if name in planned:
            continue
        own = dict(module.named_parameters(recurse=False))
        for parameter in own.values():
            kind = type(module).__name__
            yield Row(name, kind, tuple(parameter.shape), note=f"left dense: {kind}")
            break


def _pattern(target: ConstraintSet) -> ConstraintSet:
    return target.pattern if isinstance(target, Intersection) else target


def _with_keep(target: ConstraintSet | None, keep: int) -> ConstraintSet:
    pattern = Unstructured(keep=keep)
    return Intersection(pattern, target.levels) if isinstance(target, Intersection) else pattern


def _relaxed(row: Row, exponent: float) -> Row:
    if row.set is None:
        return row
    pattern = _pattern(row.set)
    if isinstance(pattern, Unstructured):
        count = pattern.count(row.weights)
        share = (count / row.weights) ** exponent
        return replace(row, set=Unstructured(keep=round(row.weights * share)))
    return replace(row, set=None, note="values are quantized in the last step")


def _changed(target: ConstraintSet, change: Mapping[str, Any], pattern: str) -> ConstraintSet:
    """Return ``target`` with some fields of its parts replaced."""
    parts = [target.pattern, target.levels] if isinstance(target, Intersection) else [target]
    known = {field.name for part in parts for field in fields(part)}  # type: ignore[arg-type]
    for key in change:
        if key not in known:
            raise RecipeError(
                f"layers.{pattern}.{key}: no such option.{did_you_mean(key, known)}\n"
                f"Options here are {', '.join(sorted(known))}."
            )

    def changed(part: ConstraintSet) -> ConstraintSet:
        own = {f.name: change[f.name] for f in fields(part) if f.name in change}  # type: ignore[arg-type]
        if isinstance(part, Unstructured) and own:
            return Unstructured(**own)  # keep and density exclude each other
        return replace(part, **own)  # type: ignore[type-var]

    return functools.reduce(operator.and_, map(changed, parts))
