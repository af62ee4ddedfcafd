"""The widths of a cut network as a line of text, short enough for a packed file of a kilobyte."""

from __future__ import annotations

import re

from torch import nn

from secateur.channels.surgery import CONVOLUTIONS, NORMS, Kept, replay
from secateur.errors import ChannelError

_ENTRY = re.compile(r"(?:(\d{1,9}),)?(\d{1,9})(b?)")


def widths(small: nn.Module, model: nn.Module) -> str:
    """Say how wide a cut network is.

    Args:
        small: the cut network.
        model: the same before it was cut.

    Returns:
        One entry per convolution, linear layer, BatchNorm and PReLU, joined by ``;``: empty if it
        is as it was, else ``inputs,outputs`` or just ``channels``, then ``b`` if it was given a
        bias. Empty if nothing was cut.
    """
    pairs = zip(_channeled(small), _channeled(model), strict=True)
    entries = [_entry(cut, whole) for (_, cut), (_, whole) in pairs]
    return ";".join(entries) if any(entries) else ""


def longest(model: nn.Module) -> int:
    """Return the characters at most of :func:`widths` of a network once it is cut.

    Args:
        model: before; layers that are given a bias are not reckoned with.
    """
    pairs = (_sides(module) for _, module in _channeled(model))
    return len(";".join(_text(sides) for sides in pairs))


def narrow(model: nn.Module, text: str) -> nn.Module:
    """Make a network as wide as :func:`widths` says; the first channels stay, with their values.

    Args:
        model: changed in place; as it was before it was cut.
        text: of :func:`widths`.

    Raises:
        ChannelError: the text is malformed or of another network.
    """
    modules = _channeled(model)
    entries = text.split(";")
    if len(entries) != len(modules):
        raise ChannelError(f"widths: {len(entries)} entries for {len(modules)} modules.")
    kept: Kept = {}
    for (name, module), entry in zip(modules, entries, strict=True):
        if not entry:
            continue
        found = _ENTRY.fullmatch(entry)
        whole = _sides(module)
        if not found or (found[1] is None) != (whole[0] is None):
            raise ChannelError(f"widths: '{entry[:40]}' is not the width of {name}.")
        groups = getattr(module, "groups", 1)
        kept[name] = {"out": _first(name, int(found[2]), whole[1], groups)}
        if found[1] and whole[0]:
            kept[name]["in"] = _first(name, int(found[1]), whole[0], groups)
        if found[3]:
            kept[name]["bias"] = True
    return replay(kept, model)


def _channeled(model: nn.Module) -> list[tuple[str, nn.Module]]:
    kinds = (*CONVOLUTIONS, *NORMS, nn.Linear, nn.PReLU)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def _sides(module: nn.Module) -> tuple[int | None, int]:
    """Return the number of input channels, if it has other ones than outputs, and of outputs."""
    if isinstance(module, CONVOLUTIONS):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None, module.num_features if isinstance(module, NORMS) else len(module.weight)  # type: ignore[arg-type]


def _entry(cut: nn.Module, whole: nn.Module) -> str:
    given = getattr(whole, "bias", None) is None and getattr(cut, "bias", None) is not None
    if _sides(cut) == _sides(whole) and not given:
        return ""
    return _text(_sides(cut)) + "b" * given


def _text(sides: tuple[int | None, int]) -> str:
    return ",".join(str(side) for side in sides if side is not None)


def _first(name: str, kept: int, whole: int, groups: int) -> list[int]:
    """Return the first channels, of each group alike; of a depthwise layer, the first groups."""
    if not 0 < kept <= whole:
        raise ChannelError(f"widths: {name} has {whole} channels, so it cannot have {kept}.")
    if groups == 1 or kept % groups:
        return list(range(kept))
    return [index for index in range(whole) if index % (whole // groups) < kept // groups]
