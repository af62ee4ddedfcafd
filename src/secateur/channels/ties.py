"""Labels of channels, and which labels must be kept or removed together."""

from __future__ import annotations

import torch
from torch import Tensor


class Ties:
    """Union-find over channel labels; a pinned label must stay, for the reason given.

    A label is the index of one output channel of one layer. Labels that are tied live and die
    together.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._pins: dict[int, str] = {}

    def fresh(self, shape: tuple[int, ...]) -> Tensor:
        """Return new labels, int64, in this shape."""
        start = len(self._parent)
        count = torch.Size(shape).numel()
        self._parent.extend(range(start, start + count))
        return torch.arange(start, start + count).reshape(shape)

    def _root(self, label: int) -> int:
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def tie(self, first: Tensor, second: Tensor) -> None:
        """Tie labels position by position; the shapes must broadcast."""
        if first is second:
            return
        blank = torch.zeros_like(first) + torch.zeros_like(second)
        pairs = ((labels + blank).flatten().tolist() for labels in (first, second))
        for one, other in zip(*pairs, strict=True):
            a, b = self._root(one), self._root(other)
            if a != b:
                self._parent[max(a, b)] = min(a, b)

    def tied(self, labels: Tensor, dim: int) -> bool:
        """Tell whether all labels along a dimension are tied to each other."""
        roots = [self._root(label) for label in labels.flatten().tolist()]
        found = torch.tensor(roots).view(labels.shape)
        return bool((found == found.narrow(dim, 0, 1)).all())

    def pin(self, labels: Tensor | None, reason: str) -> None:
        """Keep these labels; the first reason given to a label is the one reported."""
        if labels is not None:
            for label in labels.flatten().tolist():
                self._pins.setdefault(label, reason)

    def classes(self) -> tuple[Tensor, dict[int, str]]:
        """Return the class of every label, numbered from 0, and the reasons of pinned classes."""
        roots = torch.tensor([self._root(label) for label in range(len(self._parent))])
        if not len(roots):
            return torch.zeros(0, dtype=torch.long), {}
        _, numbers = torch.unique(roots, return_inverse=True)
        pins: dict[int, str] = {}
        for label, reason in self._pins.items():
            pins.setdefault(int(numbers[label]), reason)
        return numbers, pins
