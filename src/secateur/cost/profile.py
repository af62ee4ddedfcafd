"""Run a copy of a model once and count the multiply-accumulates of every module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from secateur.cost.operations import is_counted, is_free, macs_of, operands
from secateur.errors import SecateurError

_PARAMETRIZATIONS = "parametrizations"


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation was given: its shape, and whether it is a parameter."""

    shape: tuple[int, ...]
    parameter: bool


@dataclass(frozen=True)
class Product:
    """One execution of an operation that multiplies.

    Attributes:
        module: name of the module that it counts for.
        operation: name of the ATen operation, such as ``convolution`` or ``addmm``.
        arguments: positional arguments in the order of its schema, tensors as :class:`Operand`.
        macs: its multiply-accumulates.
    """

    module: str
    operation: str
    arguments: tuple[Any, ...]
    macs: int


@dataclass
class Profile:
    """What one forward pass did.

    Attributes:
        macs: module name -> multiply-accumulates, in the order of first use.
        inputs: module name -> elements that its multiplications read, parameters not counted.
        outputs: module name -> elements that its multiplications write.
        entered: names of all modules that ran, in the order of first entry.
        last: name of the module of the last counted operation, or None.
        uncounted: names of operations that are neither counted nor free.
        products: every counted operation, in the order of execution.
    """

    macs: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    entered: dict[str, None] = field(default_factory=dict)
    last: str | None = None
    uncounted: dict[str, None] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)


def profile(model: nn.Module, inputs: tuple[Any, ...]) -> Profile:
    """Count the multiply-accumulates of ``model(*inputs)`` in evaluation mode.

    A copy of the model runs, on tensors without data where the model allows it, so that neither
    the model nor the inputs are touched. An operation counts for the module that holds its weight,
    else for the innermost module that executes it. What a parametrization computes is not counted,
    because a finished network holds the result.

    Raises:
        SecateurError: the model cannot run on these inputs.
    """
    try:
        return _run_without_data(model, inputs)
    except Exception:  # data-dependent code and custom operations have no data-free form
        return _run_with_data(model, inputs)


def _run_without_data(model: nn.Module, inputs: tuple[Any, ...]) -> Profile:
    from torch._subclasses.fake_tensor import FakeTensorMode

    # tensors that are plain attributes of a module are copied with their data
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = [*model.parameters(), *model.buffers()]
    replica = copy.deepcopy(model, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
    with mode:
        return _count(replica, tree_map(_on_tensors(mode.from_tensor), inputs))


def _run_with_data(model: nn.Module, inputs: tuple[Any, ...]) -> Profile:
    try:
        return _count(copy.deepcopy(model), tree_map(_on_tensors(torch.clone), inputs))
    except Exception as error:  # a user's model may fail in any way
        shapes = ", ".join(
            "x".join(map(str, value.shape)) if isinstance(value, Tensor) else repr(value)
            for value in inputs
        )
        reason = " ".join(str(error).split())[:300]
        raise SecateurError(
            f"input: {type(model).__name__} does not run on an input of shape {shapes}.\n"
            f"{type(error).__name__}: {reason}\n"
            "Give the shape the model expects, batch first, for example 1x3x224x224."
        ) from error


def _on_tensors(function: Any) -> Any:
    return lambda value: function(value) if isinstance(value, Tensor) else value


def _count(replica: nn.Module, inputs: tuple[Any, ...]) -> Profile:
    replica.eval()
    counter = _Counter(replica)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _plain_operations(), counter:
        replica(*inputs)
    return counter.profile


@contextmanager
def _plain_operations() -> Iterator[None]:
    """Have attention and recurrent layers run as matrix products, not as one fused operation."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # oneDNN's switch warns about graphics cards
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation that reaches a device, and knows which module is running."""

    def __init__(self, replica: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.profile = Profile()
        self._running: list[str] = []
        self._holders: dict[int, list[str]] = {}
        self._parametrized: list[Tensor] = []
        for name, module in replica.named_modules():
            module.register_forward_pre_hook(self._enter(name), prepend=True)
            module.register_forward_hook(self._leave)
            holder, separator, tensor = f".{name}".rpartition(f".{_PARAMETRIZATIONS}.")
            if separator and "." not in tensor:
                module.register_forward_hook(self._hold(holder[1:]))
            for parameter in module.parameters(recurse=False):
                self._holders.setdefault(_storage(parameter), []).append(name)

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, arguments: Any) -> None:
            self._running.append(name)
            self.profile.entered.setdefault(name)

        return enter

    def _leave(self, module: nn.Module, arguments: Any, out: Any) -> None:
        self._running.pop()

    def _hold(self, holder: str) -> Any:
        """Have the result of a parametrization count as a parameter of its module."""

        def hold(module: nn.Module, arguments: Any, out: Any) -> None:
            self._parametrized.append(out)  # kept, so that no other tensor gets its storage
            self._holders.setdefault(_storage(out), []).append(holder)

        return hold

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        counted, free = is_counted(func), is_free(func)
        if not counted and not free:
            with self:  # inside torch.inference_mode, composite operations arrive whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if any(_PARAMETRIZATIONS in name.split(".") for name in self._running):
            return out
        if counted:
            name = self._module_of(args)
            macs = macs_of(func, args, kwargs, out)
            _add(self.profile.macs, name, macs)
            _add(self.profile.inputs, name, self._read(args))
            _add(self.profile.outputs, name, out.numel())
            self.profile.last = name
            operation = func._overloadpacket.__name__
            arguments = tuple(tree_map(_on_tensors(self._operand), args))
            self.profile.products.append(Product(name, operation, arguments, macs))
        elif not free:
            self.profile.uncounted.setdefault(str(func._overloadpacket))
        return out

    def _operand(self, value: Tensor) -> Operand:
        return Operand(tuple(value.shape), _storage(value) in self._holders)

    def _read(self, arguments: tuple[Any, ...]) -> int:
        """Count the elements of the tensors that are no parameters."""
        tensors = (value for value in arguments if isinstance(value, Tensor))
        return sum(value.numel() for value in tensors if _storage(value) not in self._holders)

    def _module_of(self, arguments: tuple[Any, ...]) -> str:
        running = self._running[-1] if self._running else ""
        for operand in operands(arguments):
            holders = self._holders.get(_storage(operand), [])
            if holders and running not in holders:
                return holders[0]
        return running


def _add(counts: dict[str, int], name: str, more: int) -> None:
    counts[name] = counts.get(name, 0) + more


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
