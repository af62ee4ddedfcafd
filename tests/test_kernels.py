"""N:M kernels: the compiled one, its twin and a brute-force choice agree; torch's compilers too."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur import SecateurError
from secateur.kernels import native, nm_apply, nm_decay_, nm_mask, nm_part_, twin

ROOT = Path(__file__).parents[1]
PATTERNS = [(n, m) for m in range(2, 17) for n in range(1, m)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
needs_native = pytest.mark.skipif(
    native.library() is None, reason="the kernel is not built: pip install -e . with a C++ compiler"
)


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a weight with many ties and zeros of both signs, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    kind = torch.randint(0, 20, shape, generator=generator)
    weight = torch.where(kind < 8, weight.mul(2).round() / 2, weight)  # also makes -0.0
    weight[kind == 8] = math.inf
    weight[kind == 9] = -math.nan
    return weight.to(dtype)


def brute_mask(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """Choose by sorting each group in Python."""
    columns = weight.double().movedim(axis, -1)
    mask = torch.zeros(columns.shape, dtype=torch.bool)
    for place in itertools.product(*map(range, columns.shape[:-1])):
        values = columns[place].tolist()
        for start in range(0, len(values), m):
            group = range(start, min(start + m, len(values)))
            rank = [
                (-math.inf, -1) if values[i] != values[i] else (-abs(values[i]), 0) for i in group
            ]
            for _, index in sorted(zip(rank, group, strict=True))[:n]:
                mask[(*place, index)] = True
    return mask.movedim(-1, axis)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


@st.composite
def weights(draw: Callable[..., int]) -> tuple[Tensor, int]:
    """Return a weight of one to four dimensions in any memory order, perhaps a slice; an axis."""
    shape = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    axis = draw(st.integers(0, len(shape) - 1))
    shape[axis] = draw(st.integers(0, 70))
    order = draw(st.permutations(range(len(shape))))
    weight = drawn(tuple(shape[i] for i in order), draw(st.integers(0, 999)), draw(dtypes))
    weight = weight.permute([order.index(i) for i in range(len(shape))])
    return (weight[..., ::2] if draw(st.booleans()) else weight), axis


dtypes = st.sampled_from(DTYPES)


@needs_native
@settings(max_examples=150)
@given(weights(), st.sampled_from(PATTERNS))
def test_native_and_twin_agree_bit_for_bit(
    case: tuple[Tensor, int], pattern: tuple[int, int]
) -> None:
    weight, axis = case
    before = weight.clone()
    mask, applied = nm_mask(weight, *pattern, axis), nm_apply(weight, *pattern, axis)
    assert torch.equal(mask, twin.nm_mask(weight, *pattern, axis))
    assert torch.equal(bits(applied), bits(twin.nm_apply(weight, *pattern, axis)))
    assert applied.stride() == torch.empty_like(weight).stride()
    target = torch.ones_like(weight)
    other = target.clone()
    nm_decay_(target, weight, *pattern, axis, decay=-0.3)
    twin.nm_decay_(other, weight, *pattern, axis, -0.3)
    assert torch.equal(target.nan_to_num(nan=9), other.nan_to_num(nan=9))
    assert torch.equal(bits(weight), bits(before))


@needs_native
@settings(max_examples=100)
@given(weights(), st.sampled_from(PATTERNS), st.booleans(), st.sampled_from([1.0, 0.75]))
def test_parts_native_and_twin(
    case: tuple[Tensor, int], pattern: tuple[int, int], same: bool, factor: float
) -> None:
    weight, axis = case
    rest = torch.where(nm_mask(weight, *pattern, axis), -1, 0.5).to(weight.dtype)
    if same:  # as memory lies, so that the kernel serves
        rest = torch.empty_like(weight).copy_(rest)
        weight = torch.empty_like(weight).copy_(weight)
    whole = weight + factor * rest
    masks = [torch.empty_like(weight, dtype=torch.bool) for _ in range(2)]
    pairs = [(weight.clone(), rest.clone()) for _ in range(2)]
    nm_part_(*pairs[0], masks[0], *pattern, axis, factor=factor)
    twin.nm_part_(*pairs[1], masks[1], *pattern, axis, factor)
    assert torch.equal(masks[0], masks[1])
    for one, other in zip(*pairs, strict=True):
        assert torch.equal(one.nan_to_num(nan=9), other.nan_to_num(nan=9))
    kept, left = pairs[0]
    expected = nm_apply(whole, *pattern, axis)
    assert torch.equal(kept.nan_to_num(nan=9), expected.nan_to_num(nan=9))
    assert not torch.signbit(kept[kept == 0]).any()
    assert torch.equal(masks[0], kept != 0)
    assert torch.equal(torch.where(masks[0], kept, left).nan_to_num(), whole.nan_to_num())
    assert not bool(left[masks[0]].any())


@needs_native
@pytest.mark.parametrize("inner", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_native_and_twin(inner: int, dtype: torch.dtype) -> None:
    weight = drawn((3, 150, inner), inner, dtype)  # no multiple of most m
    for n, m in [*PATTERNS, (16, 32), (31, 64), (3, 100)]:
        assert torch.equal(nm_mask(weight, n, m), twin.nm_mask(weight, n, m, 1)), (n, m)
        assert torch.equal(bits(nm_apply(weight, n, m)), bits(twin.nm_apply(weight, n, m, 1)))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 5), (4, 8), (15, 16)])
@pytest.mark.parametrize("shape", [(4, 21), (2, 17, 3, 3)])
def test_twin_is_the_brute_force_choice(shape: tuple[int, ...], n: int, m: int) -> None:
    for axis, dtype in itertools.product(range(len(shape)), DTYPES):
        weight = drawn(shape, axis, dtype)
        expected = brute_mask(weight, n, m, axis)
        assert torch.equal(twin.nm_mask(weight, n, m, axis), expected)
        applied = twin.nm_apply(weight, n, m, axis)
        assert torch.equal(applied.nan_to_num(), torch.where(expected, weight, 0).nan_to_num())
        assert not torch.signbit(applied[applied == 0]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_is_the_brute_force_choice(dtype: torch.dtype) -> None:
    weight = drawn((3, 35, 2), 1, dtype)  # no multiple of most m; ties, zeros of both signs
    for (n, m), axis in itertools.product(PATTERNS, range(3)):
        found = nm_mask(weight, n, m, axis)
        assert torch.equal(found, brute_mask(weight, n, m, axis)), (n, m, axis)


@needs_native
def test_several_threads_make_what_one_makes() -> None:
    weight = drawn((1037, 1021), 0)
    threads = torch.get_num_threads()
    try:
        made = []
        for count in (1, 3):
            torch.set_num_threads(count)
            made.append(nm_apply(weight, 2, 4))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(bits(made[0]), bits(made[1]))


def test_ties_zeros_tails_and_nan() -> None:
    row = torch.tensor([[0.0, -0.0, 0.0, 0.0, 1.0, -1.0, 1.0, -1.0, math.nan, math.inf, 2.0, -3.0]])
    assert nm_mask(row, 2, 4).int().tolist() == [[1, 1, 0, 0] * 3]
    kept = nm_apply(torch.tensor([[-0.0, -2.0, 1.0, 0.5, 0.0, -0.0]]), 2, 4)  # the tail is whole
    assert kept.tolist() == [[0.0, -2.0, 1.0, 0.0, 0.0, 0.0]]
    assert not torch.signbit(kept[kept == 0]).any()
    assert nm_mask(torch.tensor([3.0, 1.0, 2.0]), 2, 8, axis=0).tolist() == [True, False, True]


def test_decay_pulls_only_what_is_not_kept() -> None:
    weight = nn.Parameter(torch.tensor([[4.0, 1.0, -2.0, 3.0]]))
    weight.grad = torch.tensor([[10.0, 10.0, 10.0, 10.0]])
    nm_decay_(weight.grad, weight, 2, 4, decay=0.5)  # SR-STE: g + decay (1 - E) W
    assert weight.grad.tolist() == [[10.0, 10.5, 9.0, 10.0]]
    nm_decay_(weight, weight, 2, 4, decay=-0.5)
    assert weight.tolist() == [[4.0, 0.5, -1.0, 3.0]]


def test_derivative_is_the_mask() -> None:
    weight = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: nm_apply(w, 2, 4), (weight,))


@pytest.mark.parametrize("name", ["nm_mask", "nm_apply", "nm_decay_", "nm_part_"])
def test_operators_keep_the_rules_of_torch(name: str) -> None:
    operator = getattr(torch.ops.secateur, name).default
    for weight in (
        torch.randn(6, 10, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(6, 9),
    ):
        arguments = [weight, 2, 4, 1]
        if name == "nm_apply":
            weight.requires_grad_()
        if name == "nm_decay_":
            arguments = [torch.randn_like(weight), *arguments, 0.1]
        if name == "nm_part_":
            mask = torch.zeros_like(weight, dtype=torch.bool)
            arguments = [weight, torch.randn_like(weight), mask, 2, 4, 1, 0.75]
        torch.library.opcheck(operator, tuple(arguments))


class Masked(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, nm_apply(self.weight, 2, 4), self.bias)


def test_compile_and_export_see_no_graph_break() -> None:
    model, x = Masked(8, 4), torch.randn(3, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        assert torch.equal(model.weight.grad != 0, nm_mask(model.weight, 2, 4))
    program = torch.export.export(model, (x,))
    assert "secateur.nm_apply" in str(program.graph)
    assert torch.equal(program.module()(x), model(x))


def test_decay_compiles() -> None:
    def pull(grad: Tensor, weight: Tensor) -> Tensor:
        nm_decay_(grad, weight, 1, 4, decay=0.1)
        return grad * 2

    weight, grad = torch.randn(4, 8), torch.randn(4, 8)
    eager, traced = grad.clone(), grad.clone()
    expected = pull(eager, weight)
    got = torch.compile(pull, fullgraph=True, backend="aot_eager")(traced, weight)
    assert torch.equal(got, expected)
    assert torch.equal(traced, eager)


@pytest.mark.parametrize(
    ("weight", "n", "m", "axis", "named"),
    [
        (torch.ones(4, 4), 0, 4, 1, "n: 0"),
        (torch.ones(4, 4), 4, 4, 1, "n: 4"),
        (torch.ones(4, 4), -1, -2, 1, "n: -1"),
        (torch.ones(4, 4), 2, 4, 2, "axis: 2"),
        (torch.ones(4), 2, 4, 1, "axis: 1"),
        (torch.ones(()), 2, 4, 0, "scalar"),
        (torch.ones(4, 4, dtype=torch.int32), 2, 4, 1, "torch.int32"),
        (torch.ones(4, 4).to_sparse(), 2, 4, 1, "layout"),
    ],
)
def test_bad_arguments_are_errors(weight: Tensor, n: int, m: int, axis: int, named: str) -> None:
    for call in (nm_mask, nm_apply):
        with pytest.raises(SecateurError, match=named):
            call(weight, n, m, axis)
    with pytest.raises(SecateurError, match=named):
        nm_decay_(torch.empty_like(weight), weight, n, m, axis, decay=0.1)
    with pytest.raises(SecateurError, match=named):
        nm_part_(weight, torch.empty_like(weight), torch.empty_like(weight), n, m, axis)


def test_parts_must_fit() -> None:
    weight, mask = torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(SecateurError, match="rest: "):
        nm_part_(weight, torch.ones(4, 5), mask, 2, 4)
    with pytest.raises(SecateurError, match="mask: "):
        nm_part_(weight, torch.ones(4, 4), torch.ones(4, 4), 2, 4)


def test_a_target_must_fit() -> None:
    for target in (torch.ones(4, 5), torch.ones(4, 4, dtype=torch.float64)):
        with pytest.raises(SecateurError, match="target"):
            nm_decay_(target, torch.ones(4, 4), 2, 4, decay=0.1)


def test_without_the_library_the_twin_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn((4, 12), 0)
    before = nm_apply(weight, 2, 4), nm_mask(weight, 2, 4)
    monkeypatch.setattr(native, "library", lambda: None)
    assert native.facts()["version"] is None
    assert torch.equal(bits(nm_apply(weight, 2, 4)), bits(before[0]))
    assert torch.equal(nm_mask(weight, 2, 4), before[1])


def test_a_library_of_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    assert native.library.__wrapped__() is None


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("make")), reason="no compiler here")
def test_kernel_under_sanitizers(tmp_path: Path) -> None:
    made = subprocess.run(
        ["make", "-s", "sanitize", f"BUILD={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert "agree" in made.stdout
