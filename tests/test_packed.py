"""The packed file: round trips, what it costs, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from secateur.artifact import architecture
from secateur.artifact.packed import load, read_header, save, unpack
from secateur.codec import Quantized, Storage
from secateur.cost import bits_by_layer
from secateur.errors import ArtifactError, MembershipError, SecateurError
from secateur.zoo import lenet5

LENET = "secateur.zoo:lenet5"


def same_state(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


def lenet5_at_348x() -> tuple[nn.Module, dict[str, Quantized]]:
    """LeNet-5 with 90 + 560 + 440 + 147 weights of 3 bits and 110 live biases of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = lenet5()
    rows = torch.randperm(500, generator=generator)[:63]
    columns = torch.randperm(800, generator=generator)[:172]
    quantized = {}
    for name, weight in model.named_parameters():
        levels = torch.zeros_like(weight, dtype=torch.int16)
        if name.endswith("bias"):
            values = torch.randint(1, 128, weight.shape, generator=generator)
            levels += values.to(torch.int16)
            if name == "fc1.bias":
                levels[:] = torch.where(torch.isin(torch.arange(500), rows[:30]), levels, 0)
            quantized[name] = Quantized(levels, 2.0**-10, 8, True)
        else:
            keep = {"conv1": 90, "conv2": 560, "fc1": 440, "fc2": 147}[name.split(".")[0]]
            candidates = torch.arange(weight.numel())
            if name == "fc1.weight":
                candidates = (rows[:, None] * 800 + columns).reshape(-1)
            elif name == "fc2.weight":
                candidates = (torch.arange(10)[:, None] * 500 + rows).reshape(-1)
            chosen = candidates[torch.randperm(len(candidates), generator=generator)[:keep]]
            signs = 1 - 2 * torch.randint(0, 2, (keep,), generator=generator)
            values = torch.randint(1, 5, (keep,), generator=generator) * signs
            levels.view(-1)[chosen] = values.to(torch.int16)
            quantized[name] = Quantized(levels, 2.0**-5, 3, False)
        weight.data = (levels.double() * quantized[name].scale).float()
    return model, quantized


def test_lenet5_comes_back_by_name_alone(tmp_path: Path) -> None:
    model, quantized = lenet5_at_348x()
    size = save(tmp_path / "m", model, quantized, reference=LENET)
    state = torch.random.get_rng_state()
    loaded = load(tmp_path / "m")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert same_state(loaded, model)
    assert size.file == (tmp_path / "m").stat().st_size < 1900


