"""Learned quantizers: a grid with step, range and power, and the bits that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secateur.quantizers.functional import quantize
from secateur.sets.levels import best_scale

POWERS = (0.5, 2.0)
"""Least and largest power of the warp."""

FIT_SAMPLE = 2**12
"""Values at most that a first grid is fitted to."""

ROUNDING = 1e-3
"""Bits by which a real number of bits may exceed a width and still be rounded down to it."""


class Quantizer(nn.Module):
    """A grid that is trained with the loss: d r(x~ / d), x~ = sgn(x) min(|x|, q)^t.

    Step d, range q and power t are the parameters (DJPQ, Wang, Lu & Blankevoort, arXiv 2007.10463).
    Trained are t and the base-2 logarithms of q and of d / q^t, so that what presses on bits moves
    the step alone: with d itself it would lower the range by as much as it raises the step. Bits
    follow from them,

        b = log2(q^t / d + 1) + 1,  one less for an unsigned grid,

    and are counted whole as what the number of levels takes: ceil(log2(2 r(q^t / d) + 1)).

    **Widths.** Where only some widths are allowed, the grid has the least of them that is not below
    b: its step is q^t / (2^(b-1) - 1), while d goes on underneath with the gradient of that step.
    (Written onto d, the adjustment would undo every update that is smaller than a whole width.)

    **Fixed bits** are one allowed width. There is no d then: the range is trained, and the step
    with it. With a gradient scale of 1 / sqrt(n * largest level) for n values this is LSQ (Esser et
    al., arXiv 1902.08153), for one step per tensor or per channel.

    **By channel** every range is trained, and all steps are the same trained part of their ranges,
    so that one number says the bits of all.

    Levels that ADMM and its kin fit or train (``methods/latent.py``) are another thing: grids
    without zero or of powers of two, on a fixed support, moved by whatever optimizer moves the
    weights and with no parameter of their own. The search for the best first grid is the same.

    A quantizer of activations waits for data: until a batch comes by in training it lets everything
    pass as it is.

    Args:
        bits: width to begin with.
        signed: whether values below zero have levels.
        power: whether t is trained; else it is 1.
        widths: allowed widths, rising; empty for all. One alone fixes the bits.
        channels: number of ranges and steps, along dimension 0 of the weight; None for one.
        dimensions: of the weight, where there are channels.
        waits: whether the first batch of training sets the range; else call :meth:`fit`.
    """

    def __init__(
        self,
        bits: int,
        signed: bool = True,
        power: bool = False,
        widths: Sequence[int] = (),
        channels: int | None = None,
        dimensions: int = 4,
        waits: bool = False,
    ) -> None:
        super().__init__()
        shape = () if channels is None else (channels, *(1,) * (dimensions - 1))
        self.signed, self.widths, self.waits = signed, tuple(widths), waits
        self.start = bits
        limit = torch.zeros(shape)
        self.log2_limit = nn.Parameter(limit)
        steps = torch.tensor(-math.log2(self.most_level(bits)))
        self.log2_step = None if self.fixed else nn.Parameter(steps)
        self.power = nn.Parameter(torch.ones(())) if power else None

    def extra_repr(self) -> str:
        """Say which grid it is."""
        return f"{'signed' if self.signed else 'unsigned'}, {self.width} bits"

    @property
    def fixed(self) -> bool:
        """Whether the bits are."""
        return len(self.widths) == 1

    def freeze(self, bits: int) -> None:
        """Fix the bits; the range stays as it is, and is trained on."""
        self.widths = (bits,)
        if self.log2_step is not None:
            self.log2_step.requires_grad_(False)

    @torch.no_grad()
    def release(self, widths: Sequence[int] = ()) -> None:
        """Train the bits again, from those that :meth:`freeze` fixed.

        Args:
            widths: allowed from now on, rising; empty for all.
        """
        assert self.log2_step is not None
        self.log2_step.fill_(-math.log2(self.most_level(self.widths[0]))).requires_grad_(True)
        self.widths = tuple(widths)

    def most_level(self, bits: int) -> int:
        """Return the largest level of so many bits: a symmetric grid if signed."""
        return int(2 ** (bits - self.signed)) - 1

    @property
    def limit(self) -> Tensor:
        """Largest magnitude q that the grid reaches, before the warp."""
        return self.log2_limit.exp2()

    @property
    def top(self) -> Tensor:
        """The same after the warp, q^t."""
        return self.limit if self.power is None else (self.log2_limit * self.power).exp2()

    @property
    def step(self) -> Tensor:
        """Distance d of neighbouring levels, as the grid has it now."""
        if not self.widths:
            return self._free_step()
        *lower, last = self.widths
        most: Tensor | int = self.most_level(last)
        for width in reversed(lower):  # by tensors, so that it can be traced
            fits = self.bits().detach() <= width + ROUNDING
            most = torch.where(fits, self.most_level(width), most)
        step = self.top / most
        if self.log2_step is not None and not self.fixed:
            free = self._free_step()
            step = step + (free - free.detach())
        return step

    def _free_step(self) -> Tensor:
        """Return the trained step."""
        assert self.log2_step is not None
        return self.log2_step.exp2() * self.top

    def bits(self) -> Tensor:
        """Return the real number of bits, a scalar that has gradients unless bits are fixed."""
        if self.log2_step is None or self.fixed:
            return self.log2_limit.new_tensor(float(self.widths[0]))
        return torch.log2((-self.log2_step).exp2() + 1) + self.signed

    @property
    def width(self) -> int:
        """Whole bits that hold every level."""
        return self.widths[0] if self.fixed else _width(self.largest_level(), self.signed)

    def largest_level(self) -> int:
        """Return the largest integer that the grid multiplies its step by."""
        return int(torch.round(self.top.detach() / self.step.detach()).max())

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid, in its shape and dtype."""
        if self.waits and not self.training:
            return x
        if self.waits:
            self.fit(x)
        step, limit = self.step, self.limit
        if self.fixed:
            # LSQ's gradient scale, on the range: the step is a fixed part of it
            scale = (x.numel() / limit.numel() * self.most_level(self.widths[0])) ** -0.5
            step, limit = _scaled(step, scale), _scaled(limit, scale)
        return quantize(x, step, limit, self.power, self.signed)

    @torch.no_grad()
    def fit(self, values: Tensor) -> None:
        """Set the range so that rounding changes these values least, once warped.

        That is at the width that is fixed, or else at the first, and the step is that width's.

        Args:
            values: weights, or activations of a batch. All processes of a run agree on the mean of
                what they find.
        """
        grid = range(self.most_level(self.widths[0] if self.fixed else self.start) + 1)
        if self.power is not None:
            values = values.abs() ** self.power
        units = torch.ones_like(self.log2_limit)
        if units.numel() > 1:  # one search for all channels, each in units of its own
            units = values.square().flatten(1).mean(1).sqrt().view(units.shape)
            units = units.clamp_min(torch.finfo(values.dtype).tiny)
        flat = (values / units).flatten()
        sample = flat[:: math.ceil(len(flat) / FIT_SAMPLE)]
        limit = (units * best_scale(sample, grid) * grid[-1]).to(self.log2_limit)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(limit)
            limit /= dist.get_world_size()
        limit = limit.log2()
        self.log2_limit.copy_(limit if self.power is None else limit / self.power)
        if self.log2_step is not None:
            self.log2_step.fill_(-math.log2(grid[-1]))
        self.waits = False

    @torch.no_grad()
    def bound(self, least: int, most: int) -> None:
        """Keep bits and power in their ranges, by moving the step; call after each update."""
        if self.power is not None:
            self.power.clamp_(*POWERS)
        if self.log2_step is not None and not self.fixed:
            finest, coarsest = (math.log2(self.most_level(bits)) for bits in (most, least))
            self.log2_step.clamp_(-finest, -coarsest)

    def get_extra_state(self) -> Tensor:
        """Return whether it waits for data, and fixed bits or 0, for ``state_dict``."""
        return torch.tensor([int(self.waits), self.widths[0] if self.fixed else 0])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore :meth:`get_extra_state`."""
        waits, bits = state.tolist()
        self.waits = bool(waits)
        if bits:
            self.freeze(bits)


class FixedQuantizer(nn.Module):
    """A grid of activations as it is deployed: its step is a buffer, the rest is structure.

    Args:
        step: distance of neighbouring levels.
        least: smallest level, 0 or below.
        most: largest level.
    """

    step: Tensor

    def __init__(self, step: float, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most
        self.register_buffer("step", torch.tensor(step))

    @classmethod
    def of(cls, quantizer: Quantizer) -> FixedQuantizer:
        """Return the grid of a learned quantizer of activations."""
        step, most = float(quantizer.step.detach()), quantizer.largest_level()
        return cls(step, -most * quantizer.signed, most).to(quantizer.log2_limit)

    def extra_repr(self) -> str:
        """Say which grid it is."""
        return f"levels {self.least} to {self.most}"

    @property
    def signed(self) -> bool:
        """Whether there are levels below zero."""
        return self.least < 0

    @property
    def width(self) -> int:
        """Whole bits that hold every level."""
        return (self.most - self.least).bit_length()

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid, in its shape and dtype."""
        return torch.round(x / self.step).clamp(self.least, self.most) * self.step


def _width(most: int, signed: bool) -> int:
    """Return the bits that levels up to ``most`` take: ceil(log2(levels))."""
    return (2 * most if signed else most).bit_length()


def _scaled(value: Tensor, gradient: float) -> Tensor:
    """Return the value, with its gradient times a number."""
    kept = value.detach()
    return kept + (value - kept) * gradient
