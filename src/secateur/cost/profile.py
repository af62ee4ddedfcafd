"""Run a copy of a model once and count the multiply-accumulates of every module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from secateur.cost.operations import is_counted, is_free, macs_of, operands
from secateur.errors import SecateurError

_PARAMETRIZATIONS = "parametrizations"
_Key = TypeVar("_Key")


class View(NamedTuple):
    """Which elements of a tensor of a module were multiplied, as ``Tensor.as_strided`` takes it.

    Attributes:
        tensor: name of the tensor in the module, such as ``weight``; empty if it was computed of
            tensors of modules alone, such as a weight that ``forward`` quantizes.
        size: of the view.
        stride: of the view.
        offset: of its first element in the storage.
    """

    tensor: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


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
        weights: module name -> of these, the multiply-accumulates by each view of its tensors; all
            others are products of two activations.
        inputs: module name -> elements that its multiplications read, weights not counted.
        outputs: module name -> elements that its multiplications write.
        entered: names of all modules that ran, in the order of first entry.
        last: name of the module of the last counted operation, or None.
        uncounted: names of operations that are neither counted nor free.
        products: every counted operation, in the order of execution.
    """

    macs: dict[str, int] = field(default_factory=dict)
    weights: dict[str, dict[View, int]] = field(default_factory=dict)
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
        self._holders: dict[int, dict[str, str]] = {}
        """Storage of a tensor -> name of a module that holds it -> name of the tensor there."""
        self._computed: list[Tensor] = []
        for name, module in replica.named_modules():
            module.register_forward_pre_hook(self._enter(name), prepend=True)
            module.register_forward_hook(self._leave)
            holder, separator, tensor = f".{name}".rpartition(f".{_PARAMETRIZATIONS}.")
            if separator and "." not in tensor:
                module.register_forward_hook(self._hold(holder[1:], tensor))
            for own, value in _tensors(module):
                self._holders.setdefault(_storage(value), {})[name] = own

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, arguments: Any) -> None:
            self._running.append(name)
            self.profile.entered.setdefault(name)

        return enter

    def _leave(self, module: nn.Module, arguments: Any, out: Any) -> None:
        self._running.pop()

    def _hold(self, holder: str, tensor: str) -> Any:
        """Have the result of a parametrization count as a parameter of its module."""

        def hold(module: nn.Module, arguments: Any, out: Any) -> None:
            self._keep(out, holder, tensor)

        return hold

    def _keep(self, out: Tensor, holder: str, tensor: str) -> None:
        self._computed.append(out)  # alive, so that no other tensor gets its storage
        self._holders.setdefault(_storage(out), {})[holder] = tensor

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
        if self._made_of_weights(args):
            for made in tree_leaves(out):
                if isinstance(made, Tensor) and _storage(made) not in self._holders:
                    self._keep(made, self._running[-1], "")
        if any(_PARAMETRIZATIONS in name.split(".") for name in self._running):
            return out
        if counted:
            name, weight = self._weight_of(func, args)
            macs = macs_of(func, args, kwargs, out)
            _add(self.profile.macs, name, macs)
            if weight is not None:
                _add(self.profile.weights.setdefault(name, {}), weight, macs)
            _add(self.profile.inputs, name, self._read(args))
            _add(self.profile.outputs, name, out.numel())
            self.profile.last = name
            operation = func._overloadpacket.__name__
            arguments = tuple(tree_map(_on_tensors(self._operand), args))
            self.profile.products.append(Product(name, operation, arguments, macs))
        elif not free:
            self.profile.uncounted.setdefault(str(func._overloadpacket))
        return out

    def _made_of_weights(self, arguments: tuple[Any, ...]) -> bool:
        tensors = [value for value in tree_leaves(arguments) if isinstance(value, Tensor)]
        return bool(tensors) and all(_storage(value) in self._holders for value in tensors)

    def _operand(self, value: Tensor) -> Operand:
        return Operand(tuple(value.shape), _storage(value) in self._holders)

    def _read(self, arguments: tuple[Any, ...]) -> int:
        """Count the elements of the tensors that are neither in a module nor made of such."""
        tensors = (value for value in arguments if isinstance(value, Tensor))
        return sum(value.numel() for value in tensors if _storage(value) not in self._holders)

    def _weight_of(self, func: Any, arguments: tuple[Any, ...]) -> tuple[str, View | None]:
        """Return the module that an operation counts for, and what of its weights it reads.

        Of two weights that are multiplied, it is that of the running module, or of any module.
        """
        running = self._running[-1] if self._running else ""
        found = [
            (name, View(tensor, tuple(each.shape), each.stride(), int(each.storage_offset())))
            for each in operands(func, arguments)
            for name, tensor in self._holders.get(_storage(each), {}).items()
        ]
        return min(
            found, key=lambda use: (not use[1].tensor, use[0] != running), default=(running, None)
        )


def _add(counts: dict[_Key, int], key: _Key, more: int) -> None:
    counts[key] = counts.get(key, 0) + more


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
