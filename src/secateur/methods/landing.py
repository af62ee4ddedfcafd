"""From a network near its budget onto it: bits and channels, one at a time.

While a limit is exceeded, those steps down go that cost the least loss per log of cost. Then, as
long as one fits, the step up that gains the most. What is left over is spent by pairs of a step up
and steps down. Losses are measured on calibration data, each step alone, and again for what has
moved. Costs are counted exactly where the network is; of a step that is only thought of, a guess
will do, since encoding the weights of a layer takes long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.gates import Gate, Gated
from secateur.quantizers import Quantizer, input_quantizer, latent_weight, weight_quantizer

SPENT = 0.99
"""Share of a limit at which nothing is left to spend."""

BLOCKS = 16
"""Measurements of the loss over all channels of a gate."""

LEAST_GAIN = 1e-3
"""Of the log of what is spent, by a pair of steps."""

REACH, TRIED, LOWERED = 8, 32, 4
"""Steps down at most that make room for one up, pairs of them that are tried, and how many of those
with a third knob."""

SAMPLE = 2**12
"""Values of each input that ranges are fitted to."""

TOGETHER = 2.0
"""Times the least price: steps down that cost no more are taken before any is measured again. One
bit less costs four times what the last one did, so the first of them would not come again."""

LASTING = 0.25
"""Share of what rounding weights to few bits costs that training leaves: it settles weights around
their levels, while inputs go on being rounded. As if weights had one bit more."""

LEAST_RISE = 1e-6
"""Loss that a step counts for at least, so that cheap steps are told apart by their cost."""


Trade = tuple[tuple[int, int], ...]
"""Knobs by number, each with how far it moves."""


@dataclass
class Knob:
    """Something that can be set to one of several positions, from cheap to expensive.

    Attributes:
        count: number of positions.
        position: the present one.
        turn: sets the network to a position.
        block: positions that the loss is measured over at once.
        lasting: share of what a step changes the loss by that training is taken to leave.
    """

    count: int
    position: int
    turn: Callable[[int], None]
    block: int = 1
    lasting: float = 1.0

    def move(self, by: int) -> bool:
        """Turn it, if there is such a position."""
        if not 0 <= self.position + by < self.count:
            return False
        self.position += by
        self.turn(self.position)
        return True


def knobs_of(
    model: nn.Module,
    gates: Sequence[Gated],
    positions: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    run: Callable[[], object],
    floor: int = 0,
) -> list[Knob]:
    """Return the knobs of a network, and freeze it where they are.

    Args:
        model: with quantizers.
        gates: on it.
        positions: widths that weights and inputs of a layer may have, rising, by name.
        run: takes the model through calibration data, once.
        floor: fewest bits, where more are allowed.
    """
    grids: list[tuple[Quantizer, Sequence[int], Tensor | None]] = []
    for name, (weights, inputs) in positions.items():
        layer = model.get_submodule(name)
        if weight := weight_quantizer(layer):
            grids.append((weight, weights, latent_weight(layer)))
        if isinstance(grid := input_quantizer(layer), Quantizer) and not grid.waits:
            grids.append((grid, inputs, None))
    read = samples([grid for grid, _, latent in grids if latent is None], run)
    knobs = [gate_knob(each.gate) for each in gates]
    for grid, widths, latent in grids:
        allowed = [bits for bits in widths if bits >= min(floor, widths[-1])]
        values = read.get(grid) if latent is None else latent
        knobs.append(bits_knob(grid, allowed, values, 1.0 if latent is None else LASTING))
    return knobs


def bits_knob(
    quantizer: Quantizer, widths: Sequence[int], values: Tensor | None, lasting: float = 1.0
) -> Knob:
    """Return the knob of a quantizer's bits, of which these are allowed; it freezes it.

    At the width that it has, it keeps the range that was trained; at others it has the best for
    these values: few bits clip far more than many.

    Args:
        quantizer: whose width is one of the allowed or lies between two.
        widths: rising.
        values: weights, or a sample of what it is given; None if there is none.
        lasting: see :class:`Knob`.
    """
    position = sum(each < quantizer.width for each in widths[:-1])
    ranges = {position: quantizer.log2_limit.detach().clone()}

    @torch.no_grad()
    def turn(at: int) -> None:
        quantizer.freeze(widths[at])
        if at in ranges:
            quantizer.log2_limit.copy_(ranges[at])
        elif values is not None:
            quantizer.fit(values)
            ranges[at] = quantizer.log2_limit.detach().clone()

    knob = Knob(len(widths), position, turn, lasting=lasting)
    knob.turn(position)
    return knob


def samples(grids: Sequence[Quantizer], run: Callable[[], object]) -> dict[Quantizer, Tensor]:
    """Return ``SAMPLE`` or a few more values that each quantizer is given in a run, spread evenly.

    Args:
        grids: in a network.
        run: takes it through data.
    """
    seen: dict[Quantizer, list[Tensor]] = {grid: [] for grid in grids}

    def see(grid: nn.Module, given: tuple[Tensor, ...]) -> None:
        flat = given[0].detach().flatten()
        seen[grid].append(flat[:: max(1, len(flat) // SAMPLE)])  # type: ignore[index]

    hooks = [grid.register_forward_pre_hook(see) for grid in grids]
    run()
    for hook in hooks:
        hook.remove()
    every = {grid: torch.cat(parts) for grid, parts in seen.items() if parts}
    return {grid: values[:: max(1, len(values) // SAMPLE)] for grid, values in every.items()}


def gate_knob(gate: Gate) -> Knob:
    """Return the knob of how many channels of a gate are open, the surest first; it freezes it."""
    opened, must = gate.open(), gate.least()
    order = gate.certainty().detach().masked_fill(must, math.inf)
    order = order.argsort(descending=True, stable=True)
    least = int(must.sum())

    def turn(position: int) -> None:
        chosen = torch.zeros_like(opened)
        chosen[order[: least + position]] = True
        gate.freeze(chosen)

    count = gate.channels - least + 1
    knob = Knob(count, int(opened.sum()) - least, turn, max(1, count // BLOCKS))
    knob.turn(knob.position)
    return knob


def approach(
    model: nn.Module,
    positions: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    excess: Callable[[], float],
    guess: Callable[[], float],
    loss: Callable[[], float],
    floor: int,
) -> None:
    """Bring bits down until nothing is exceeded, or as near as they get, and go on training them.

    Quantizers that wait for data have their ranges set.

    Args:
        model: with quantizers; changed in place.
        positions: see :func:`knobs_of`, and so for ``floor``.
        excess: see :class:`Landing`, and so for ``guess`` and ``loss``.
    """
    grids = [each for each in model.modules() if isinstance(each, Quantizer)]
    for grid, values in samples([each for each in grids if each.waits], loss).items():
        grid.fit(values)
    before = {grid: grid.widths for grid in grids if not grid.fixed and not grid.waits}
    Landing(knobs_of(model, (), positions, loss, floor), excess, guess, loss).descend()
    for grid, widths in before.items():
        grid.release(widths)


class Landing:
    """The way onto a budget.

    Args:
        knobs: all that can be moved; their network is changed in place.
        excess: the largest log(cost / limit).
        guess: the same near where it was last asked for, at little cost.
        loss: of the network on calibration data, in evaluation mode.
    """

    def __init__(
        self,
        knobs: Sequence[Knob],
        excess: Callable[[], float],
        guess: Callable[[], float],
        loss: Callable[[], float],
    ) -> None:
        self.knobs, self.excess, self.guess, self.loss = knobs, excess, guess, loss
        self.rises: dict[tuple[int, int], float] = {}
        self.moved = [0] * len(knobs)  # since the loss was measured
        self.now: float | None = None

    @torch.no_grad()
    def land(self) -> bool:
        """Go below all limits, and spend what is left; say whether that was possible."""
        if not self.descend():
            return False
        while self.excess() < math.log(SPENT) and (self._ascend() or self._exchange()):
            pass
        self.excess()  # costs are measured as they are, not as they were tried
        return True

    @torch.no_grad()
    def descend(self) -> bool:
        """Go below all limits, or as near as can be; say whether that was possible."""
        while self.excess() > 0:
            if not self._lower():
                return False
        return True

    def _lower(self) -> bool:
        """Take the steps down of least loss per log of cost; say whether there are any."""
        now = self.excess()
        saved = {number: now - self._after((number, -1)) for number in range(len(self.knobs))}
        prices = {
            number: max(self._rise(number, -1), LEAST_RISE) / each
            for number, each in saved.items()
            if each > 0
        }
        order = sorted(prices, key=lambda number: prices[number])
        taken = 0
        for number in order:
            if taken and (prices[number] > TOGETHER * prices[order[0]] or self.excess() <= 0):
                break
            taken += self._walk(number, -1, -math.inf, math.inf)
        return taken > 0

    def _ascend(self) -> bool:
        """Take the step up of most gain that fits, per log of cost; say whether there is any."""
        now, prices = self.excess(), {}
        for number in range(len(self.knobs)):
            after = self._after((number, 1))
            if now < after <= 0:
                prices[number] = self._rise(number, 1) / (after - now)
        order = sorted(prices, key=lambda number: prices[number])
        return any(self._walk(number, 1, now, 0.0) for number in order)

    def _rise(self, number: int, by: int) -> float:
        """Return what the loss rises by if one knob moves, measured since that last moved."""
        knob = self.knobs[number]
        if (number, by) not in self.rises:
            far = min(knob.block, knob.position if by < 0 else knob.count - 1 - knob.position)
            self.now = self.loss() if self.now is None else self.now
            knob.move(by * far)
            self.rises[number, by] = (self.loss() - self.now) / far
            knob.move(-by * far)
        return self.rises[number, by] * knob.lasting

    def _walk(self, number: int, by: int, above: float, most: float) -> bool:
        """Move a knob over the block that was measured, or as far as it may; say whether at all."""
        if not self._take(((number, by),), above, most):
            return False
        while self.moved[number] and (by > 0 or self.excess() > 0):
            if not self._take(((number, by),), above, most):
                break
        return True

    def _move(self, trade: Trade) -> bool:
        """Move knobs, all or none; say whether all can be."""
        for done, (number, by) in enumerate(trade):
            if not self.knobs[number].move(by):
                self._undo(trade[:done])
                return False
        return True

    def _undo(self, trade: Trade) -> None:
        for number, by in reversed(trade):
            self.knobs[number].move(-by)

    def _take(self, trade: Trade, above: float, most: float) -> bool:
        """Move knobs, if that ends above one excess and not above another; say whether it does."""
        if not self._move(trade):
            return False
        if not above < self.excess() <= most:
            self._undo(trade)
            return False
        self.now = None
        for number, by in trade:
            self.moved[number] += abs(by)
            if self.moved[number] >= self.knobs[number].block:
                self.moved[number] = 0
                self.rises.pop((number, 1), None)
                self.rises.pop((number, -1), None)
        return True

    def _exchange(self) -> bool:
        """Move one knob up and others down, as far as it takes, so that more is spent than now.

        Logs of costs are added up to find pairs that should do, and the best are tried. Where all
        of these end above a limit, since costs are no sums of logs, one more knob goes down.
        """
        now = self.excess()
        pairs = self._pairs(now, math.log(SPENT) - now)
        return self._trade(pairs, now) or self._trade(map(self._lowered, pairs[:LOWERED]), now)

    def _trade(self, trades: Iterable[Trade], now: float) -> bool:
        """Take the trade that spends the most and fits, up to what is worth spending."""
        gains = {}
        for trade in trades:
            after = self._after(*trade)
            gain = min(after, math.log(SPENT)) - now
            if after <= 0 and gain > LEAST_GAIN:
                gains[trade] = gain
        best = sorted(gains, key=lambda trade: -gains[trade])
        return any(self._take(trade, now + LEAST_GAIN, 0.0) for trade in best)

    def _lowered(self, trade: Trade) -> Trade:
        """Return a trade with one more knob down, as little as it takes to fit."""
        self._move(trade)
        self.excess()  # guesses count from here
        others = set(range(len(self.knobs))) - {number for number, _ in trade}
        found = [
            (after, (each, -steps))
            for each in others
            for steps in range(1, REACH + 1)
            if (after := self._after((each, -steps))) <= 0
        ]
        self._undo(trade)
        return (*trade, max(found)[1]) if found else trade

    def _pairs(self, now: float, room: float) -> list[Trade]:
        """Return trades of one knob up and one down, the most promising first."""
        numbers = range(len(self.knobs))
        raised = [(each, self._after((each, 1))) for each in numbers]
        lowered = [
            (each, steps, self._after((each, -steps)))
            for each in numbers
            for steps in range(1, REACH + 1)
        ]
        gains: dict[Trade, float] = {
            ((up, 1), (down, -steps)): high + low - 2 * now
            for up, high in raised
            for down, steps, low in lowered
            if up != down and LEAST_GAIN < high + low - 2 * now <= -now
        }
        return sorted(gains, key=lambda pair: (-min(gains[pair], room), gains[pair]))[:TRIED]

    def _after(self, *trade: tuple[int, int]) -> float:
        """Return a guess of the excess if knobs moved; infinity if they cannot."""
        if not self._move(trade):
            return math.inf
        after = self.guess()
        self._undo(trade)
        return after
