"""The commands about what a network takes: each counts the bits that its file has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import secateur as sc
from secateur import cli, zoo
from secateur.artifact import packed
from secateur.codec import Quantized
from secateur.cost import meter, storage_table
from secateur.cost.platforms import platform_names

LENET = "secateur.zoo:lenet5"
SHAPE = ("--input", "1x1x28x28")
MACS = {"conv1": 288_000, "conv2": 1_600_000, "fc1": 400_000, "fc2": 5_000}
BITS = {"conv1": 3, "conv2": 3, "fc1": 4, "fc2": 32}

BOARD = """
name: my-board
summary: invented
source: nowhere
compute: {bops_per_second: 1e9}
memory: {bytes_per_second: 1e15}
skips: {unstructured: {efficiency: 0.5}}
"""


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == code, result.output
    return result


def parsed(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, dict[str, Quantized]]:
    """LeNet-5 with a tenth of its weights left, on levels of 3 and 4 bits; fc2 as it was."""
    generator = torch.Generator().manual_seed(0)
    model, quantized = zoo.lenet5(), {}
    for name, weight in model.named_parameters():
        bits = BITS[name.split(".")[0]]
        if bits < 32 and weight.ndim > 1:
            levels = torch.randint(1, 2 ** (bits - 1), weight.shape, generator=generator)
            levels[torch.rand(weight.shape, generator=generator) < 0.9] = 0
            quantized[name] = Quantized(levels.to(torch.int16), 0.25, bits, False)
            weight.data = quantized[name].weight(weight.dtype)
    return model, quantized


@pytest.fixture(scope="module")
def folder(network: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("run")
    model, quantized = network
    metadata = {"input": "1x1x28x28"}
    packed.save(path / "model.secateur", model, quantized, reference=LENET, metadata=metadata)
    return str(path)


def test_inspect_counts_the_bits_of_the_file(folder: str) -> None:
    found = parsed("inspect", folder, "--activation-bits", "8")
    assert {each["name"]: each["weight_bits"] for each in found["layers"]} == BITS
    assert found["total"]["bops"] == sum(MACS[name] * BITS[name] * 8 for name in MACS)
    message = run("inspect", folder, "--weight-bits", "8", code=2).stderr
    assert message.startswith("secateur: --weight-bits: 8")
    assert "3 and 4 bits" in message


def test_encodings_are_those_of_the_levels(folder: str, network: Any) -> None:
    found = parsed("inspect", folder, "--encodings")["encodings"]
    assert found == json.loads(json.dumps(storage_table(*network).to_dict()))
    rows = {each["name"]: each for each in found["layers"]}
    assert rows["fc1.weight"]["encodings"]["rice"]["values"] == 4 * rows["fc1.weight"]["nonzeros"]
    assert rows["fc2.weight"]["encodings"]["none"]["values"] == 32 * 5000
    text = run("inspect", folder, "--encodings").stdout
    assert "fc1.weight, 500x800, 4 bits" in text
    assert f"{found['total']['encodings']['rice']['index']:,}" in text
    assert "entropy bound" in text
    assert "encodings" not in parsed("inspect", folder)
    of_a_callable = parsed("inspect", LENET, *SHAPE, "--encodings")["encodings"]
    assert of_a_callable["total"]["encodings"]["none"]["values"] == 32 * 430_500


def test_platforms_are_listed_with_their_sources() -> None:
    found = parsed("platforms")
    assert [each["name"] for each in found] == platform_names()
    for each in found:
        rates = each["compute"]
        assert rates["macs_per_second"] or rates["bops_per_second"]
        assert each["memory"]["bytes_per_second"] > 0
        assert each["source"]
    text = run("platforms").stdout
    for words in ("gpu-2to4", "312 TMAC/s at 8 bits", "5.56 GB/s", "Linpack", "2:4", "64.0 TBOP/s"):
        assert words in text


def test_a_platform_of_your_own_goes_wherever_a_name_goes(folder: str, tmp_path: Path) -> None:
    path = tmp_path / "board.yaml"
    path.write_text(BOARD)
    assert parsed("platforms", "--platform", str(path))[0]["name"] == "my-board"
    chosen = ("--platform", str(path), "--platform", "edge-cpu")
    mine, edge = parsed("platforms", folder, *chosen, "--activation-bits", "8")
    assert (mine["platform"], edge["platform"]) == ("my-board", "edge-cpu")
    dense = sum(MACS.values()) * 32 * 32 / 1e9
    assert mine["seconds"]["dense"] == pytest.approx(dense)
    without_zeros = sum(MACS[name] * BITS[name] * 8 for name in MACS) / 1e9
    assert mine["seconds"]["without_zeros"] == pytest.approx(without_zeros)
    assert mine["speedup"]["size"] == pytest.approx(dense / without_zeros)
    assert mine["seconds"]["compressed"] == pytest.approx(
        sum(layer["seconds"] for layer in mine["layers"])
    )
    text = run("platforms", folder, *chosen).stdout
    assert "On my-board: " in text
    assert "one inference on my-board (modelled)" in text
    path.write_text(BOARD.replace("bytes_per_second", "bytes_a_second"))
    message = run("platforms", folder, *chosen, code=2).stderr
    assert "memory.bytes_a_second: unknown key 'bytes_a_second'" in message
    assert "Did you mean 'bytes_per_second'" in message
    assert message.count("\n") <= 3


def test_a_callable_has_no_dense_network_to_compare_with() -> None:
    found = parsed("platforms", LENET, *SHAPE, "--weight-bits", "8", "--activation-bits", "8")
    assert len(found) == len(platform_names())
    for each in found:
        assert each["seconds"]["dense"] is each["speedup"]["whole"] is None
        assert each["speedup"]["zeros"] == 1
        assert "no zeros to skip" in each["text"]
    assert "no zeros to skip" in run("platforms", LENET, *SHAPE).stdout


def test_energy_is_that_of_python(folder: str, network: Any) -> None:
    options = ("--activation-bits", "8", "--skip-zeros")
    found = parsed("energy", folder, *options)
    bits = {name: bits for name, bits in BITS.items() if bits < 32}
    image = torch.zeros(1, 1, 28, 28)
    expected = sc.energy(network[0], image, (32, 8), skip_zeros=True, weight_bits=bits)
    assert found == {**json.loads(json.dumps(expected.to_dict())), "measured": None}
    text = run("energy", folder, *options).stdout
    assert "never quote the joules" in text
    assert "conv2" in text
    assert "Known: 45nm" in run("energy", folder, "--node", "3nm", code=2).stderr


def test_energy_is_measured_or_it_is_said_why_not(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "counters", tuple)
    message = run("energy", folder, "--measure", code=2).stderr
    assert "not measured" in message
    assert "Remedy" in message
    calls = []

    def measured(call: Any) -> meter.Measured:
        calls.append(call().shape)
        return meter.Measured(("processor",), 100, 1e-3, 10.0, 30.0)

    monkeypatch.setattr(meter, "measure", measured)
    found = parsed("energy", folder, "--measure")["measured"]
    assert calls == [(1, 10)]
    assert found["dynamic_joules"] == pytest.approx(0.02)
    assert "20.0 mJ each above idle power" in run("energy", folder, "--measure").stdout


@pytest.mark.parametrize("document", ["platforms.md", "encodings.md"])
def test_the_documented_commands_print_what_is_documented(
    document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    text = (root / "docs" / document).read_text()
    pairs = re.findall(r"```sh\nsecateur (.*?)\n```\n\n```text\n(.*?)```", text, re.DOTALL)
    assert pairs
    for command, expected in pairs:
        printed = [line.rstrip() for line in run(*command.split()).stdout.splitlines()]
        assert expected.strip() in "\n".join(printed)
