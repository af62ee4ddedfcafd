"""What a network in training costs of each thing that it has a budget of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur.errors import RecipeError
from secateur.gates import Gate
from secateur.methods.bops import FULL_BITS, BopCount
from secateur.methods.costs import Cost, State
from secateur.methods.pressure import straight_through


class Ledger:
    """Costs beside their limits.

    Args:
        count: of the network.
        costs: by kind.
        limits: by kind, in its units.
    """

    def __init__(
        self, count: BopCount, costs: Mapping[str, Cost], limits: Mapping[str, float]
    ) -> None:
        self.count, self.costs, self.limits = count, costs, limits

    def state(self) -> State:
        """Return whole bits and open channels as they are now."""
        bits = torch.tensor(list(self.count.widths().values()), dtype=torch.float64).view(-1, 2)
        kept = self.count.kept(lambda gate: gate.open().float()).detach().double().cpu()
        return State(bits[:, 0], bits[:, 1], kept)

    def trained(self, softness: float) -> State:
        """Return the same with gradients.

        Args:
            softness: certainty of a gate over which its surrogate rises.
        """

        def smooth(gate: Gate) -> Tensor:
            whole = gate.open().to(gate.factor)
            return straight_through(whole, torch.sigmoid(gate.certainty() / softness))

        whole, bits = self.state(), self.count.real_bits().double().cpu()
        return State(
            straight_through(whole.weights, bits[:, 0]),
            straight_through(whole.inputs, bits[:, 1]),
            self.count.kept(smooth).double().cpu(),
        )

    def least(self, positions: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> State:
        """Return the fewest bits and channels that the network can have.

        Args:
            positions: widths that weights and inputs of a layer may have, rising, by name.
        """
        full = ((FULL_BITS,), (FULL_BITS,))
        pairs = [positions.get(product.name, full) for product in self.count.products]
        bits = [torch.tensor([float(p[side][0]) for p in pairs]).double() for side in (0, 1)]
        kept = self.count.kept(lambda gate: gate.least().float()).double().cpu()
        return State(bits[0], bits[1], kept)

    def totals(self, state: State) -> dict[str, Tensor]:
        """Return what a state costs of each kind."""
        return {kind: each.total(state) for kind, each in self.costs.items()}

    def spent(self, state: State) -> dict[str, float]:
        """Return the share of each limit that a state takes."""
        return {kind: float(each) / self.limits[kind] for kind, each in self.totals(state).items()}

    def excess(self, state: State) -> Tensor:
        """Return the largest log(cost / limit); positive is too much."""
        logs = [(each / self.limits[kind]).log() for kind, each in self.totals(state).items()]
        return torch.stack(logs).max()

    @torch.no_grad()
    def guess(self) -> float:
        """Return the excess of the network by what :meth:`now` has found of its weights."""
        return float(self.excess(self.state()))

    @torch.no_grad()
    def now(self, still: bool = False) -> float:
        """Return the excess of the network as it is.

        Args:
            still: whether its weights are those of the last call, and need no second look.
        """
        state = self.state()
        for each in self.costs.values():
            each.measure(state, still)
        return float(self.excess(state))

    def require(self, least: State) -> None:
        """Raise RecipeError if the least that the network can become exceeds a limit."""
        for kind, each in self.costs.items():
            total, limit = float(each.total(least)), self.limits[kind]
            if total > limit:
                raise _impossible(kind, limit, total, self._shares(each, least))

    def _shares(self, cost: Cost, state: State) -> dict[str, float]:
        names = [product.name for product in self.count.products]
        parts = dict(zip(names, cost.layers(state).tolist(), strict=True))
        return {**parts, "all else": float(cost.rest(state))}


def _impossible(kind: str, limit: float, least: float, parts: Mapping[str, float]) -> RecipeError:
    largest = sorted(parts, key=lambda name: -parts[name])[:4]
    what = ", ".join(f"{name or 'the model'} {parts[name] / least:.0%}" for name in largest)
    return RecipeError(
        f"budget.{kind}: {limit:.4g}, but with the fewest bits and channels it is {least:.4g} "
        f"still.\nOf these take {what}.\n"
        f"Remedy: ask for {_up(least)} at least, allow fewer bits, or gates where there are none."
    )


def _up(number: float) -> str:
    """Write a number to four digits, rounded up."""
    unit = 10 ** (math.floor(math.log10(number)) - 3)
    return f"{math.ceil(number / unit) * unit:.4g}"
