"""From a module to steps: one run of ``torch.export``, then a walk over its ATen operators."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from secateur import parametrized
from secateur.channels import operators as ops
from secateur.channels.layer import Layer
from secateur.channels.steps import Norm, Number, Pointwise, Profile, Step
from secateur.channels.ties import Ties
from secateur.errors import ChannelError

Handler = Callable[["Tracer", fx.Node, dict[str, Any]], bool]
"""Adds the steps of a node and returns True, or returns False: the node is then unknown."""

RETURNED = "the model returns it"
"""Why the channels of an output stay, which nobody wonders about."""


class Activation(NamedTuple):
    """What a step returns.

    Attributes:
        profile: its shape with dimensions of size 1 wherever all positions are the same channel.
        labels: int64, of that profile; None where channels cannot be told apart.
        shape: its real shape.
    """

    profile: Profile
    labels: Tensor | None
    shape: tuple[int, ...]

    def vector(self, dim: int, size: int) -> Tensor | None:
        """Return the labels along a dimension, ``(size,)``, if nothing else tells them apart."""
        if self.labels is None or self.labels.numel() != size or self.profile[dim] != size:
            return None
        return self.labels.flatten()


def export(model: nn.Module, example_input: Tensor) -> torch.export.ExportedProgram:
    """Trace a model in evaluation mode; its training flags are left as they were.

    Raises:
        ChannelError: ``torch.export`` cannot trace it.
    """
    with evaluating(model):
        try:
            program = torch.export.export(model, (example_input,), strict=False)
        except Exception as error:  # whatever the user's forward and the tracer raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ChannelError(
                f"model: torch.export cannot trace {type(model).__name__}: {first}\n"
                "Its channels cannot be followed; make forward() free of branches on tensor values."
            ) from error
    program.graph.eliminate_dead_code(_changes_something)  # what is thrown away needs no channels
    return program


def _changes_something(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


def settled(model: nn.Module) -> nn.Module:
    """Return the model, or a copy with its parametrized weights as they are, if it has some."""
    if not any(parametrize.is_parametrized(module) for module in model.modules()):
        return model
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrized.settle(module, name)
    return copied


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode and each of its modules back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Tracer:
    """Walks a traced graph once.

    Attributes:
        steps: in order of execution.
        outputs: indices of the steps that the model returns.
        sides: channel labels, ``(channels,)``, by module name and side, ``"in"`` or ``"out"``.
        heads: labels of heads, ``(heads,)``, by the name of the module that attends.
        rigid: labels that run through sizes which may be fixed in the model's code.
        ties: which labels belong together.
    """

    def __init__(
        self, model: nn.Module, handlers: Mapping[Any, Handler], pointwise: Handler
    ) -> None:
        self.model = model
        self.steps: list[Step] = []
        self.outputs: list[int] = []
        self.sides: dict[tuple[str, str], Tensor] = {}
        self.heads: dict[str, Tensor] = {}
        self.rigid: list[Tensor] = []
        self.ties = Ties()
        self.activations: list[Activation] = []
        self.tensors: dict[fx.Node, str] = {}
        self._handlers, self._pointwise = handlers, pointwise
        self._places: dict[fx.Node, int | list[int]] = {}
        self._families: dict[fx.Node, list[fx.Node]] = {}
        self._roots: dict[fx.Node, fx.Node] = {}
        self._first_use: dict[tuple[int, str], Tensor] = {}
        self._raw: set[int] = set()
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._modules: list[tuple[str, nn.Module]] = list(model.named_modules())

    def run(self, program: torch.export.ExportedProgram) -> None:
        """Walk the graph of an exported program of the model."""
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        canonical = {id(p): name for name, p in self.model.named_parameters()}
        self._order = {node: i for i, node in enumerate(program.graph.nodes)}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                if (name := names.get(node.name)) is not None:
                    self.tensors[node] = canonical.get(id(self._parameters.get(name)), name)
                self._source(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self.outputs = self.inputs(node)
            else:
                self._source(node)
        for index in self.outputs:
            self.ties.pin(self.activations[index].labels, RETURNED)
        self._settle()

    def _source(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        profile = (1,) * getattr(value, "ndim", 0)
        single = node in self.tensors and value.numel() == 1 and value.is_floating_point()  # type: ignore[union-attr]
        step = Number(node.name, (), profile, self.tensors[node]) if single else None
        self.add(node, step or Step(node.name, (), profile))

    def _call(self, node: fx.Node) -> None:
        function: Any = node.target
        if function is operator.getitem:
            source, item = node.args
            self._places[node] = self._places[source][item]  # type: ignore[index]
            self._join_family(node, source)  # type: ignore[arg-type]
            return
        packet = getattr(function, "overloadpacket", None)
        handler = self._handlers.get(packet)
        if handler is None and packet is not None and ops.is_pointwise(function):
            handler = self._pointwise
        inputs = self.inputs(node)
        labelled = any(self.activations[i].labels is not None for i in inputs)
        single = bool(inputs) and all(isinstance(self.steps[i], Number | Pointwise) for i in inputs)
        known = labelled or packet in ops.LAYERS or (single and handler is self._pointwise)
        followed = handler is not None and known
        call = ops.named_arguments(function, node.args, node.kwargs) if followed else {}
        if handler is None or not followed or not handler(self, node, call):
            self._unknown(node)
        schema, first = getattr(function, "_schema", None), (*node.args, None)[0]
        if schema is not None and isinstance(first, fx.Node):
            if packet in ops.MOVES or any(r.alias_info is not None for r in schema.returns):
                self._join_family(node, first)
            if schema.is_mutable:
                self._mutate(node, first)

    # -- what handlers use ---------------------------------------------------------------------

    def inputs(self, node: fx.Node) -> list[int]:
        """Return the indices of the steps whose activations a node takes."""
        found: list[int] = []
        for given in node.all_input_nodes:
            place = self._places[given]
            found.extend(place if isinstance(place, list) else [place])
        return found

    def place(self, node: Any) -> int:
        """Return the index of the step that made a node's activation."""
        index = self._places[node]
        assert isinstance(index, int)
        return index

    def add(self, node: fx.Node, step: Step, labels: Tensor | None = None) -> None:
        """Append the step of a node with one output."""
        self._places[node] = self._append(step, labels, node.meta.get("val"))

    def add_all(self, node: fx.Node, steps: list[Step], labels: list[Tensor | None]) -> None:
        """Append the steps of a node with several outputs."""
        given = zip(steps, labels, node.meta["val"], strict=True)
        self._places[node] = [self._append(*one) for one in given]

    def _append(self, step: Step, labels: Tensor | None, value: Any) -> int:
        self.steps.append(step)
        self.activations.append(
            Activation(step.profile, labels, tuple(getattr(value, "shape", ())))
        )
        return len(self.steps) - 1

    def modules(self, node: Any, types: tuple[type, ...]) -> list[tuple[str, nn.Module]]:
        """Return the modules of these types whose weight or running mean a node is."""
        owner, _, leaf = self.tensors.get(node, "").rpartition(".")
        if node not in self.tensors or leaf not in ("weight", "running_mean"):
            return []
        tensor = getattr(self.model.get_submodule(owner), leaf)
        pairs = [pair for pair in self._modules if isinstance(pair[1], types)]
        return [(name, module) for name, module in pairs if getattr(module, leaf) is tensor]

    def side(self, owner: object, name: str, labels: Tensor) -> None:
        """Tie the labels of one side of a weight or module to those of its other uses."""
        self.ties.tie(self._first_use.setdefault((id(owner), name), labels), labels)

    def parameter(self, node: Any) -> nn.Parameter | None:
        """Return the parameter that a node is, if it is one."""
        return self._parameters.get(self.tensors.get(node, ""))

    # -- what no handler knows -----------------------------------------------------------------

    def _unknown(self, node: fx.Node) -> None:
        """Keep whole whatever touches it."""
        inputs = tuple(self.inputs(node))
        for index in inputs:
            self.ties.pin(self.activations[index].labels, f"{title(node)} needs all channels")
        self._raw.update(id(self.parameter(given)) for given in node.all_input_nodes)
        value = node.meta.get("val")
        several = isinstance(value, (list, tuple))
        values = list(value) if several else [value]  # type: ignore[arg-type]
        steps = [Step(node.name, inputs, (1,) * getattr(v, "ndim", 0)) for v in values]
        places = [self._append(s, None, v) for s, v in zip(steps, values, strict=True)]
        self._places[node] = places if several else places[0]

    def _join_family(self, node: fx.Node, source: fx.Node) -> None:
        """Remember that two nodes may share memory."""
        root = self._roots.setdefault(source, source)
        self._roots[node] = root
        self._families.setdefault(root, [source]).append(node)

    def _mutate(self, node: fx.Node, changed: fx.Node) -> None:
        """After an operator in place its argument is its result; other views are not followed."""
        result = self._places[node]
        for relative in self._families[self._roots[changed]]:
            later = any(self._order[user] > self._order[node] for user in relative.users)
            place = self._places[relative]
            if relative in (node, changed) or not later or isinstance(place, list):
                continue
            for index in (place, *self.inputs(node)):
                labels = self.activations[index].labels
                self.ties.pin(labels, f"{title(node)} changes a view of it in place")
            value = relative.meta["val"]
            step = Step(relative.name, (place, *self.inputs(node)), (1,) * value.ndim)
            self._places[relative] = self._append(step, None, value)
        self._places[changed] = result

    def _settle(self) -> None:
        """Find what several steps share, and where constants can be folded to."""
        layers = [step for step in self.steps if isinstance(step, Layer)]
        norms = [step for step in self.steps if isinstance(step, Norm)]
        uses = Counter(
            id(self._parameters[step.weight]) for step in layers if step.weight in self._parameters
        )
        users = Counter(index for step in self.steps for index in step.inputs)
        users.update(self.outputs)
        biases = Counter(step.bias for step in layers)
        means = Counter(step.mean for step in norms)
        for step in layers:
            weight = id(self._parameters.get(step.weight))
            step.shared = uses[weight] > 1 or weight in self._raw
            if weight in self._raw:
                for labels in (step.given, step.made):
                    self.ties.pin(labels, f"{step.weight} is also used outside its layer")
            if step.bias is not None:
                step.absorber = step.bias if biases[step.bias] == 1 else ""
        for norm in norms:
            made = self.steps[norm.inputs[0]]
            alone = users[norm.inputs[0]] == 1 and means[norm.mean] == 1
            if isinstance(made, Layer) and made.bias is None and alone:
                made.absorber = norm.mean


def title(node: fx.Node) -> str:
    """Return an operator's name and the module that calls it, for messages."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "__name__", str(packet))
    module = caller(node)
    return f"{name} in {module}" if module else name


def caller(node: fx.Node) -> str:
    """Return the name of the module that calls an operator; empty if the model itself does."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(list(stack.values())) if path), "")
