"""What a network costs: parameters, multiply-accumulates, bit operations and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.cost.profile import Profile, profile
from secateur.errors import SecateurError, did_you_mean

_FULL_BITS = 32


@dataclass(frozen=True)
class LayerCost:
    """One module that holds parameters or multiplies.

    Attributes:
        name: the module's name in the model; empty for the model itself.
        kind: class name of the module.
        shape: shape of its weight, or () where it has none.
        parameters: elements of all its own parameters; a shared parameter counts for its first
            holder only.
        macs: multiply-accumulates for the given example input.
        inputs: elements that these multiplications read, parameters not counted.
        outputs: elements that they write.
        weight_bits: bits of one weight.
        activation_bits: bits of one input of a multiplication.
        bops: macs x weight_bits x activation_bits.
        bytes: weight_bits / 8 for each weight and 4 for any other parameter, without indices,
            scales or header. Weights are the parameters of 2 or more dimensions of a layer that
            multiplies; biases, norms and embeddings are other parameters.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    inputs: int
    outputs: int
    weight_bits: int
    activation_bits: int
    bops: int
    bytes: float


@dataclass(frozen=True)
class Cost:
    """What a network costs for one example input, layer by layer in the order of execution.

    Attributes:
        layers: one row per module that holds parameters or multiplies.
        uncounted: operations that ran and may multiply, but that nobody has a formula for.
        bits: (weight bits, activation bits) that were assumed.
        first_last_bits: both bits of the first and the last layer that multiply, or None where
            they are as all others.
    """

    layers: tuple[LayerCost, ...]
    uncounted: tuple[str, ...]
    bits: tuple[int, int] = (_FULL_BITS, _FULL_BITS)
    first_last_bits: int | None = None

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates; bias, normalization and pooling are not counted."""
        return sum(layer.macs for layer in self.layers)

    @property
    def bops(self) -> int:
        """Bit operations: multiply-accumulates x weight bits x activation bits."""
        return sum(layer.bops for layer in self.layers)

    @property
    def bytes(self) -> float:
        """Bytes of all parameters at their bits, see :class:`LayerCost`."""
        return sum(layer.bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the cost as ``inspect --json`` prints it."""
        return {
            "total": {
                "parameters": self.parameters,
                "macs": self.macs,
                "bops": self.bops,
                "bytes": self.bytes,
            },
            "layers": [asdict(layer) | {"shape": list(layer.shape)} for layer in self.layers],
            "uncounted": list(self.uncounted),
            "bits": {
                "weights": self.bits[0],
                "activations": self.bits[1],
                "first_last": self.first_last_bits,
            },
        }


def inspect(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...],
    bits: tuple[int, int] = (_FULL_BITS, _FULL_BITS),
    first_last_bits: int | None = None,
    layer_bits: Mapping[str, tuple[int, int]] | None = None,
) -> Cost:
    """Measure what a model costs as it stands. The model comes back untouched.

    Args:
        model: any module; it is measured in evaluation mode.
        example_input: the batch (or the tuple of arguments) that the model is measured on. The
            figures are for that whole batch, so give a batch of 1.
        bits: (weight bits, activation bits) of every layer that multiplies, from 1 to 32.
        first_last_bits: weight and activation bits of the first and the last layer, in the order
            of execution, that multiply.
        layer_bits: (weight bits, activation bits) by module name, for layers with bits of their
            own.

    Raises:
        SecateurError: bits are out of range, a layer with bits of its own does not multiply, or
            the model cannot run on the example input.
    """
    for bit_field, value in [
        ("weight_bits", bits[0]),
        ("activation_bits", bits[1]),
        ("first_last_bits", first_last_bits),
    ]:
        _check_bits(bit_field, value)
    own_bits = dict(layer_bits or {})
    for name, pair in own_bits.items():
        for value in pair:
            _check_bits(f"layer_bits.{name}", value)
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    measured = profile(model, inputs)
    for name in own_bits.keys() - measured.macs.keys():
        raise SecateurError(
            f"layer_bits: '{name}' is no module that multiplies.{did_you_mean(name, measured.macs)}"
        )
    layers = []
    for name, module, own in _rows(model, measured):
        pair = own_bits.get(name) or _bits_of(name, measured, bits, first_last_bits)
        layers.append(_layer(name, module, own, measured, pair))
    return Cost(tuple(layers), tuple(measured.uncounted), bits, first_last_bits)


def _check_bits(bit_field: str, value: int | None) -> None:
    if value is not None and not 1 <= value <= 32:
        raise SecateurError(f"{bit_field}: {value} is not a number of bits from 1 to 32.")


def _rows(
    model: nn.Module, measured: Profile
) -> Iterator[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """Yield (name, module, its own parameters) in the order of execution, then the unused."""
    modules = dict(model.named_modules())
    own: dict[str, dict[str, nn.Parameter]] = {}
    for full_name, parameter in model.named_parameters():
        holder, _, parameter_name = full_name.rpartition(".")
        head, separator, tail = f".{holder}".partition(".parametrizations.")
        if separator:  # the originals of a parametrized tensor belong to the layer itself
            holder, parameter_name = head[1:], f"{tail}.{parameter_name}"
        own.setdefault(holder, {})[parameter_name] = parameter
    order = {name: position for position, name in enumerate(measured.entered)}
    names = [name for name in modules if name in own or name in measured.macs]
    for name in sorted(names, key=lambda name: order.get(name, len(order))):
        yield name, modules[name], own.get(name, {})


def _bits_of(
    name: str, measured: Profile, bits: tuple[int, int], first_last_bits: int | None
) -> tuple[int, int]:
    if name not in measured.macs:
        return (_FULL_BITS, _FULL_BITS)
    if first_last_bits is not None and name in (next(iter(measured.macs)), measured.last):
        return (first_last_bits, first_last_bits)
    return bits


def _layer(
    name: str,
    module: nn.Module,
    own: dict[str, nn.Parameter],
    measured: Profile,
    bits: tuple[int, int],
) -> LayerCost:
    macs = measured.macs.get(name)
    weights = [value for value in own.values() if macs is not None and value.ndim >= 2]
    parameters = sum(value.numel() for value in own.values())
    weight_count = sum(value.numel() for value in weights)
    weight = next((value for key, value in own.items() if key.startswith("weight")), None)
    if weight is None and weights:
        weight = weights[0]
    return LayerCost(
        name=name,
        kind=parametrize.type_before_parametrizations(module).__name__,
        shape=() if weight is None else tuple(weight.shape),
        parameters=parameters,
        macs=macs or 0,
        inputs=measured.inputs.get(name, 0),
        outputs=measured.outputs.get(name, 0),
        weight_bits=bits[0],
        activation_bits=bits[1],
        bops=(macs or 0) * bits[0] * bits[1],
        bytes=weight_count * bits[0] / 8 + (parameters - weight_count) * 4,
    )
