"""Channels: small networks whose answer is known, and random ones against themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from secateur.channels import ChannelGraph, compact, fold_constants, replay, shrink, shrink_to
from secateur.errors import ChannelError

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Modules by name and a forward function over them."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, images: Tensor) -> Tensor:
        return self.function(self, images)


def conv(given: int, made: int, size: int = 3, padding: int = 0, **options: object) -> nn.Conv2d:
    return nn.Conv2d(given, made, size, padding=padding, **options)  # type: ignore[arg-type]


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every bias, scale and statistic a random value, so that zero filters emit something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    return model.eval()


def kill(model: nn.Module, **rows: Sequence[int]) -> None:
    """Zero the filters of layers; their biases stay."""
    with torch.no_grad():
        for name, indices in rows.items():
            model.get_submodule(name).weight[list(indices)] = 0  # type: ignore[index]


def same_outputs(first: nn.Module, second: nn.Module, images: Tensor = IMAGE) -> None:
    with torch.no_grad():
        expected, found = first.eval()(images), second.eval()(images)
    assert float((expected - found).abs().max()) <= 1e-5 * float(expected.abs().max())


def widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(module.weight.shape[:2])
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


def chain(padding: int) -> Net:
    return Net(
        lambda m, x: m.head(m.second(m.norm(m.first(x)).relu()).relu().mean((2, 3))),
        first=conv(3, 8, padding=padding, bias=False),
        norm=nn.BatchNorm2d(8),
        second=conv(8, 6, padding=padding),
        head=nn.Linear(6, 4),
    )


@pytest.mark.parametrize(("padding", "first"), [(0, 5), (1, 6)])
def test_chain_folds_constants_and_carries_one_through_padding(padding: int, first: int) -> None:
    model = randomize(chain(padding))
    with torch.no_grad():
        model.norm.bias[:3] = torch.tensor([1.0, 2.0, 3.0])  # the constants pass the ReLU
        model.norm.running_mean[:3] = 0
    kill(model, first=[0, 1, 2], second=[4])
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    assert widths(small.model) == {"first": (first, 3), "second": (5, first), "head": (4, 5)}
    assert small.model.norm.num_features == first


def test_constants_of_zero_go_behind_padding_too() -> None:
    model = randomize(chain(1))
    with torch.no_grad():
        model.norm.bias[:3] = -100.0
    kill(model, first=[0, 1, 2])
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    assert widths(small.model)["first"] == (5, 3)


def test_what_nobody_reads_goes_and_takes_what_only_it_read_along() -> None:
    model = randomize(chain(1))
    with torch.no_grad():
        model.head.weight[:, 3] = 0  # so filter 3 of second is unread
        model.second.weight[:, 5] = 0
        model.second.weight[3, 5] = 1.0  # which alone reads channel 5 of first
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    assert widths(small.model) == {"first": (7, 3), "second": (5, 7), "head": (4, 5)}


def test_a_layer_never_ends_empty() -> None:
    model = randomize(chain(0))
    kill(model, first=range(8), second=range(6))
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    assert widths(small.model) == {"first": (1, 3), "second": (1, 1), "head": (4, 1)}


def test_residual_channels_go_only_when_both_branches_are_dead() -> None:
    model = randomize(
        Net(
            lambda m, x: m.head((m.stem(x) + m.norm(m.branch(m.stem(x)).relu())).flatten(1)),
            stem=conv(3, 6),
            branch=conv(6, 6, padding=1),
            norm=nn.BatchNorm2d(6),
            head=nn.Linear(6 * 36, 3),
        )
    )
    kill(model, stem=[0, 1, 2], branch=[1, 2, 3])
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    # Channels 1 and 2 are constant in both branches; the padded branch needs a carrier, which
    # channel 0 is: it is constant where the branch reads it, and alive behind the sum.
    assert widths(small.model) == {"stem": (4, 3), "branch": (4, 4), "head": (3, 4 * 36)}


def test_concatenation_depthwise_and_flatten() -> None:
    model = randomize(
        Net(
            lambda m, x: m.head(torch.cat([m.left(x), m.right(x)], 1).relu().mul(2).flatten(1)),
            left=conv(3, 4),
            right=nn.Sequential(conv(3, 5, 1), nn.PReLU(5), conv(5, 5, groups=5)),
            head=nn.Linear(9 * 36, 3),
        )
    )
    kill(model, left=[1])
    kill(model.right, **{"0": [0, 4], "2": [2]})
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    assert widths(small.model) == {
        "left": (3, 3),
        "right.0": (2, 3),
        "right.2": (2, 1),
        "head": (3, 5 * 36),
    }
    assert small.model.right[2].groups == 2


def test_a_constant_through_padded_depthwise_stays_and_is_listed() -> None:
    model = randomize(
        Net(
            lambda m, x: m.head(m.depth(m.first(x)).mean((2, 3))),
            first=conv(3, 4),
            depth=conv(4, 8, padding=1, groups=4),
            head=nn.Linear(8, 2),
        )
    )
    kill(model, first=[1, 2])
    with torch.no_grad():
        model.first.bias[2] = 0
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    assert widths(small.model) == {"first": (3, 3), "depth": (6, 1), "head": (2, 6)}
    assert any("depth: 1 constant channels stay" in note for note in small.notes)


def split_net(parts: Callable[[Tensor], Sequence[Tensor]]) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        left, right = parts(m.first(x))
        return m.head((m.left(left) * m.right(right).sigmoid()).mean((2, 3)))

    return Net(forward, first=conv(3, 8), left=conv(4, 5), right=conv(4, 5), head=nn.Linear(5, 2))


@pytest.mark.parametrize(
    ("parts", "first"),
    [
        (lambda x: x.chunk(2, 1), 6),
        (lambda x: x.split(x.shape[1] // 2, 1), 6),
        (lambda x: x.split(4, 1), 8),  # the code fixes the size
        (lambda x: (x[:, :4], x[:, 4:]), 8),
    ],
)
def test_split(parts: Callable[[Tensor], Sequence[Tensor]], first: int) -> None:
    model = randomize(split_net(parts))
    kill(model, first=[0, 3, 5, 4], left=[1], right=[1])
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    assert widths(small.model) == {
        "first": (first, 3),
        "left": (4, first // 2),
        "right": (4, first // 2),
        "head": (2, 4),
    }
    assert (first == 8) == any(note.startswith("first: ") for note in small.notes)


def test_grouped_convolutions_lose_the_same_channel_of_every_group() -> None:
    model = randomize(
        Net(
            lambda m, x: m.head(m.grouped(m.first(x)).mean((2, 3))),
            first=conv(3, 8),
            grouped=conv(8, 12, groups=4),
            head=nn.Linear(12, 2),
        )
    )
    kill(model, first=[1, 3, 5, 7, 0], grouped=[2, 5, 8, 11, 1])
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    assert widths(small.model) == {"first": (4, 3), "grouped": (8, 1), "head": (2, 8)}


def test_shared_modules_and_shared_weights_are_cut_alike() -> None:
    model = randomize(
        Net(
            lambda m, x: m.head(m.twin(m.again(m.again(m.first(x)))).mean((2, 3))),
            first=conv(3, 4),
            again=conv(4, 4, 1, bias=False),
            twin=conv(4, 4, 1),
            head=nn.Linear(4, 2),
        )
    )
    model.twin.weight = model.again.weight
    with torch.no_grad():
        model.again.weight[:, 2] = 0
        model.again.weight[2] = 0
    kill(model, first=[2])
    with torch.no_grad():
        model.head.weight[:, 2] = 0
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    assert widths(small.model)["again"] == (3, 3)
    assert small.model.twin.weight is small.model.again.weight


@pytest.mark.parametrize(
    ("operator", "word"),
    [
        (lambda x: x.cumsum(1), "cumsum"),
        (lambda x: functional.layer_norm(x, x.shape[1:]), "layer_norm"),
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: x.roll(1, 1), "roll"),
        (lambda x: functional.pad(x, (0, 0, 0, 0, 0, 1))[:, 1:], "pad"),
        (lambda x: x * torch.arange(6.0).view(6, 1, 1), "mul"),
    ],
)
def test_unknown_operators_keep_what_touches_them_whole_by_name(
    operator: Callable[[Tensor], Tensor], word: str
) -> None:
    model = randomize(
        Net(
            lambda m, x: m.last(operator(m.second(m.first(x).relu()))),
            first=conv(3, 6),
            second=conv(6, 6),
            last=conv(6, 2, 1),
        )
    )
    kill(model, first=[0], second=[1, 2])
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    assert widths(small.model) == {"first": (5, 3), "second": (6, 5), "last": (2, 6)}
    assert any("second: 6 of 6" in note and word in note for note in small.notes)


def test_changes_in_place_are_followed() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        hidden = m.first(x)
        view = hidden.view(hidden.shape[0], -1)
        hidden.relu_()
        hidden += 1
        return m.head(m.second(hidden).mean((2, 3))) + m.side(view)

    model = randomize(
        Net(
            forward,
            first=conv(3, 6),
            second=conv(6, 5),
            head=nn.Linear(5, 2),
            side=nn.Linear(216, 2),
        )
    )
    kill(model, first=[0, 1], second=[0])
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    assert widths(small.model)["first"] == (6, 3)  # a view of it changes: it is left alone
    assert widths(small.model)["second"] == (4, 6)


def test_an_assignment_to_a_part_is_not_taken_for_a_constant() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        hidden = m.first(x)
        hidden[:, 0] = 5
        hidden[:, :, 0] = 7
        return m.head(m.second(hidden).mean((2, 3)))

    model = randomize(Net(forward, first=conv(3, 6), second=conv(6, 5), head=nn.Linear(5, 2)))
    kill(model, first=[0, 1], second=[0])
    with torch.no_grad():
        expected = model(IMAGE)
        fold_constants(ChannelGraph(model, IMAGE))
        assert torch.allclose(model(IMAGE), expected, atol=1e-6)
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    assert widths(small.model) == {"first": (6, 3), "second": (4, 6), "head": (2, 4)}


def test_a_fixed_size_in_a_view_keeps_its_layers_whole() -> None:
    model = randomize(
        Net(
            lambda m, x: m.head(m.second(m.first(x)).view(-1, 4 * 16)),
            first=conv(3, 6),
            second=conv(6, 4),
            head=nn.Linear(4 * 16, 2),
        )
    )
    kill(model, first=[0, 1], second=[0])
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    assert widths(small.model) == {"first": (4, 3), "second": (4, 4), "head": (2, 64)}
    assert any("second: 4 of 4" in n and "fixes its size" in n for n in small.notes)


def test_the_original_is_untouched_and_modes_stay() -> None:
    model = randomize(chain(1))
    kill(model, first=[0, 1])
    model.train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = compact(model, IMAGE).model
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert not model.norm.training
    assert small.training
    assert not small.norm.training


def test_a_layer_without_bias_or_norm_gets_one_and_replay_knows() -> None:
    def build() -> Net:
        return randomize(
            Net(
                lambda m, x: m.head(m.second(m.first(x).relu()).relu().mean((2, 3))),
                first=conv(3, 5),
                second=conv(5, 4, bias=False),
                head=nn.Linear(4, 2),
            )
        )

    model = build()
    with torch.no_grad():
        model.first.bias.fill_(1.0)
    kill(model, first=[0, 1])
    small = compact(model, IMAGE)
    same_outputs(model, small.model)
    assert widths(small.model)["second"] == (4, 3)
    assert small.kept["second"] == {"in": [2, 3, 4], "bias": True}
    again = replay(json.loads(json.dumps(small.kept)), build())
    again.load_state_dict(small.model.state_dict())
    same_outputs(small.model, again)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"frist": {"out": [0]}}, "no module 'frist'. Did you mean 'first'"),
        ({"first": {"out": [0, 8]}}, "first.out: not a rising list"),
        ({"first": {"out": []}}, "first.out: not a rising list"),
        ({"first": {"out": [1, 0]}}, "first.out: not a rising list"),
        ({"first": {"out": "all"}}, "first.out: not a rising list"),
        ({"norm": {"in": [0]}}, "norm.in: a side is one of out"),
        ({"": {"out": [0]}}, "has no channels to cut"),
    ],
)
def test_cuts_of_other_networks_are_refused(kept: dict[str, object], message: str) -> None:
    with pytest.raises(ChannelError, match=message):
        replay(kept, chain(0))  # type: ignore[arg-type]


def test_shrink_keeps_the_strongest_channels_in_round_numbers() -> None:
    model = randomize(
        Net(
            lambda m, x: m.head(m.second(m.first(x).relu()).relu().mean((2, 3))),
            first=conv(3, 40),
            second=conv(40, 12),
            head=nn.Linear(12, 3),
        )
    )
    with torch.no_grad():
        for layer, side in ((model.first, 0), (model.second, 1)):
            layer.weight.fill_(0.01)
            layer.weight.index_fill_(side, torch.arange(3, 27), 0.02)
    small = shrink_to(model, IMAGE, density=0.6, round_to=8)
    assert small.kept["first"] == {"out": list(range(3, 27))}
    assert widths(small.model) == {"first": (24, 3), "second": (8, 24), "head": (3, 8)}
    assert widths(shrink(model, IMAGE, density=1.0)) == widths(model)
    with pytest.raises(ChannelError, match=r"density: 1\.5"):
        shrink(model, IMAGE, density=1.5)


def test_rounding_keeps_some_dead_channels() -> None:
    model = randomize(chain(0))
    kill(model, first=[0, 1, 2])
    small = compact(model, IMAGE, round_to=4)
    same_outputs(model, small.model)
    assert widths(small.model) == {"first": (8, 3), "second": (6, 8), "head": (4, 6)}


def test_folding_in_place_frees_weights_and_keeps_outputs() -> None:
    model = randomize(chain(0))
    kill(model, first=[0, 1, 2])
    reference = compact(model, IMAGE).model
    freed = fold_constants(ChannelGraph(model, IMAGE))
    assert freed == 3 * 6 * 9
    assert bool((model.second.weight[:, :3] == 0).all())
    same_outputs(model, reference)


def test_what_cannot_be_traced_says_so() -> None:
    model = Net(lambda m, x: m.first(x) if x.sum() > 0 else x, first=conv(3, 4))
    with pytest.raises(ChannelError, match="cannot trace Net"):
        compact(model, IMAGE)


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Draw a network of random blocks with random zero filters, in double precision."""
    width = draw(st.integers(2, 6))
    kinds = ("conv", "norm", "residual", "dense", "depth", "relu", "pool", "gate", "shuffle")
    plan = draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=6))
    padding = draw(st.integers(0, 1))
    modules: dict[str, nn.Module] = {"stem": conv(3, width, padding=1)}
    rows: list[int] = []
    for i, kind in enumerate(plan):
        rows.append(2 - width % 2)
        if kind in ("conv", "residual"):
            modules[f"{kind}{i}"] = conv(width, width, padding=1 if kind == "residual" else padding)
        elif kind == "norm":
            modules[f"norm{i}"] = nn.BatchNorm2d(width)
        elif kind == "depth":
            modules[f"depth{i}"] = conv(width, width, 1 + 2 * padding, padding, groups=width)
        elif kind == "gate":
            modules[f"gate{i}"] = conv(width, width, 1)
        elif kind == "dense":
            modules[f"dense{i}"] = conv(width, 2, 1)
            width += 2
    modules["head"] = nn.Linear(width, 3)

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        for i, kind in enumerate(plan):
            layer = getattr(m, f"{kind}{i}", None)
            if kind == "relu":
                x = x.relu()
            elif kind == "pool":
                x = functional.avg_pool2d(x, 3, 1, 1)
            elif kind == "shuffle":
                x = x.unflatten(1, (rows[i], x.shape[1] // rows[i])).transpose(1, 2).flatten(1, 2)
            elif kind == "residual":
                x = x + layer(x)
            elif kind == "dense":
                x = torch.cat([x, layer(x)], 1)
            elif kind == "gate":
                x = x * layer(x.mean((2, 3), keepdim=True)).sigmoid()
            else:
                x = layer(x)
        return m.head(x.mean((2, 3)))

    model = randomize(Net(forward, **modules), draw(st.integers(0, 1000))).double()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    share = draw(st.sampled_from([0.2, 0.5, 0.9]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                size = (len(parameter), *(1,) * (parameter.ndim - 1))
                parameter *= torch.rand(size, generator=generator) > share
                other = (1, parameter.shape[1], *(1,) * (parameter.ndim - 2))
                parameter *= torch.rand(other, generator=generator) > share / 2
            elif name.endswith("bias"):
                parameter *= torch.rand(parameter.shape, generator=generator) > 0.3
    return model


@settings(max_examples=40)
@given(model=networks())
def test_random_networks_compute_the_same_and_nothing_dead_remains(model: nn.Module) -> None:
    # Six convolutions without padding take 12 pixels off.
    images = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0)).double()
    small = compact(model, images)
    with torch.no_grad():
        expected, found = model(images), small.model(images)
    assert float((expected - found).abs().max()) <= 1e-9 * float(expected.abs().max() + 1e-9)
    again = compact(small.model, images)
    assert again.kept == {}
