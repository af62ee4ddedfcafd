"""Heads leave a network in fact, by every road there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import secateur as sc
from secateur.artifact import onnx, packed
from secateur.attention import Attention, separate
from secateur.channels import ChannelGraph, compact, shrink_to, widths
from secateur.codec import Quantized
from secateur.data import InMemory
from secateur.methods import DJPQ
from secateur.sets import Levels

WIDTH, HEADS, TOKENS = 24, 4, 5
SIZE = WIDTH // HEADS


class Encoder(nn.Module):
    """Attention by name, a residual, the average and a classifier; ``(batch, 5, 24)``."""

    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.attend = attend
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(tokens + self.attend(tokens)).mean(1))  # type: ignore[no-any-return]


class Torch(nn.Module):
    """``nn.MultiheadAttention`` of tokens by themselves."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.need_weights = need_weights

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.mix(tokens, tokens, tokens, need_weights=self.need_weights)[0]
        return found


class Own(nn.Module):
    """Attention written by hand.

    Args:
        fused: whether by ``scaled_dot_product_attention``, else by products and softmax.
        packed: one linear layer for queries, keys and values, in this order of their dimensions;
            None has three.
        fixed: whether the code fixes the number of heads.
    """

    def __init__(self, fused: bool, packed: str | None, fixed: bool = False) -> None:
        super().__init__()
        self.fused, self.packed = fused, packed
        self.heads = HEADS if fixed else -1
        if packed:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.parts(tokens)
        if self.fused:
            mixed = scaled_dot_product_attention(q, k, v)
        else:
            mixed = ((q * SIZE**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(len(tokens), tokens.shape[1], -1))  # type: ignore[no-any-return]

    def parts(self, tokens: Tensor) -> Any:
        batch, count, _ = tokens.shape
        if self.packed == "3hd":
            found = self.qkv(tokens).reshape(batch, count, 3, self.heads, SIZE)
            return found.permute(2, 0, 3, 1, 4).unbind(0)
        if self.packed == "h3d":
            found = self.qkv(tokens).reshape(batch, count, self.heads, 3, SIZE).transpose(1, 2)
            return found[..., 0, :], found[..., 1, :], found[..., 2, :]
        if self.packed == "chunk":
            layers = self.qkv(tokens).chunk(3, -1)
        else:
            layers = tuple(layer(tokens) for layer in (self.q, self.k, self.v))
        return [x.view(batch, count, self.heads, SIZE).transpose(1, 2) for x in layers]


FORMS: dict[str, Any] = {
    "torch": lambda: separate(Torch(False)),
    "torch-weights": lambda: separate(Torch(True)),
    "fused": lambda: Own(True, None),
    "plain": lambda: Own(False, None),
    "3hd": lambda: Own(True, "3hd"),
    "3hd-plain": lambda: Own(False, "3hd"),
    "h3d": lambda: Own(True, "h3d"),
    "chunk": lambda: Own(True, "chunk"),
}


def lively(form: str) -> Encoder:
    torch.manual_seed(0)
    model = Encoder(FORMS[form]())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def out_layer(model: Encoder) -> nn.Linear:
    linear = [m for m in model.attend.modules() if isinstance(m, nn.Linear)]
    return linear[-1]


def silence(model: Encoder, heads: list[int]) -> None:
    """Let the layer behind attention ignore heads."""
    with torch.no_grad():
        for head in heads:
            out_layer(model).weight[:, head * SIZE : (head + 1) * SIZE] = 0


@pytest.mark.parametrize("form", FORMS)
def test_heads_that_nobody_reads_leave(form: str) -> None:
    model, tokens = lively(form), torch.randn(3, TOKENS, WIDTH)
    silence(model, [0, 2])
    with torch.no_grad():
        expected = model(tokens)
    small = compact(model, tokens[:1])
    with torch.no_grad():
        torch.testing.assert_close(small.model(tokens), expected, rtol=1e-5, atol=1e-5)
    assert out_layer(small.model).in_features == 2 * SIZE  # type: ignore[arg-type]
    before = sum(p.numel() for p in model.attend.parameters())
    after = sum(p.numel() for p in small.model.attend.parameters())  # type: ignore[union-attr]
    assert before - after == 2 * SIZE * (4 * WIDTH + 3)  # rows and columns, and three biases


@pytest.mark.parametrize("form", FORMS)
def test_heads_of_constant_values_leave(form: str) -> None:
    """What such a head returns is its constant, whatever it attends to; it is folded."""
    model, tokens = lively(form), torch.randn(3, TOKENS, WIDTH)
    with torch.no_grad():
        if isinstance(model.attend, Own) and model.attend.packed:
            rows = torch.arange(3 * WIDTH)
            by = rows.view(HEADS, 3, SIZE) if model.attend.packed == "h3d" else None
            rows = rows.view(3, HEADS, SIZE)[2, 1] if by is None else by[1, 2]
            model.attend.qkv.weight[rows] = 0
        else:
            layers = [m for m in model.attend.modules() if isinstance(m, nn.Linear)]
            layers[2].weight[SIZE : 2 * SIZE] = 0
        expected = model(tokens)
    small = compact(model, tokens[:1])
    with torch.no_grad():
        torch.testing.assert_close(small.model(tokens), expected, rtol=1e-5, atol=1e-5)
    fused = out_layer(small.model).in_features == 3 * SIZE  # type: ignore[arg-type]
    assert fused == (form not in ("plain", "3hd-plain", "torch-weights"))


@pytest.mark.parametrize("form", FORMS)
def test_part_of_a_head_stays(form: str) -> None:
    model, tokens = lively(form), torch.randn(3, TOKENS, WIDTH)
    with torch.no_grad():
        out_layer(model).weight[:, 1:SIZE] = 0
    small = compact(model, tokens[:1])
    assert out_layer(small.model).in_features == WIDTH  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_whole_heads_are_chosen(form: str) -> None:
    model, tokens = lively(form), torch.randn(3, TOKENS, WIDTH)
    small = shrink_to(model, tokens[:1], 0.5, round_to=1)
    assert out_layer(small.model).in_features == WIDTH // 2  # type: ignore[arg-type]
    groups = [g for g in ChannelGraph(model, tokens[:1]).groups if g.channels == HEADS]
    assert len(groups) == 1
    assert groups[0].step in (SIZE, 3 * SIZE)


@pytest.mark.parametrize("packed", [None, "3hd", "chunk"])
def test_code_that_fixes_its_heads_keeps_them(packed: str | None) -> None:
    torch.manual_seed(0)
    model = Encoder(Own(True, packed, fixed=True)).eval()
    tokens = torch.randn(3, TOKENS, WIDTH)
    silence(model, [1])
    with torch.no_grad():
        expected = model(tokens)
    small = compact(model, tokens[:1])
    with torch.no_grad():
        torch.testing.assert_close(small.model(tokens), expected)
    assert out_layer(small.model).in_features == WIDTH  # type: ignore[arg-type]
    assert any("fixes its size" in note for note in small.notes)


def test_a_mask_by_head_keeps_all() -> None:
    class Masked(Own):
        def __init__(self) -> None:
            super().__init__(True, None)
            self.bias = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS))

        def forward(self, tokens: Tensor) -> Tensor:
            mixed = scaled_dot_product_attention(*self.parts(tokens), attn_mask=self.bias)
            return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    model, tokens = Encoder(Masked()).eval(), torch.randn(3, TOKENS, WIDTH)
    silence(model, [1])
    small = compact(model, tokens[:1])
    assert out_layer(small.model).in_features == WIDTH  # type: ignore[arg-type]
    assert any("takes a mask for each head" in note for note in small.notes)


