"""What zeros leave to multiply, against brute force."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from secateur import sets
from secateur.cost import inspect
from secateur.cost.workload import workload
from tiny import Calls

PATTERNS = st.sampled_from(
    [
        sets.Unstructured(density=0.2),
        sets.Unstructured(keep=1),
        sets.Filter(density=0.5),
        sets.Channel(keep=1),
        sets.Column(density=0.4),
        sets.Kernel(density=0.3),
        sets.Block(2, 2, density=0.5),
        sets.Unstructured(density=1.0),
    ]
)


def pruned(layer: nn.Module, pattern: sets.Pattern, seed: int) -> nn.Module:
    """Give all weights of a module random members of a set."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(pattern.project(values))
    return layer


def ones_through(layer: nn.Module, example: Tensor) -> int:
    """Add up what a layer without biases makes of ones, with 1 in place of each non-zero weight:
    that is how often it multiplies by one."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter != 0)
        return round(float(layer.double()(torch.ones_like(example).double()).sum()))


@settings(max_examples=60)
@given(
    pattern=PATTERNS,
    groups=st.sampled_from([1, 2, 4, 8]),
    out_per_group=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    transposed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_effective_macs_of_any_convolution(
    pattern: sets.Pattern,
    groups: int,
    out_per_group: int,
    kernel: int,
    stride: int,
    padding: int,
    transposed: bool,
    seed: int,
) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    options = {"stride": stride, "groups": groups, "bias": False}
    layer = kind(8, groups * out_per_group, kernel, padding=padding, **options)
    images = torch.zeros(2, 8, 5, 6)
    pruned(layer, pattern, seed)
    cost = inspect(layer, images)
    # padded pixels are multiplied like any other, and of what a transposed convolution computes
    # nothing is cropped before
    bare = kind(8, groups * out_per_group, kernel, **options)
    bare.load_state_dict(layer.state_dict())
    border = 0 if transposed else padding
    expected = ones_through(bare, functional.pad(images, (border,) * 4))
    assert cost.effective_macs == expected
    (work,) = workload(layer, images)
    assert (work.macs, work.weights) == (cost.macs, layer.weight.numel())
    assert work.macs * work.nonzeros == expected * work.weights


@settings(max_examples=20)
@given(pattern=PATTERNS, tokens=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_effective_macs_of_linear_layers(pattern: sets.Pattern, tokens: int, seed: int) -> None:
    layer = pruned(nn.Linear(6, 9, bias=False), pattern, seed)
    example = torch.zeros(2, tokens, 6)
    found = inspect(layer, example).effective_macs
    assert found == ones_through(layer, example)


@settings(max_examples=30)
@given(
    pattern=PATTERNS,
    queries=st.integers(1, 5),
    keys=st.integers(1, 5),
    apart=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_effective_macs_of_attention(
    pattern: sets.Pattern, queries: int, keys: int, apart: bool, seed: int
) -> None:
    """Rows of the joint projection are used by as many tokens as they project."""
    width = 8
    own = {"kdim": 6, "vdim": 4} if apart else {}
    layer = pruned(nn.MultiheadAttention(width, 2, batch_first=True, **own), pattern, seed)
    inputs = (torch.zeros(1, queries, width), *(torch.zeros(1, keys, own.get(n, width))
              for n in ("kdim", "vdim")))  # fmt: skip
    cost = inspect(layer, inputs)
    if apart:
        projections = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    else:
        projections = layer.in_proj_weight.chunk(3)
    products = 2 * queries * keys * width  # queries with keys, and their weights with values
    expected = products
    for weight, tokens in zip(projections, (queries, keys, keys), strict=True):
        expected += tokens * int(weight.count_nonzero())
    expected += queries * int(layer.out_proj.weight.count_nonzero())
    assert cost.effective_macs == expected
    assert sum(each.activation_macs for each in workload(layer, inputs)) == products


@settings(max_examples=15)
@given(pattern=PATTERNS, steps=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_effective_macs_of_recurrent_layers(pattern: sets.Pattern, steps: int, seed: int) -> None:
    layer = pruned(nn.LSTM(3, 5, num_layers=2, bidirectional=True), pattern, seed)
    cost = inspect(layer, torch.zeros(steps, 1, 3))
    kept = sum(int(p.count_nonzero()) for p in layer.parameters() if p.ndim > 1)
    assert cost.effective_macs == steps * kept


def test_lookups_multiply_nothing_until_the_table_is_a_head() -> None:
    table = pruned(nn.Embedding(11, 4), sets.Unstructured(keep=7), 0)
    words = torch.zeros(1, 6, dtype=torch.long)
    cost = inspect(table, words)
    assert (cost.macs, cost.effective_macs, cost.parameters) == (0, 0, 44)
    assert cost.uncounted == ()
    assert workload(table, words) == ()
    head = nn.Linear(4, 11, bias=False)
    head.weight = table.weight
    cost = inspect(nn.Sequential(table, head), words)
    assert (cost.macs, cost.effective_macs) == (6 * 44, 6 * 7)


class Threshold(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (weight.abs() > 0.5)


def test_zeros_that_a_parametrization_makes_are_zeros() -> None:
    layer = nn.Linear(6, 5)
    parametrize.register_parametrization(layer, "weight", Threshold())
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.linspace(-1, 1, 30).view(5, 6))
    cost = inspect(layer, torch.zeros(3, 6))
    assert cost.effective_macs == 3 * int((torch.linspace(-1, 1, 30).abs() > 0.5).sum())


def test_a_parametrization_with_state_keeps_it() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)).train()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    workload(layer, torch.zeros(1, 6))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_weights_without_data_count_as_nonzero() -> None:
    with torch.device("meta"):
        layer = nn.Linear(6, 5)
    assert inspect(layer, torch.zeros(1, 6, device="meta")).effective_macs == 30


def test_products_of_activations_take_the_bits_of_activations() -> None:
    tokens, width = 7, 12
    layer = nn.MultiheadAttention(width, 3, batch_first=True)
    rows = torch.zeros(1, tokens, width)
    cost = inspect(layer, (rows, rows, rows), bits=(4, 8))
    assert cost.bops == 4 * tokens * width**2 * 4 * 8 + 2 * tokens**2 * width * 8 * 8


def test_every_product_with_a_parameter_counts_its_zeros() -> None:
    """Bare parameters in operations of all forms; what is added to a product is no operand."""
    rows = torch.zeros(3, 4)
    forms: list[tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], int]] = [
        (lambda w, x: x @ w, (4, 5), 3),
        (lambda w, x: w @ x, (5, 3), 4),
        (lambda w, x: w @ x[0], (5, 4), 1),
        (lambda w, x: w @ x[0], (4,), 1),
        (lambda w, x: x @ w, (4,), 3),
        (lambda w, x: torch.addmm(w, x, x.T), (3, 3), 0),
        (lambda w, x: torch.einsum("ij,kj->ik", x, w), (5, 4), 3),
        (lambda w, x: torch.bmm(x.expand(2, 3, 4), w.expand(2, 4, 5)), (4, 5), 6),
        (lambda w, x: functional.conv1d(x[None, :1], w), (2, 1, 3), 2),
    ]
    for function, shape, uses in forms:
        model = Calls(function, shape)
        with torch.no_grad():
            model.weight.view(-1)[::2] = 1.0
        cost = inspect(model, rows)
        (layer,) = cost.layers
        added = 3 * 3 * 4 if uses == 0 else 0  # x @ x.T has no weight
        assert layer.activation_macs == added
        assert layer.macs == model.weight.numel() * uses + added
        assert layer.effective_macs == int(model.weight.count_nonzero()) * uses + added


def test_of_a_weight_only_what_is_used_counts() -> None:
    model = Calls(lambda w, x: x @ w[1:].T, (3, 4))
    with torch.no_grad():
        model.weight[0, :2] = model.weight[1, 3] = model.weight[2, :3] = 1.0
    cost = inspect(model, torch.zeros(5, 4))
    assert (cost.macs, cost.effective_macs) == (5 * 8, 5 * 4)


def test_a_weight_that_forward_computes_is_a_weight() -> None:
    """As in binary networks and with standardized weights; its zeros are not looked for."""
    forms: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda w, x: x @ w.sign().T,
        lambda w, x: x @ torch.cat([w[:1] - w[:1].mean(), w[1:] * 2]).T,
    ]
    for function in forms:
        (layer,) = inspect(Calls(function, (3, 4)), torch.zeros(5, 4), bits=(2, 8)).layers
        assert (layer.macs, layer.activation_macs, layer.effective_macs) == (60, 0, 60)
        assert (layer.bops, layer.inputs) == (60 * 2 * 8, 20)


class Queries(nn.Module):
    """Parameters that are multiplied by weights, and weights that are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Embedding(5, 4)
        self.layer = nn.Linear(4, 3)
        self.register_buffer("basis", torch.eye(3))

    def forward(self, rows: Tensor) -> Tensor:
        return (rows + self.layer(2 * self.queries.weight)) @ self.basis + self.layer(
            self.queries.weight
        )


def test_of_two_weights_it_is_that_of_the_running_layer() -> None:
    model = Queries()
    with torch.no_grad():
        model.layer.weight[0] = 0
    cost = inspect(model, torch.zeros(5, 3))
    found = {each.name: (each.macs, each.effective_macs) for each in cost.layers if each.macs}
    assert found == {"layer": (2 * 5 * 12, 2 * 5 * 8), "": (5 * 9, 5 * 3)}