def test_levels_come_back_under_every_name_of_a_tensor(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    levels = torch.arange(-18, 18, dtype=torch.int16).view(6, 6) % 4
    model[0].weight.data = levels * 0.25
    quantized = {"0.weight": Quantized(levels, 0.25, 3, True)}
    save(tmp_path / "m", model, quantized, reference=None)
    blank = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    blank[2].weight = blank[0].weight
    found = unpack(tmp_path / "m", blank)
    assert same_state(found.model, model)
    assert set(found.quantized) == {"0.weight", "2.weight"}
    assert torch.equal(found.quantized["2.weight"].levels, levels)
    assert bits_by_layer(found.quantized) == {"0": 3, "2": 3}


def test_what_is_not_a_weight_stays_under_200_bytes(tmp_path: Path) -> None:
    model, quantized = lenet5_at_348x()
    zeros = sum(int((model.get_parameter(n) == 0).sum()) for n in quantized if n.endswith("bias"))
    assert zeros == 470
    size = save(tmp_path / "m", model, quantized, reference=LENET)
    weights = sum(
        (bits for name, bits in size.tensors.items() if name.endswith("weight")), Storage()
    )
    assert weights.values <= 3 * 1237
    assert size.overhead < 8 * 200


def test_a_dense_network_is_stored_bit_for_bit(tmp_path: Path) -> None:
    model = lenet5(classes=7)
    model.fc2.bias.data[:2] = torch.tensor([-0.0, 1e-45])
    save(tmp_path / "m", model, {}, reference=LENET, arguments={"classes": 7})
    loaded = load(tmp_path / "m")
    assert same_state(loaded, model)
    assert loaded.fc2.bias[0].signbit()


def test_resnet18_comes_back_with_its_integer_buffers(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18()
    model(torch.randn(2, 3, 32, 32))  # moves the running statistics and num_batches_tracked
    weight = model.layer1[0].conv1.weight
    levels = (weight.data / 2**-7).round().clamp(-7, 7).to(torch.int16)
    weight.data = levels.float() * 2**-7
    quantized = {"layer1.0.conv1.weight": Quantized(levels, 2**-7, 4, True)}
    metadata = {"mean": "0.5", "σ": "größer"}
    save(
        tmp_path / "m",
        model,
        quantized,
        reference="torchvision.models:resnet18",
        metadata=metadata,
    )
    loaded = load(tmp_path / "m")
    assert same_state(loaded, model)
    assert int(loaded.bn1.num_batches_tracked) == 1
    assert read_header(tmp_path / "m").metadata == metadata


@pytest.mark.parametrize("name", ["resnet18", "regnet_x_400mf", "swin_t", "vit_b_32", "googlenet"])
@pytest.mark.filterwarnings("ignore")
def test_known_architectures_can_be_measured_without_memory(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    real = architecture.Architecture.of(getattr(models, name)())
    built = architecture.build(
        f"torchvision.models:{name}",
        {},
        architecture.Changes(),
        fingerprint=real.fingerprint,
        file_bytes=10**5,
        trust=False,
    )
    assert architecture.Architecture.of(built).fingerprint == real.fingerprint


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    model = Tied()
    levels = torch.randint(1, 5, (50, 8), dtype=torch.int16)
    model.embed.weight.data = levels.float()
    quantized = {"head.weight": Quantized(levels, 1.0, 3, False)}
    size = save(tmp_path / "m", model, quantized, reference=None)
    assert list(size.tensors) == ["embed.weight"]
    assert size.tensors["embed.weight"].values <= 3 * 400
    loaded = load(tmp_path / "m", model=Tied())
    assert same_state(loaded, model)
    assert loaded.head.weight is loaded.embed.weight
    with pytest.raises(ArtifactError, match="not those that were saved"):
        load(tmp_path / "m", model=Tied(tied=False))


def test_the_header_can_be_read_without_building(tmp_path: Path) -> None:
    model, quantized = lenet5_at_348x()
    arguments = {"classes": 10}
    size = save(
        tmp_path / "m",
        model,
        quantized,
        reference=LENET,
        arguments=arguments,
        metadata={"note": "x"},
    )
    header = read_header(tmp_path / "m")
    assert (header.version, header.reference, header.file) == (1, LENET, size.file)
    assert (header.arguments, header.metadata) == (arguments, {"note": "x"})
    assert [8 * entry.bytes for entry in header.entries] == [
        bits.total for bits in size.tensors.values()
    ]
    assert "3 bits, live rows" in header.entries[4].coder


def test_the_container_is_a_safetensors_file(tmp_path: Path) -> None:
    size = save(tmp_path / "m", lenet5(), {}, reference=None)
    assert load_file(tmp_path / "m")["b"].nbytes < size.file


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    model, quantized = lenet5_at_348x()
    for name in ("a", "b"):
        metadata = {"one": "1", "two": "2"} if name == "a" else {"two": "2", "one": "1"}
        save(tmp_path / name, model, quantized, reference=LENET, metadata=metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"old")
    model, quantized = lenet5_at_348x()
    model.fc2.weight.data += 0.1
    with pytest.raises(MembershipError, match=r"^fc2\.weight: .*project it first"):
        save(tmp_path / "m", model, quantized, reference=LENET)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m").read_bytes() == b"old"


def test_unknown_names_get_a_suggestion(tmp_path: Path) -> None:
    levels = {"fc1.wieght": Quantized(torch.zeros(1, dtype=torch.int16), 1.0, 2, False)}
    with pytest.raises(SecateurError, match=r"Did you mean 'fc1\.weight'\?"):
        save(tmp_path / "m", lenet5(), levels, reference=LENET)
    with pytest.raises(SecateurError, match="'model' is taken"):
        save(tmp_path / "m", lenet5(), {}, reference=LENET, metadata={"model": "x"})


def test_a_brought_network_is_overwritten_only_by_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save(path, lenet5(), {}, reference=None)
    with pytest.raises(ArtifactError, match=r"names no architecture.*model="):
        load(path)
    data = bytearray(path.read_bytes())
    data[-10] ^= 1  # in the last tensor
    path.write_bytes(data)
    mine = lenet5()
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    with pytest.raises(ArtifactError, match="its checksum is wrong"):
        load(path, model=mine)
    assert all(torch.equal(before[name], t) for name, t in mine.state_dict().items())


def test_another_network_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "m", lenet5(), {}, reference=LENET)
    for other in (lenet5(classes=11), lenet5().half(), nn.Linear(3, 3)):
        with pytest.raises(ArtifactError, match="not those that were saved"):
            load(tmp_path / "m", model=other)


class Extra(nn.Linear):
    def get_extra_state(self) -> object:
        return {"anything": 1}


def test_state_that_is_not_a_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="_extra_state"):
        save(tmp_path / "m", Extra(2, 2), {}, reference=None)


def test_tensors_of_other_float_types(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = lenet5().to(dtype)
        model.fc1.weight.data *= torch.rand(500, 800) < 0.1
        save(tmp_path / "m", model, {}, reference=LENET)
        assert same_state(load(tmp_path / "m", model=lenet5().to(dtype)), model)


def test_a_scalar_parameter_and_an_empty_one(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_parameter("temperature", nn.Parameter(torch.tensor(0.7)))
        model.register_buffer("none", torch.zeros(3, 0))
        model.register_buffer("flags", torch.tensor([True, False]))
        return model

    model = build()
    save(tmp_path / "m", model, {}, reference=None)
    assert same_state(load(tmp_path / "m", model=build()), model)


def test_levels_may_be_any_integer_type(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    for dtype in (torch.int16, torch.int32, torch.int64):
        levels: Tensor = torch.from_numpy(np.arange(-8, 8).reshape(4, 4)).to(dtype)
        model.weight.data = levels.float() * 0.25
        save(tmp_path / "m", model, {"weight": Quantized(levels, 0.25, 5, True)}, reference=None)
        assert same_state(load(tmp_path / "m", model=nn.Linear(4, 4)), model)
