"""What is exported, read by the programs that it is for; one of them without secateur and torch."""

from __future__ import annotations

import json
import re
import subprocess
import venv
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import secateur as sc
from secateur import cli, data
from secateur.artifact import pack_quantized
from secateur.artifact.export import FORMATS, Source, export
from secateur.artifact.onnx import OnnxModel
from secateur.artifact.qonnx import quant
from secateur.cli.target import Target, onnx_file
from secateur.codec import Quantized
from secateur.errors import ArtifactError, SecateurError
from secateur.finish import left_in_floats
from secateur.quantizers import regrid
from secateur.sets import Levels
from secateur.sets.channel_levels import ChannelLevels
from secateur.zoo import lenet5

onnx = pytest.importorskip("onnx")


def quantize(model: nn.Module, targets: dict[str, Levels]) -> dict[str, Quantized]:
    found = {}
    for name, target in targets.items():
        weight = model.get_parameter(name)
        weight.data = target.project(weight.detach())
        found[name] = target.quantized(weight.detach())
    return found


def closure(*names: str) -> set[str]:
    """Return distributions and all that they need, of those that are installed."""
    found: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        queue += [re.split(r"[^\w.-]", need)[0] for need in needs if "extra" not in need]
    return found


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of a new environment that has numpy and onnxruntime, as if installed."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in closure("numpy", "onnxruntime"):
        for file in metadata.files(name) or []:
            top = file.parts[0]
            source = Path(str(metadata.distribution(name).locate_file(top)))
            if top != ".." and not (packages / top).exists():
                (packages / top).symlink_to(source)
    return folder / "bin" / "python"


def run(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, *arguments], capture_output=True, text=True, env={}, cwd="/", check=False
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> sc.Result:
    recipe = {
        "model": "secateur.zoo:lenet5",
        "data": {"name": "digits", "train_samples": 200},
        "train": {"epochs": 2, "threads": 1},
        "stages": [{"method": "gmp", "epochs": 0, "retrain_epochs": 1, "density": 0.3, "bits": 3}],
    }
    return sc.compress(None, recipe, out=tmp_path_factory.mktemp("run"))


def test_a_folder_runs_where_only_numpy_and_onnxruntime_are(
    finished: sc.Result, fresh: Path, tmp_path: Path
) -> None:
    for package in ("torch", "secateur", "onnx"):
        missing = run(fresh, "-c", f"import {package}")
        assert f"No module named '{package}'" in missing.stderr
    place = tmp_path / "moved"
    place.mkdir()
    for name in ("model.onnx", "predict.py"):
        (place / name).write_bytes((finished.folder / name).read_bytes())
    splits = data.load("digits")
    assert splits.normalization
    (mean,), (std,) = splits.normalization["mean"], splits.normalization["std"]
    images = torch.stack([splits.test[i][0] for i in range(20)])
    with torch.no_grad():
        expected = finished.model(images)
    pixels = (images * std + mean).numpy()
    np.save(tmp_path / "pixels.npy", pixels)
    done = run(fresh, place / "predict.py", tmp_path / "pixels.npy")
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [splits.classes[i] for i in expected.argmax(1)]
    shares = [float(row[1].rstrip("%")) / 100 for row in rows]
    assert shares == pytest.approx(expected.softmax(1).amax(1).tolist(), abs=1e-3)
    np.save(tmp_path / "one.npy", (pixels[0, 0] * 255).round().astype(np.uint8))
    assert run(fresh, place / "predict.py", tmp_path / "one.npy").stdout.split()[0] == rows[0][0]
    assert "predict.py images.npy" in run(fresh, place / "predict.py").stderr


def test_the_command_writes_every_format(finished: sc.Result, tmp_path: Path) -> None:
    invoke = CliRunner().invoke
    for name in FORMATS:
        out = tmp_path / name
        done = invoke(
            cli.app, ["export", str(finished.folder), "--format", name, "--out", str(out)]
        )
        assert done.exit_code == 0, done.output
        assert all(str(file) in done.output.replace("\n", "") for file in out.iterdir())
    again = onnx.load(tmp_path / "onnx" / "model.onnx")
    notes = {each.key: each.value for each in again.metadata_props}
    assert notes["input"] == "1x1x28x28"
    assert json.loads(notes["classes"]) == list(data.load("digits").classes)
    few = ["export", str(finished.folder), "--out", str(tmp_path / "few"), "--batch", "1"]
    assert invoke(cli.app, few).exit_code == 0
    model = onnx.load(tmp_path / "few" / "model.onnx")
    assert sum(node.op_type == "MatMulNBits" for node in model.graph.node) == 2
    wrong = invoke(cli.app, [*few, "--format", "qonx"])
    assert wrong.exit_code == 2
    assert "Did you mean 'qonnx'?" in wrong.output
    arguments = ["secateur.zoo:lenet5", "--input", "1x1x28x28", "--out", str(tmp_path / "d")]
    dense = invoke(cli.app, ["export", *arguments, "--format", "qonnx"])
    assert dense.exit_code == 2
    assert "on levels" in dense.output


