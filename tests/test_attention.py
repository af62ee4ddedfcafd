"""Attention with linear layers of its own computes what that of torch does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.attention import Attention, separate


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Compute in float64, so that nothing but rounding can hide behind a tolerance."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(found: Tensor | None, expected: Tensor | None) -> None:
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def lively(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def masks(kind: str, batch: int, heads: int, queries: int, keys: int) -> dict[str, Tensor]:
    forbidden = torch.rand(queries, keys) < 0.4
    forbidden[:, 0] = False  # every query may look somewhere
    ahead = torch.ones(queries, keys).triu(1).bool()
    padding = torch.rand(batch, keys) < 0.4
    padding[:, 0] = False
    return {
        "none": {},
        "bool": {"attn_mask": forbidden},
        "float": {"attn_mask": torch.randn(queries, keys)},
        "by head": {"attn_mask": torch.randn(batch * heads, queries, keys)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": ahead, "key_padding_mask": padding},
    }[kind]


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 4),
    size=st.integers(1, 5),
    batch_first=st.booleans(),
    bias=st.booleans(),
    kind=st.sampled_from(["none", "bool", "float", "by head", "padding", "both"]),
    need_weights=st.booleans(),
    average=st.booleans(),
    other=st.booleans(),
)
def test_equals_torch(
    heads: int,
    size: int,
    batch_first: bool,
    bias: bool,
    kind: str,
    need_weights: bool,
    average: bool,
    other: bool,
) -> None:
    torch.manual_seed(heads * 10 + size)
    width, batch, queries, keys = heads * size, 3, 4, 5
    own = {"kdim": 7, "vdim": 6} if other else {}
    theirs = nn.MultiheadAttention(width, heads, bias=bias, batch_first=batch_first, **own)
    lively(theirs)
    ours = Attention(theirs)
    assert not ours.training
    shape = {True: (batch, -1), False: (-1, batch)}[batch_first]
    query = torch.randn(batch * queries, width).view(*shape, width)
    key = torch.randn(batch * keys, own.get("kdim", width)).view(*shape, own.get("kdim", width))
    value = torch.randn(batch * keys, own.get("vdim", width)).view(*shape, own.get("vdim", width))
    options: dict[str, Any] = {
        **masks(kind, batch, heads, queries, keys),
        "need_weights": need_weights,
        "average_attn_weights": average,
    }
    with torch.no_grad():
        expected, found = theirs(query, key, value, **options), ours(query, key, value, **options)
        for one, other_one in zip(found, expected, strict=True):
            close(one, other_one)


@pytest.mark.parametrize("kind", ["none", "bool", "by head", "padding"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_equals_torch_without_a_batch(kind: str, need_weights: bool) -> None:
    theirs = lively(nn.MultiheadAttention(8, 2))
    query, key = torch.randn(4, 8), torch.randn(5, 8)
    options = masks(kind, 1, 2, 4, 5)
    if "key_padding_mask" in options:
        options["key_padding_mask"] = options["key_padding_mask"][0]
    with torch.no_grad():
        ours = Attention(theirs)  # type: ignore[arg-type]
        expected = theirs(query, key, key, need_weights=need_weights, **options)
        found = ours(query, key, key, need_weights=need_weights, **options)
    for one, other in zip(found, expected, strict=True):
        close(one, other)


def test_gradients_equal_those_of_torch() -> None:
    theirs = lively(nn.MultiheadAttention(8, 2, batch_first=True))
    ours = Attention(theirs)  # type: ignore[arg-type]
    tokens = torch.randn(2, 5, 8)
    for module in (theirs, ours):
        module(tokens, tokens, tokens)[0].square().sum().backward()
    packed = theirs.in_proj_weight.grad
    assert isinstance(packed, Tensor)
    for layer, part in zip((ours.query, ours.key, ours.value), packed.chunk(3), strict=True):
        close(layer.weight.grad, part)


def test_dropout_only_in_training() -> None:
    ours = Attention(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True))
    tokens = torch.randn(2, 5, 8)
    for need_weights in (False, True):
        first, second = (
            ours.train()(tokens, tokens, tokens, need_weights=need_weights)[0] for _ in range(2)
        )
        assert not torch.equal(first, second)
        first, second = (
            ours.eval()(tokens, tokens, tokens, need_weights=need_weights)[0] for _ in range(2)
        )
        assert torch.equal(first, second)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformers_of_torch_compute_the_same(norm_first: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(
        16, 4, 2, 2, 32, batch_first=batch_first, norm_first=norm_first, dropout=0.1
    ).eval()
    source, target = torch.randn(3, 3, 16), torch.randn(3, 3, 16)
    ahead = nn.Transformer.generate_square_subsequent_mask(3)
    padding = torch.tensor([[False, False, True]] * 3)
    options = {"tgt_mask": ahead, "tgt_is_causal": True, "src_key_padding_mask": padding}
    options["memory_key_padding_mask"] = padding  # torch leaves anything where it pads
    with torch.no_grad():
        expected = model(source, target, **options)
        names = [name for name, _ in model.named_parameters()]
        assert separate(model) is model
        found = model(source, target, **options)
    close(found, expected)
    assert not any(isinstance(each, nn.MultiheadAttention) for each in model.modules())
    assert any("in_proj" in name for name in names)
    assert sum(isinstance(each, Attention) for each in model.modules()) == 6


def test_separate_leaves_what_it_cannot_replace() -> None:
    class Own(nn.MultiheadAttention):
        pass

    kept = nn.ModuleList(
        [
            nn.MultiheadAttention(8, 2, add_bias_kv=True),
            nn.MultiheadAttention(8, 2, add_zero_attn=True),
            Own(8, 2),
        ]
    )
    assert separate(kept) is kept
    assert not any(isinstance(each, Attention) for each in kept)


def test_a_module_used_twice_stays_one() -> None:
    shared = nn.MultiheadAttention(8, 2)
    model = separate(nn.ModuleList([shared, shared]))
    first, second = model  # type: ignore[misc]
    assert isinstance(first, Attention)
    assert first is second