def test_grouped_queries_stay_whole() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * SIZE)
            self.out = nn.Linear(WIDTH, WIDTH)

        def forward(self, tokens: Tensor) -> Tensor:
            q = self.q(tokens).unflatten(2, (-1, SIZE)).transpose(1, 2)
            k = v = self.kv(tokens).unflatten(2, (-1, SIZE)).transpose(1, 2)
            mixed = scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    model, tokens = Encoder(Grouped()).eval(), torch.randn(3, TOKENS, WIDTH)
    silence(model, [0, 1])
    small = compact(model, tokens[:1])
    assert out_layer(small.model).in_features == WIDTH  # type: ignore[arg-type]


def test_a_packed_file_brings_heads_back_to_a_network_of_torch(tmp_path: Path) -> None:
    model, tokens = lively("torch"), torch.randn(3, TOKENS, WIDTH)
    silence(model, [3])
    small = compact(model, tokens[:1]).model
    path = tmp_path / "model.secateur"
    packed.save(path, small, {}, reference=None, widths=widths(small, model))
    assert packed.read_header(path).version == 4
    fresh = Encoder(Torch(False))
    loaded = packed.load(path, fresh)
    assert loaded is fresh
    with torch.no_grad():
        assert torch.equal(loaded(tokens), small(tokens))
        assert torch.equal(packed.load(path, lively("torch"))(tokens), small(tokens))