def network() -> tuple[nn.Module, dict[str, Quantized]]:
    """Return a network with weights and grids of many widths."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 25, 20), nn.ReLU(), nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 4),
    )  # fmt: skip
    targets = {
        "0.weight": Levels(1),
        "2.weight": ChannelLevels(5, zero=True),
        "5.weight": Levels(3),
        "7.weight": Levels(3, zero=True, spacing="power_of_two"),
    }
    quantized = quantize(model, targets)
    regrid(model, "s7;;u11;u3;u255")
    for at, step in ((0, 0.4), (5, 0.1), (7, 0.2), (9, 0.01)):
        model[at].input_quantizer.step.fill_(step)  # type: ignore[union-attr, operator]
    return model.eval(), quantized


def reference(path: Path, images: Tensor) -> Tensor:
    """Run a QONNX file in ONNX's own interpreter, its quantizers by qonnx's definition of them."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    quantizers = pytest.importorskip("qonnx.custom_op.general.quant")

    class Quant(OpRun):
        op_domain = "qonnx.custom_op.general"

        def _run(self, x, scale, zero, bits, signed, narrow, rounding_mode):  # type: ignore[no-untyped-def]
            found = quantizers.quant(x, scale, zero, bits, signed, narrow, rounding_mode)
            return (found.astype(np.float32),)

    class BipolarQuant(OpRun):
        op_domain = "qonnx.custom_op.general"

        def _run(self, x, scale):  # type: ignore[no-untyped-def]
            return (np.where(x >= 0, scale, -scale).astype(np.float32),)

    session = ReferenceEvaluator(onnx.load(path), new_ops=[Quant, BipolarQuant])
    return torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


def test_qonnx_says_every_width_and_computes_the_same(tmp_path: Path) -> None:
    model, quantized = network()
    images = torch.randn(6, 1, 9, 9)
    (path,) = export(Source(model, images, quantized), "qonnx", tmp_path)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(reference(path, images), expected, rtol=1e-4, atol=1e-4)
    proto = onnx.load(path)
    tensors = {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}
    widths = {"BipolarQuant": [], "Quant": []}
    for node in proto.graph.node:
        if node.op_type in widths:
            widths[node.op_type].append(int(tensors[node.input[3]]) if node.input[3:] else 1)
    assert sorted(widths["Quant"]) == [2, 4, 4, 4, 4, 5, 8]
    assert len(widths["BipolarQuant"]) == 1
    assert sum(node.op_type == "Clip" for node in proto.graph.node) == 1, "levels to 11 in 4 bits"
    for name, levels in quantized.items():
        np.testing.assert_array_equal(tensors[name], levels.weight(torch.float32).numpy())
        assert f"{name}_scale" in tensors


def test_qonnx_reads_it(tmp_path: Path) -> None:
    """Its own shape inference and clean-up, and its conversion to what ONNX Runtime executes."""
    wrapper = pytest.importorskip("qonnx.core.modelwrapper")
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.transformation.qonnx_to_qcdq import QuantToQCDQ

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
    targets = {"0.weight": Levels(3, zero=True), "2.weight": Levels(6, zero=True)}
    quantized = quantize(model, targets)
    rows = torch.rand(5, 9)
    (path,) = export(Source(model, rows, quantized), "qonnx", tmp_path)
    read = wrapper.ModelWrapper(str(path)).transform(InferDataTypes(allow_scaledint_dtypes=True))
    quants = [node for node in read.graph.node if node.op_type == "Quant"]
    names = [str(read.get_tensor_datatype(node.output[0])) for node in quants]
    assert names == ["SCALEDINT<3>", "SCALEDINT<6>"]
    converted = read.transform(QuantToQCDQ())
    assert not any(node.op_type == "Quant" for node in converted.graph.node)
    import onnxruntime

    session = onnxruntime.InferenceSession(
        converted.model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"input": rows.numpy()})
    np.testing.assert_allclose(found, model(rows).detach().numpy(), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.booleans(), st.booleans(), st.integers(0, 9))
