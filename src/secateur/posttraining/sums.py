"""Where sums and means get grids, so that runtimes compute what is in front of them in integers.

ONNX Runtime runs a convolution in integers only where its output is rounded next. In front of a
layer that reads through a grid it is; in front of a sum, as in residual networks, and of a pooling
by means nothing rounds. So where a convolution is added to something, all addends and the sum are
rounded, and where it is averaged, what is averaged; each by the module that returns it: a
BatchNorm, a pooling, a block. Where a ReLU comes before the rounding, it is rounded behind that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from secateur.channels.surgery import CONVOLUTIONS
from secateur.posttraining.sequence import Batch, call
from secateur.quantizers import FixedQuantizer, attach_output
from secateur.quantizers.attach import CONTAINERS

ADDITIONS = frozenset({"add", "iadd", "radd"})
"""Names of functions, without underscores, that add two tensors."""

AVERAGES = frozenset({"mean", *(f"{a}avg_pool{n}d" for a in ("", "adaptive_") for n in (1, 2, 3))})
"""Those that average one."""

CLIPPINGS = frozenset({"relu", "relu6", "hardtanh", "clamp"})
"""Those that may stand between a layer or a sum and its rounding."""

Value = tuple[int, int]
"""A tensor and how often it was changed in place."""


@dataclass(frozen=True)
class Site:
    """A module whose output is to be rounded.

    Attributes:
        module: its name.
        readers: layers that read the very same tensor, hence through the same grid.
        behind: layers that have run when it returns.
    """

    module: str
    readers: tuple[str, ...]
    behind: frozenset[str]


class Sums:
    """Rounds sums and addends as soon as the layers in front of them are settled.

    Attributes:
        grids: by layer that reads a tensor which is rounded already, its grid.
    """

    def __init__(self, model: nn.Module, sites: Collection[Site]) -> None:
        self.model, self.grids = model, dict[str, FixedQuantizer]()
        self._pending = {site.module: site for site in sites}

    def due(self, layers: Collection[str]) -> list[str]:
        """Return the modules whose outputs do not depend on these layers or later ones."""
        return [name for name, site in self._pending.items() if site.behind.isdisjoint(layers)]

    def attach(self, grids: Mapping[str, FixedQuantizer]) -> None:
        """Let modules return on grids from now on."""
        like = next(self.model.parameters())
        for name, grid in grids.items():
            attach_output(self.model.get_submodule(name), grid.to(like))
            self.grids.update(dict.fromkeys(self._pending.pop(name).readers, grid))


@contextmanager
def watching_outputs(
    model: nn.Module, names: Sequence[str], look: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Show what modules return, call by call."""

    def hook(name: str) -> Any:
        return lambda module, given, made: look(name, made)

    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(hook(name))
            stack.callback(handle.remove)
        yield


def sites(model: nn.Module, layers: Collection[str], batch: Batch) -> list[Site]:
    """Return the modules that round what they return, in the order in which they do.

    Args:
        model: in evaluation mode, without grids.
        layers: those that will read through grids, by name. A tensor that another convolution or
            linear layer reads is not rounded: runtimes would quantize that layer, too.
        batch: what it is called with.
    """
    seen = _Trace(layers)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            before = module.register_forward_pre_hook(seen.reads(name), with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(seen.returns(name)).remove)
        with seen:
            call(model, batch)
    return seen.sites()


class _Trace(TorchFunctionMode):
    """What was added in one call of a network, and who returned it."""

    def __init__(self, layers: Collection[str]) -> None:
        super().__init__()
        self.layers = layers
        self.kept: list[Tensor] = []  # as ids are reused
        self.calls: Counter[str] = Counter()
        self.ran: list[str] = []
        self.readers: dict[Value, list[str]] = {}
        self.makers: dict[Value, list[tuple[str, int]]] = {}
        self.clipped: dict[Value, Value] = {}
        self.convolved: set[Value] = set()
        self.sums: list[tuple[Value, Value, Value]] = []
        self.averaged: set[Value] = set()

    def value(self, tensor: Tensor) -> Value:
        """Return what tells this tensor, as it is now, from all others."""
        self.kept.append(tensor)
        return id(tensor), tensor._version

    def reads(self, name: str) -> Any:
        """Return a hook that notes what a module is called with."""

        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.calls[name] += 1
            read = given[0] if given else named.get("input")
            if isinstance(module, (*CONVOLUTIONS, nn.Linear)) and isinstance(read, Tensor):
                self.readers.setdefault(self.value(read), []).append(name)
                self.ran.append(name)

        return hook

    def returns(self, name: str) -> Any:
        """Return a hook that notes what a module returns."""

        def hook(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
            if not isinstance(made, Tensor):
                return
            value = self.value(made)
            convolves = name in self.layers and isinstance(module, CONVOLUTIONS)
            if isinstance(module, _BatchNorm):
                convolves = self.value(given[0]) in self.convolved
            if convolves:
                self.convolved.add(value)
            if not isinstance(module, CONTAINERS):
                self.makers.setdefault(value, []).append((name, len(self.ran)))

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name not in ADDITIONS | CLIPPINGS | AVERAGES:
            return func(*args, **(kwargs or {}))
        given = [each for each in args[:2] if isinstance(each, Tensor)]
        alike = len({each.shape for each in given}) == 1
        values = [self.value(each) for each in given]
        made = func(*args, **(kwargs or {}))
        if name in AVERAGES:
            self.averaged.update(values)
        elif name in CLIPPINGS and values:
            self.clipped[values[0]] = self.value(made)
        elif len(values) == 2 and alike:
            self.sums.append((values[0], values[1], self.value(made)))
        return made

    def sites(self) -> list[Site]:
        """Return the modules that round addends, sums and what is averaged."""
        behind = {value: self.clipped.get(value, value) for value in self.convolved}
        rounded: list[tuple[Value, ...]] = [
            (after, value) for value, after in behind.items() if after in self.averaged
        ]
        for first, second, made in self.sums:
            if {first, second} & self.convolved:
                rounded += [(first,), (second,), (self.clipped.get(made, made), made)]
        found: dict[str, Site] = {}
        for values in rounded:
            for value in values:  # the first one that a module returns
                if (maker := self._maker(value)) is not None:
                    name, time = maker
                    readers = tuple(r for r in self.readers.get(value, ()) if self.calls[r] == 1)
                    found[name] = Site(name, readers, frozenset(self.ran[:time]))
                    break
        return sorted(found.values(), key=lambda site: len(site.behind))

    def _maker(self, value: Value) -> tuple[str, int] | None:
        """Return the first module that returns a value and no other one, and when."""
        if not set(self.readers.get(value, ())) <= set(self.layers):
            return None
        once = (maker for maker in self.makers.get(value, ()) if self.calls[maker[0]] == 1)
        return next(once, None)