@pytest.mark.parametrize("weights", [False, True])
def test_compress_separates_and_deploys(tmp_path: Path, weights: bool) -> None:
    """A network with attention of torch, all its matrices quantized and pruned, in ONNX."""
    torch.manual_seed(0)
    model = Encoder(Torch(weights))
    tokens = torch.randn(96, TOKENS, WIDTH)
    data = InMemory(tokens, tokens.mean((1, 2)).sign().long() + 1)
    task = sc.Task(model, data, data, data)
    recipe = {
        "train": {"epochs": 1, "lr": 1e-3},
        "stages": [
            {"method": "gmp", "density": 0.5, "bits": 4, "epochs": 1, "retrain_epochs": 1},
        ],
    }
    result = sc.compress(task, recipe, out=tmp_path / "run")
    layers = {each["name"]: each for each in result.report["layers"]}
    inner = "attend.mix.query"
    assert layers[inner]["bits"] == 4
    assert layers[inner]["density"] < 1
    assert result.report["parity"]["agreement"]["onnx"] == 1
    macs = sc.inspect(result.model, tokens[:1]).macs
    assert result.report["cost"]["compressed"]["macs"] == macs, "products of tokens count"
    loaded = packed.load(tmp_path / "run" / "model.secateur", Encoder(Torch(weights)))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens), result.model(tokens))


def test_djpq_gates_heads() -> None:
    model, tokens = lively("torch"), torch.randn(8, TOKENS, WIDTH)
    method = DJPQ(Levels(8, zero=True), example_input=tokens[:1], gates="hard_concrete")
    method.attach(model)
    sizes = [gate.channels for gate, _, _ in method.gates]
    assert HEADS in sizes
    model.train()
    model(tokens).sum().backward()
    heads = next(gate for gate, _, _ in method.gates if gate.channels == HEADS)
    heads.freeze(torch.tensor([True, False, True, False]))
    model.eval()
    with torch.no_grad():
        before = model(tokens)
    method.finalize()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-4)
        small = compact(model, tokens[:1]).model
        torch.testing.assert_close(small(tokens), before, rtol=1e-4, atol=1e-4)
    assert isinstance(small.attend.mix, Attention)  # type: ignore[union-attr]
    assert small.attend.mix.out_proj.in_features == 2 * SIZE  # type: ignore[union-attr]


def test_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    tokens = torch.randn(3, TOKENS, WIDTH)
    with pytest.raises(sc.SecateurError, match="fixes the size of a batch"):
        sc.export_onnx(lively("plain"), tokens, tmp_path / "model.onnx")


@pytest.mark.parametrize("form", ["torch", "torch-weights", "3hd", "plain"])
def test_products_between_tokens_cost_less_with_fewer_heads(form: str) -> None:
    model, tokens = lively(form), torch.randn(8, TOKENS, WIDTH)
    method = DJPQ(Levels(8, zero=True), example_input=tokens[:1], gates="hard_concrete")
    method.attach(model)
    model.train()
    model(tokens)
    heads = next(gate for gate, _, _ in method.gates if gate.channels == HEADS)
    heads.freeze(torch.tensor([True, False, False, False]))
    counted = method.bops.hard()
    method.finalize()
    small = compact(model, tokens[:1]).model
    weights = {name: bits for name, (bits, _) in method.widths.items()}
    inputs = {name: bits for name, (_, bits) in method.widths.items()}
    cost = sc.inspect(small, tokens[:1], weight_bits=weights, activation_bits=inputs)
    assert counted == cost.bops


def test_a_budget_of_a_transformer_is_met_with_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(64, TOKENS, WIDTH)
    data = InMemory(tokens, tokens.mean((1, 2)).sign().long() + 1)
    stage = {
        "method": "djpq",
        "budget": {"bops": "10x"},
        "gates": "hard_concrete",
        "quantizer": "lsq",
        "epochs": 2,
        "tune_epochs": 1,
    }
    recipe = {"train": {"epochs": 1, "lr": 1e-3}, "stages": [stage], "export": {"onnx": False}}
    task = sc.Task(Encoder(Torch(False)), data, data, data)
    report = sc.compress(task, recipe, out=tmp_path / "run").report
    assert 10 <= report["ratio"]["bops"] <= 10 * 1.03


def test_equal_weights_are_exported_once(tmp_path: Path) -> None:
    """Two dead layers of one shape: what is computed from them is joined, and no error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    zero = Quantized(torch.zeros(16, 16, dtype=torch.int16), 0.5, 8, True)
    with torch.no_grad():
        for layer in (model[2], model[3]):
            layer.weight.zero_()
    quantized = {"2.weight": zero, "3.weight": replace(zero, levels=zero.levels.clone())}
    path = sc.export_onnx(model, torch.randn(1, 16), tmp_path / "model.onnx", quantized=quantized)
    x = torch.randn(5, 16)
    with torch.no_grad():
        torch.testing.assert_close(onnx.OnnxModel(path)(x), model(x))
