"""The command line: what each command prints, for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from secateur import __version__, cli, data, zoo
from secateur.artifact import packed


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == code, result.output
    return result


def test_version() -> None:
    assert run("--version").stdout == f"secateur {__version__}\n"


def test_help_shows_examples_of_every_command_that_takes_an_argument() -> None:
    assert "secateur compress recipes/lenet5-digits.yaml" in run("--help").stdout
    commands = ("compress", "compare", "inspect", "breakeven", "platforms", "energy", "data get")
    for command in map(str.split, commands):
        assert "Examples:" in run(*command, "--help").stdout


def test_help_needs_no_torch() -> None:
    code = "import sys, secateur.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_usage_error_suggests() -> None:
    assert "Did you mean 'inspect'" in run("inspet", code=2).stderr


def test_doctor() -> None:
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["secateur"] == __version__
    assert torch.__version__.startswith(facts["packages"]["torch"].partition("+")[0])
    assert facts["cpu"]["usable_cores"] >= 1
    assert set(facts["optional"]["openvino"]) == {"version", "install"}
    assert facts["kernels"]["nm"]["version"] in ("AVX2", "portable", None)
    table = run("doctor").stdout
    assert "torch" in table
    assert "N:M kernel" in table


def test_methods() -> None:
    found = json.loads(run("methods", "--json").stdout)
    admm = {option["name"]: option for option in found["methods"]["admm"]["options"]}
    assert admm["rho"]["default"] == 1e-3
    assert admm["rho"]["description"]
    assert {option["name"] for option in found["sets"]["unstructured"]["options"]} == {
        "density",
        "keep",
    }
    for entry in (*found["methods"].values(), *found["sets"].values()):
        assert entry["summary"]
        assert all(option["description"] for option in entry["options"])
    assert "unstructured (set)" in run("methods").stdout


def test_data_list_and_get(tmp_path: Path) -> None:
    found = json.loads(run("data", "list", "--json", "--root", str(tmp_path)).stdout)
    assert {each["name"]: each["here"] for each in found} == {
        "digits": True,
        "mnist": False,
        "fashion-mnist": False,
        "cifar10": False,
        "imagenet": False,
    }
    assert {each["name"] for each in found} == set(data.NAMED)
    assert "run: secateur data get mnist" in run("data", "list", "--root", str(tmp_path)).stdout
    assert "nothing to fetch" in run("data", "get", "digits").stdout
    assert "Did you mean 'mnist'?" in run("data", "get", "mnits", code=2).stderr


def test_inspect_of_resnet18_has_the_figures_of_the_literature() -> None:
    arguments = ("inspect", "torchvision.models:resnet18", "--input", "1x3x224x224", "--json")
    total = json.loads(run(*arguments).stdout)["total"]
    assert total["parameters"] == 11_689_512
    assert round(total["macs"] / 1e9, 3) == 1.814
    assert round(total["bops"] / 1e9, 1) == 1857.6
    bits = ("--weight-bits", "4", "--activation-bits", "8", "--first-last-bits", "8")
    cost = json.loads(run(*arguments, *bits).stdout)
    assert cost["total"]["bops"] == sum(
        layer["macs"] * layer["weight_bits"] * layer["activation_bits"] for layer in cost["layers"]
    )
    by_name = {layer["name"]: layer for layer in cost["layers"]}
    assert [by_name[name]["weight_bits"] for name in ("conv1", "fc", "layer1.0.conv1")] == [8, 8, 4]


@pytest.mark.parametrize("as_folder", [True, False])
def test_inspect_of_a_packed_file(tmp_path: Path, as_folder: bool) -> None:
    path = tmp_path / "model.secateur"
    packed.save(path, zoo.lenet5(), {}, reference="secateur.zoo:lenet5",
                metadata={"input": "1x1x28x28"})  # fmt: skip
    target = str(tmp_path if as_folder else path)
    found = json.loads(run("inspect", target, "--json").stdout)
    assert found["total"]["parameters"] == 431_080
    assert found["packed"]["file"] == path.stat().st_size
    assert found["packed"]["reference"] == "secateur.zoo:lenet5"
    assert "431,080" in run("inspect", target).stdout


def test_inspect_calls_with_the_arguments_that_are_set() -> None:
    shape = ["--input", "1x3x32x32", "--set", "channels=3"]
    found = json.loads(run("inspect", "secateur.zoo:vgg7", *shape, "--json").stdout)
    assert found["total"]["bops"] == pytest.approx(630.7e9, abs=0.06e9)
    average = run("inspect", "secateur.zoo:vgg7", *shape, "--set", "head=average", "--json").stdout
    assert json.loads(average)["total"]["bops"] == pytest.approx(622.7e9, abs=0.06e9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["secateur.zoo:lenet5"], "--input"),
        (["secateur.zoo:lenet5", "--input", "1x0x28"], "'1x0x28'"),
        (["secateur.zoo:lenet5", "--input", "99999x99999x99999"], "2^30"),
        (["secateur.zoo:lenet5", "--input", "1x3x28x28"], "1x3x28x28"),
        (["secateur.zoo:lenet5", "--input", "1x1x28x28", "--weight-bits", "33"], "weight_bits: 33"),
        (["secateur.zoo:lenet55", "--input", "1x1x28x28"], "Did you mean 'lenet5'"),
        (["secateur.zo:lenet5"], "secateur.zo"),
        (["nothing"], "'nothing'"),
        (["."], "holds no model.secateur"),
        (["garbage.secateur"], "garbage.secateur"),
        (["torch:tensor"], "torch:tensor() failed"),
        (["builtins:dict"], "not a torch.nn.Module"),
        (["secateur.zoo:vgg7", "--set", "channels"], "'channels' is not key=value"),
        (["secateur.zoo:vgg7", "--set", "depth=3"], "depth"),
        (["garbage.secateur", "--set", "channels=3"], "'garbage.secateur' is stored"),
    ],
)
def test_inspect_of_what_cannot_be(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "garbage.secateur").write_bytes(b"\x00garbage" * 99)
    message = run("inspect", *arguments, code=2).stderr
    assert words in message
    assert message.startswith("secateur: ")
    assert message.count("\n") <= 3


def test_interrupt_says_how_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur import compression

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compression, "compress", interrupted)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{model: secateur.zoo:lenet5, data: digits, stages: [{method: admm}]}")
    assert "--resume" in run("compress", str(recipe), code=130).stderr


def test_debug_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_DEBUG", "1")
    result = CliRunner().invoke(cli.app, ["inspect", "nothing"])
    assert type(result.exception).__name__ == "SecateurError"
