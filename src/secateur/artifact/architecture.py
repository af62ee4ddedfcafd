"""What a network is to a packed file: names, shapes and dtypes; and building one within bounds."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from secateur.attention import separate
from secateur.channels import narrow
from secateur.errors import ArtifactError, MissingDependencyError, SecateurError
from secateur.quantizers import regrid
from secateur.reference import KNOWN_MODULES, fetches_weights, is_known, resolve

_MAX_TENSORS = 16_384
_FREE_BYTES, _BYTES_PER_FILE_BYTE = 256 << 20, 4096
_SMALL_RANGE = 32


SEPARATE = "separate"
"""That every ``nn.MultiheadAttention`` has become a :class:`secateur.attention.Attention`."""


@dataclass(frozen=True, eq=False)
class Architecture:
    """A network's tensors, tied ones once.

    Attributes:
        tensors: parameters and persistent buffers by first name, in ``state_dict`` order.
        first_names: every name in the ``state_dict`` -> the first name of the same tensor.
        fingerprint: CRC-32 of the names, dtypes and shapes, and of what is tied.
    """

    tensors: dict[str, Tensor]
    first_names: dict[str, str]
    fingerprint: int

    @property
    def raw_bytes(self) -> int:
        """Bytes of the tensors, stored raw."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @classmethod
    def of(cls, model: nn.Module) -> Architecture:
        """Describe a network; tied tensors are those that are one and the same object.

        Raises:
            ArtifactError: its ``state_dict`` holds something that is not a tensor.
        """
        tensors: dict[str, Tensor] = {}
        first_names: dict[str, str] = {}
        seen: dict[int, str] = {}
        lines = bytearray()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                raise ArtifactError(f"{name}: state that is not a tensor cannot be stored.")
            first = first_names[name] = seen.setdefault(id(tensor), name)
            if first == name:
                dtype = str(tensor.dtype).removeprefix("torch.")
                tensors[name] = tensor
                lines += f"{name} {dtype} {list(tensor.shape)}\n".encode()
            else:
                lines += f"{name} = {first}\n".encode()
        return cls(tensors, first_names, zlib.crc32(lines))

    def require(self, fingerprint: int) -> None:
        """Raise ArtifactError if a file with this fingerprint is not of this architecture."""
        if fingerprint != self.fingerprint:
            raise ArtifactError(
                f"the network has {len(self.tensors)} tensors, but not those that were saved.\n"
                "Check its names, shapes and dtypes against the network that was."
            )


@dataclass(frozen=True)
class Changes:
    """What compression has done to the modules of a network, as a file says it.

    Attributes:
        widths: :func:`secateur.channels.widths`, of a network that has lost channels.
        activations: :func:`secateur.quantizers.grids`, of one whose layers read through grids.
        attention: :data:`SEPARATE`, of one whose attention has linear layers of its own.
    """

    widths: str = ""
    activations: str = ""
    attention: str = ""

    def made(self, model: nn.Module) -> nn.Module:
        """Change a network that was freshly built; return it.

        Raises:
            ArtifactError: the changes do not fit the network.
        """
        if self.attention not in ("", SEPARATE):
            raise ArtifactError(f"attention: '{self.attention[:40]}' is unknown.")
        try:
            if self.attention:
                separate(model)
            if self.widths:
                narrow(model, self.widths)
            return regrid(model, self.activations)
        except SecateurError as error:
            raise ArtifactError(str(error)) from None


def build(
    reference: str | None,
    arguments: Mapping[str, Any],
    changes: Changes,
    *,
    fingerprint: int,
    file_bytes: int,
    trust: bool,
) -> nn.Module:
    """Build the network that a packed file names, with its changes.

    Unless trusted, the reference must be known and the arguments must not ask for pretrained
    weights, and the network is first built without memory to see that it has the fingerprint and
    is no larger than a file of ``file_bytes`` may make it. The random number generator of the CPU
    is left as it was.

    Raises:
        ArtifactError: any of that does not hold, or the callable refuses the arguments.
    """
    if reference is None:
        raise ArtifactError("the file names no architecture; give load(path, model=...) yours.")
    if not trust:
        _check_known(reference)
        for key in arguments:
            if fetches_weights(key):
                raise ArtifactError(f"arguments: '{key}' would fetch other weights; refused.")
    builder = resolve(reference)
    if not trust:
        limit = _FREE_BYTES + _BYTES_PER_FILE_BYTE * file_bytes
        with _bounded(limit), torch.device("meta"), _RealNumbers():
            model = changes.made(_call(builder, reference, arguments))
            Architecture.of(model).require(fingerprint)
    with torch.random.fork_rng(devices=()):
        return changes.made(_call(builder, reference, arguments))


def _check_known(reference: str) -> None:
    try:
        known = is_known(reference)
    except ImportError:
        raise MissingDependencyError(
            f"model: '{reference}' needs torchvision: pip install \"secateur[vision]\""
        ) from None
    if not known:
        raise ArtifactError(
            f"model: '{reference}' is not an architecture of {' or '.join(KNOWN_MODULES)}.\n"
            "Give load(path, model=...) yours, or trust=True to import what the file names."
        )


def _call(builder: Callable[..., Any], reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        model = builder(**arguments)
    except SecateurError:
        raise
    except Exception as error:  # whatever the arguments of a damaged file make of it
        reason = str(error).partition("\n")[0][:200]
        raise ArtifactError(
            f"model: {reference} cannot be built with the arguments in the file "
            f"({type(error).__name__}: {reason})."
        ) from error
    if not isinstance(model, nn.Module):
        raise ArtifactError(f"model: {reference} gives a {type(model).__name__}, no nn.Module.")
    return model


@contextmanager
def _bounded(limit: int) -> Iterator[None]:
    """Refuse, as they are registered, more tensors or bytes than a network may have."""
    tensors = size = 0

    def count(_module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal tensors, size
        if tensor is not None:
            tensors, size = tensors + 1, size + tensor.nbytes
        if tensors > _MAX_TENSORS or size > limit:
            raise ArtifactError(
                f"model: at '{name}' the network exceeds {_MAX_TENSORS:,} tensors or "
                f"{limit:,} bytes,\nmore than a file of this size may ask for. "
                "If you made it, use model=... or trust=True."
            )

    handles = (
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _RealNumbers(TorchFunctionMode):
    """Keep lists and short ranges real on the meta device: RegNet reads its widths from them."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        short = func is torch.arange and len(args) == 1 and args[0] <= _SMALL_RANGE
        if short or func is torch.tensor:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)