def test_quant_is_what_qonnx_defines(bits: int, signed: bool, narrow: bool, seed: int) -> None:
    quantizers = pytest.importorskip("qonnx.custom_op.general.quant")
    signed = signed and bits > 1
    narrow = narrow and signed
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 2**bits
    scale = torch.tensor(0.75)
    expected = quantizers.quant(
        x.numpy(), scale.numpy(), np.float32(0), np.float32(bits), signed, narrow, "ROUND"
    )
    np.testing.assert_allclose(quant(x, scale, bits, signed, narrow).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "targets",
    [
        {"0.weight": Levels(2, zero=True), "2.weight": ChannelLevels(3, zero=True)},
        {"0.weight": Levels(5), "2.weight": Levels(8, zero=True)},
    ],
)
def test_compressed_tensors_gives_back_every_weight(
    targets: dict[str, Levels], tmp_path: Path
) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 7), nn.Linear(7, 7))
    quantized = quantize(model, targets)
    export(Source(model, torch.zeros(1, 50), quantized), "compressed-tensors", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    content = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(content)
    assert config.format == "pack-quantized"
    assert config.ignore == ["3"]
    assert torch.equal(tensors["3.weight"], model[3].weight)
    schemes = {name: each for each in config.config_groups.values() for name in each.targets}
    for name, levels in quantized.items():
        layer = name.partition(".")[0]
        own = {key[2:]: each for key, each in tensors.items() if key.startswith(f"{layer}.")}
        found = base.PackedQuantizationCompressor.decompress(own, schemes[layer])["weight"]
        assert torch.equal(found, levels.weight(torch.float32))
        bits = schemes[layer].weights.num_bits
        assert own["weight_packed"].shape[1] == -(-levels.levels.shape[1] * bits // 32)


def test_transformers_loads_it(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    names = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    quantized = quantize(model, dict.fromkeys(names, Levels(4, zero=True)))
    tokens = torch.arange(10)[None]
    export(Source(model, tokens, quantized), "compressed-tensors", tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        found, expected = loaded(tokens), model(tokens)
    torch.testing.assert_close(
        found.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5
    )


def test_what_no_format_holds_is_refused(tmp_path: Path) -> None:
    model = lenet5().eval()
    for name, hint in (("qonnx", "bits: 4"), ("compressed-tensors", "bits")):
        with pytest.raises(SecateurError, match=hint):
            export(Source(model, torch.zeros(1, 1, 28, 28)), name, tmp_path)
    reach = Quantized(torch.tensor([[128, 1]]), 1.0, 8, False)
    assert pack_quantized.bits_of(reach) is None
    assert not list(tmp_path.iterdir())


def test_compressed_tensors_refuses_grids_that_it_cannot_say(tmp_path: Path) -> None:
    model, quantized = network()
    with pytest.raises(ArtifactError, match="weights alone"):
        export(Source(model, torch.zeros(1), quantized), "compressed-tensors", tmp_path)
    assert not list(tmp_path.iterdir())


def test_layers_that_share_a_weight_are_integers_by_either_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    model[2].weight = model[0].weight
    images = torch.randn(4, 32)
    found = sc.quantize(model, [images]).quantized
    for names in (("0.weight",), ("2.weight",), tuple(found)):
        path = sc.export_onnx(model, images, tmp_path / "m.onnx", {n: found[n] for n in names})
        assert OnnxModel(path)(images).allclose(model(images), atol=0.05)


def test_weights_that_int8_does_not_hold_are_named() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    found = {}
    for name, levels in (("a.weight", Levels(8)), ("b.weight", Levels(8, zero=True))):
        found[name] = levels.quantized(levels.project(weight))
    (note,) = left_in_floats(found)
    assert "a.weight stay floats" in note
    assert "b.weight" not in note
    assert "zero: true" in note


def test_a_file_for_the_bench_is_in_the_form_for_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, levels = nn.Sequential(nn.Linear(64, 64)).eval(), Levels(4, zero=True)
    model[0].weight.data = levels.project(model[0].weight.detach())
    opened = Target(
        model, "1x64", quantized={"0.weight": levels.quantized(model[0].weight.detach())}
    )
    monkeypatch.setattr("secateur.cli.target.open_target", lambda *_: opened)
    path = onnx_file("packed", tmp_path / "n.onnx", None, False, batch=1)
    assert "MatMulNBits" in {node.op_type for node in onnx.load(path).graph.node}
