"""Write a network as one ONNX file that stock runtimes execute, and run such a file."""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.artifact import products
from secateur.artifact.fusion import fuse
from secateur.artifact.integers import (
    by_every_name,
    check_integers,
    translations,
    with_integers,
)
from secateur.codec import Quantized
from secateur.errors import ArtifactError, MissingDependencyError, SecateurError

OPSET = 20
IR_VERSION = 10
"""ONNX Runtime and OpenVINO of the last years read both; newer defaults of ``onnx`` they refuse."""

INPUT_NAME = "input"
OUTPUT_NAME = "output"


def export_onnx(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    path: Path,
    quantized: Mapping[str, Quantized] | None = None,
    batch: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write ``model`` in evaluation mode as one ONNX file for any batch size.

    The file is self-contained; above 2 GB, where the format does not allow that, the weights are
    in ``<path>.data`` beside it. The input is named ``input`` (``input_0``, ``input_1`` ... where
    the model takes several), the output ``output``; dimension 0 of each is the batch.

    Args:
        model: a network whose output is one tensor, batch first; it is left as it is.
        example_input: a batch of the right shape and dtype, or the tuple of arguments; values and
            batch size do not matter.
        path: the file to write; its folder is created.
        quantized: levels of its weights, by name (``packed.unpack`` tells them): where int8 holds
            them, the file has integers and scales instead of floats.
        batch: samples of an inference as it is deployed, if linear layers that have levels but
            read floats may round these to bytes, too: that makes them fast, in a form that depends
            on the batch (:mod:`secateur.artifact.products`). The file takes other batches as well.
        metadata: text that the file carries, such as how its inputs were normalized.

    Raises:
        MissingDependencyError: the extra ``onnx`` is not installed.
        SecateurError: the exporter cannot express the model.
        ArtifactError: it did not write the integers, or the file did not become smaller.
    """
    require("onnx", "onnxscript")
    path, given = Path(path), by_every_name(model, quantized or {})
    done: set[str] = set()
    tensors = (*model.parameters(), *model.buffers())
    floats = sum(tensor.nbytes for tensor in tensors)
    if batch is not None:
        model, done = products.with_products(model, given, example_input, batch)
        given = {name: levels for name, levels in given.items() if name not in done}
    exported, integers = with_integers(model, given)
    program = to_program(exported, example_input, translations() | products.translations())
    check_integers(program.model.graph, integers)
    products.check_products(program.model.graph, len(done))
    fuse(program.model.graph)
    if integers or done:
        _check_smaller(program.model.graph, floats)
    write_program(program, path, metadata)
    return path


def to_program(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    table: Mapping[Any, Callable[..., Any]],
) -> Any:
    """Return a network as torch's exporter writes it, for any batch size.

    Args:
        model: put in evaluation mode.
        example_input: as :func:`export_onnx` takes it.
        table: what the exporter writes for operators of our own.

    Raises:
        SecateurError: the exporter cannot express the model.
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    names = [INPUT_NAME] if len(inputs) == 1 else [f"{INPUT_NAME}_{i}" for i in range(len(inputs))]
    samples = torch.export.Dim("batch")
    try:
        with _quiet():
            program = torch.onnx.export(
                model.eval(),
                # a batch of 1 would be taken for a constant
                tuple(torch.cat([value[:1], value[:1]]) for value in inputs),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=names,
                output_names=[OUTPUT_NAME],
                dynamic_shapes=tuple({0: samples} for _ in inputs),
                custom_translation_table=dict(table),
            )
    except Exception as error:  # the exporter passes on whatever its many stages raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise SecateurError(
            f"onnx: {type(model).__name__} cannot be exported.\n"
            f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}\n"
            "Remove what depends on the data or on a fixed batch size, or export no ONNX file."
        ) from error
    assert program is not None
    if len(program.model.graph.outputs) != 1:
        raise SecateurError(
            f"onnx: {type(model).__name__} returns {len(program.model.graph.outputs)} tensors.\n"
            "Wrap it in a module that returns the one tensor you deploy."
        )
    for given in program.model.graph.inputs:
        if given.shape is not None and isinstance(given.shape[0], int):
            raise SecateurError(
                f"onnx: {type(model).__name__} fixes the size of a batch.\n"
                "Its forward() makes a number of it, by len(x) or int(...); use x.shape[0] itself."
            )
    return program


def write_program(program: Any, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write what :func:`to_program` returned, for runtimes of the last years."""
    _strip(program.model)
    program.model.metadata_props.update(metadata or {})
    program.model.ir_version = IR_VERSION
    _save(program, path)


def _check_smaller(graph: Any, floats: int) -> None:
    """Raise ArtifactError unless what a graph stores takes fewer bytes than a network does."""
    stored = sum(value.const_value.nbytes for value in graph.initializers.values())
    if stored >= floats:
        raise ArtifactError(
            f"onnx: {stored} bytes of numbers with integers are not less than {floats} of floats.\n"
            "The exporter left floats beside them; please report this as a bug."
        )


def _strip(model: Any) -> None:
    """Drop the exporter's notes on where each node came from: up to 1 kB each."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _save(program: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        program.save(Path(folder) / path.name, external_data=False)
        # the data file first: the file that names it appears only when it is complete
        for written in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            os.replace(written, path.parent / written.name)


class OnnxModel:
    """An ONNX file with one input and one output, called like a module, on the CPU.

    Args:
        path: the file.
        threads: threads of one operation; None leaves the choice to ONNX Runtime.
        optimized: whether operators are fused, and thereby run in integers; if not, each runs as it
            stands in the file.

    Raises:
        MissingDependencyError: the extra ``onnx`` is not installed.
        ArtifactError: the file is missing, or ONNX Runtime refuses it.
    """

    def __init__(self, path: Path, threads: int | None = None, optimized: bool = True) -> None:
        require("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has one exception class per status code
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(f"{path}: ONNX Runtime cannot load this file.\n{reason}") from error
        self._path, self._input = path, self._session.get_inputs()[0].name

    def __call__(self, batch: Tensor) -> Tensor:
        """Return the output for a batch of any size.

        Raises:
            ArtifactError: ONNX Runtime fails to run the file on it.
        """
        try:
            outputs = self._session.run(None, {self._input: batch.detach().cpu().numpy()})
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(
                f"{self._path}: ONNX Runtime cannot run this file.\n{reason}"
            ) from error
        return torch.from_numpy(outputs[0])


def require(*packages: str) -> None:
    """Raise :class:`MissingDependencyError` unless the packages can be imported.

    Args:
        packages: names; by default all that exporting and running take.
    """
    packages = packages or ("onnx", "onnxscript", "onnxruntime")
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"onnx: the package '{error.name}' is not installed.\n"
            'Install it with: pip install "secateur[onnx]"'
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which prints, warns and logs its progress."""
    disabled = logging.root.manager.disable
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        sink = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(sink))
        stack.enter_context(redirect_stderr(sink))
        stack.callback(logging.disable, disabled)
        logging.disable(logging.CRITICAL)
        yield
