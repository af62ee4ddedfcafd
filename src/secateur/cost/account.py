"""What a network costs: parameters, multiply-accumulates, bit operations and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.codec import Quantized
from secateur.cost.profile import Profile, View, profile
from secateur.cost.weights import held
from secateur.errors import SecateurError, did_you_mean

FULL_BITS = 32
"""Bits of a number that nothing is said about."""


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
        activation_macs: of these, products of two activations, as in attention.
        effective_macs: what is left of ``macs`` if none is done with a weight that is zero. Weights
            that ``forward`` computes from parameters count as not zero.
        inputs: elements that these multiplications read, parameters not counted.
        outputs: elements that they write.
        weight_bits: bits of one weight.
        activation_bits: bits of one input of a multiplication.
        bops: macs x weight_bits x activation_bits, or x activation_bits twice for products of two
            activations.
        bytes: weight_bits / 8 for each weight and 4 for any other parameter, without indices,
            scales or header. Weights are the parameters of 2 or more dimensions of a layer that
            multiplies; biases, norms and embeddings are other parameters.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    activation_macs: int
    effective_macs: int
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
        bits: (weight bits, activation bits) that were assumed where nothing else was given.
        first_last_bits: both bits of the first and the last layer that multiply, or None where
            they are as all others. Layers with weight bits of their own keep those.
    """

    layers: tuple[LayerCost, ...]
    uncounted: tuple[str, ...]
    bits: tuple[int, int] = (FULL_BITS, FULL_BITS)
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
    def effective_macs(self) -> int:
        """Multiply-accumulates that are left if those with a zero weight are skipped."""
        return sum(layer.effective_macs for layer in self.layers)

    @property
    def bops(self) -> int:
        """Bit operations: multiply-accumulates x the bits of both operands."""
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
                "effective_macs": self.effective_macs,
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
    bits: tuple[int, int] = (FULL_BITS, FULL_BITS),
    first_last_bits: int | None = None,
    weight_bits: Mapping[str, int] | None = None,
    activation_bits: Mapping[str, int] | None = None,
) -> Cost:
    """Measure what a model costs as it stands. The model comes back untouched.

    Args:
        model: any module; it is measured in evaluation mode.
        example_input: the batch (or the tuple of arguments) that the model is measured on. The
            figures are for that whole batch, so give a batch of 1.
        bits: (weight bits, activation bits) of every layer that multiplies, from 1 to 32.
        first_last_bits: weight and activation bits of the first and the last layer, in the order
            of execution, that multiply.
        weight_bits: by name of a layer whose weights have bits of their own, these bits, as
            :func:`bits_by_layer` tells them of a quantized network. They come before all others.
        activation_bits: the same for what layers read.

    Raises:
        SecateurError: bits are out of range or of no layer, or the model cannot run on the
            example input.
    """
    for bit_field, value in [
        ("weight_bits", bits[0]),
        ("activation_bits", bits[1]),
        ("first_last_bits", first_last_bits),
        *((f"weight_bits of {layer}", value) for layer, value in (weight_bits or {}).items()),
        *((f"activation_bits of {layer}", v) for layer, v in (activation_bits or {}).items()),
    ]:
        _check_bits(bit_field, value)
    _check_layers("weight_bits", weight_bits or {}, model)
    _check_layers("activation_bits", activation_bits or {}, model)
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    measured = profile(model, inputs)
    layers = []
    for name, module, own in _rows(model, measured):
        weights, activations = _bits_of(name, measured, bits, first_last_bits)
        own_bits = (
            (weight_bits or {}).get(name, weights),
            (activation_bits or {}).get(name, activations),
        )
        layers.append(_layer(name, module, own, measured, own_bits))
    return Cost(tuple(layers), tuple(measured.uncounted), bits, first_last_bits)


def bits_by_layer(quantized: Mapping[str, Quantized]) -> dict[str, int]:
    """Return, by layer, the bits of its quantized weight.

    Args:
        quantized: levels by name of the tensor (``conv1.weight``). Of biases and other tensors of
            fewer than two dimensions the bits are not those of a multiplication, and left out.
    """
    return {
        name.rpartition(".")[0]: each.bits
        for name, each in quantized.items()
        if each.levels.ndim > 1
    }


def _check_layers(bit_field: str, names: Iterable[str], model: nn.Module) -> None:
    known = [name for name, _ in model.named_modules()]
    for name in names:
        if name not in known:
            raise SecateurError(
                f"{bit_field}: there is no layer '{name}'.{did_you_mean(name, known)}"
            )


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
        return (FULL_BITS, FULL_BITS)
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
    views = measured.weights.get(name, {})
    activation_macs = (macs or 0) - sum(views.values())
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
        activation_macs=activation_macs,
        effective_macs=activation_macs + _nonzero_macs(module, views),
        inputs=measured.inputs.get(name, 0),
        outputs=measured.outputs.get(name, 0),
        weight_bits=bits[0],
        activation_bits=bits[1],
        bops=sum(views.values()) * bits[0] * bits[1] + activation_macs * bits[1] ** 2,
        bytes=weight_count * bits[0] / 8 + (parameters - weight_count) * 4,
    )


def _nonzero_macs(module: nn.Module, views: Mapping[View, int]) -> int:
    """Count the multiply-accumulates by weights that are not zero; all of them for weights without
    data, and for those that only ``forward`` computes."""
    total = 0
    for view, macs in views.items():
        if not view.tensor:
            total += macs
            continue
        tensor = held(module, view.tensor)
        elements = tensor.as_strided(view.size, view.stride, view.offset)
        nonzeros = elements.numel() if tensor.is_meta else int(elements.count_nonzero())
        total += macs // max(1, elements.numel()) * nonzeros
    return total
