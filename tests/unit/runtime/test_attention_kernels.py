"""Attention with all of its features at once, at random, whole and in parts, against plain mathematics in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from checks.cuda_attention import CudaKernels
from shardc.runtime import Part, VirtualMesh
from shardc.runtime.kernels.attention import blocks, kernels, one_kernel
from shardc.runtime.kernels.attention.parts import attention_in_parts, attention_in_parts_backward

FORWARD, BACKWARD = torch.ops.shardc.attention.default, torch.ops.shardc.attention_backward.default


@dataclass(frozen=True)
class Case:
    """A call of attention: batch, heads of keys, group (0: q has four dims), lengths and widths, and the rest."""

    sizes: tuple[int, int, int, int, int, int, int]
    mask: tuple[str, tuple[int, ...]] | None = None
    sinking: bool = False
    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    dropout: float = 0.0
    seed: int = 0

    def operands(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """The operands of the call by name."""
        torch.manual_seed(self.seed)
        batch, heads, group, rows, columns, width, value = self.sizes
        of_q = (batch, heads, group, rows) if group else (batch, heads, rows)
        q, k, v = (
            torch.randn(*of_q, width),
            torch.randn(batch, heads, columns, width),
            torch.randn(batch, heads, columns, value),
        )
        mask = None
        if self.mask is not None:
            kind, kept = self.mask
            shape = [n if keep else 1 for n, keep in zip((*of_q, columns), kept, strict=False)]
            mask = torch.randn(shape).to(dtype) if kind == "float" else torch.rand(shape) > 0.4
        sinks = torch.randn(*of_q[1:-1]).to(dtype) if self.sinking else None
        draw = torch.Generator().manual_seed(self.seed).get_state() if self.dropout else None
        return {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "mask": mask, "sinks": sinks, "draw": draw}

    @property
    def literals(self) -> tuple[bool, float, int, float, float]:
        return self.causal, 0.4, self.window, self.softcap, self.dropout


def by_mathematics(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Any, sinks: Any, draw: Any) -> Tensor:
    """The result, as anybody would write it down, with all scores in memory."""
    if q.dim() == 5:
        k, v = k.unsqueeze(2), v.unsqueeze(2)
    scores = q @ k.mT * case.literals[1]
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    ahead = torch.arange(q.shape[-2]).unsqueeze(1) - torch.arange(k.shape[-2])
    if case.causal:
        scores = scores.masked_fill(ahead < 0, -math.inf)
    if case.window:
        outside = (ahead >= case.window) | (False if case.causal else ahead <= -case.window)
        scores = scores.masked_fill(outside, -math.inf)
    if sinks is not None:
        sink = sinks.unsqueeze(-1).unsqueeze(-1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1).nan_to_num()
    if draw is not None:
        torch.set_rng_state(draw)
        weights = torch.dropout(weights, case.dropout, True)
    return weights @ v


def cases(count: int, seed: int) -> list[Case]:
    """`count` cases at random."""
    choose = random.Random(seed)
    found: list[Case] = []
    for number in range(count):
        group = choose.choice([0, 0, 1, 2, 3])
        rows, columns = choose.randint(1, 14), choose.randint(1, 14)
        width, value = choose.choice([(4, 4), (4, 4), (3, 5), (4, 2)])
        mask = None
        if choose.random() < 0.5:
            kept = tuple(choose.randint(0, 1) for _ in range(5 if group else 4))
            mask = choose.choice(["float", "bool"]), kept
        found.append(
            Case(
                (choose.randint(1, 3), choose.choice([1, 2, 4]), group, rows, columns, width, value), mask,
                sinking=choose.random() < 0.3, causal=choose.random() < 0.5,
                window=choose.choice([0, 0, 1, 3, 5]), softcap=choose.choice([0.0, 0.0, 0.7]),
                dropout=choose.choice([0.0, 0.0, 0.3]), seed=number,
            )
        )  # fmt: skip
    return found


def expected_of(case: Case, given: dict[str, Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The result, a gradient of it, and the gradients of q, k, v and sinks."""
    free = {
        name: x.clone().requires_grad_() if name in ("q", "k", "v", "sinks") and x is not None else x
        for name, x in given.items()
    }
    out = by_mathematics(case, **free)
    grad = torch.randn(out.shape, dtype=out.dtype)
    leaves = [free[name] for name in ("q", "k", "v", "sinks") if free[name] is not None]
    return out.detach(), grad, list(torch.autograd.grad(out, leaves, grad))


def compare(found: Sequence[Tensor], right: Sequence[Tensor], what: object, tolerance: float = 1e-10) -> None:
    for place, (mine, other) in enumerate(zip(found, right, strict=False)):
        assert torch.allclose(mine, other, rtol=tolerance, atol=tolerance), (what, place, (mine - other).abs().max())


@pytest.mark.parametrize("tile", [1 << 22, 400])
def test_equals_mathematics(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """Whole, and in tiles that are smaller than the operands."""
    monkeypatch.setattr(blocks, "TILE", tile)
    for case in cases(100, tile):
        given = case.operands()
        out, grad, grads = expected_of(case, given)
        made, logsumexp = FORWARD(*given.values(), *case.literals)
        found = BACKWARD(grad, *given.values(), made, logsumexp, *case.literals)
        compare([made, *found], [out, *grads], case)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_diagonal_piece_in_which_a_query_sees_nothing(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Query 4 sees keys 0 to 3 only, which are a piece of their own where queries 4 to 7 are a rank's."""
    monkeypatch.setattr(blocks, "TILE", 64)
    q, k, v = torch.randn(3, 1, 1, 8, 8, dtype=torch.float64).unbind()
    mask = torch.zeros(1, 1, rows, 8, dtype=torch.float64)
    mask[..., 4] = -math.inf
    causal = torch.ones(8, 8, dtype=torch.bool).triu(1)
    expected = (q @ k.mT + mask).masked_fill(causal, -math.inf)

    def run() -> tuple[Tensor, Tensor]:
        r = Part(("x",), 8)
        own = q.narrow(2, r.start, 4), k, v, mask.narrow(2, r.start if rows > 1 else 0, min(rows, 4))
        return attention_in_parts(*own, None, None, True, 1.0, 0, 0.0, 0.0, r=r)

    made = VirtualMesh({"x": 2}).run(run, lambda _: ())
    compare(
        [torch.cat(parts, 2) for parts in zip(*made, strict=True)],
        [expected.softmax(-1) @ v, expected.logsumexp(-1)],
        rows,
    )


FLASH, EFFICIENT, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION


@pytest.mark.parametrize("tile", [1 << 22, 400])
@pytest.mark.parametrize("prefer", [(FLASH, EFFICIENT), (EFFICIENT,), (CUDNN, EFFICIENT), (CUDNN,)], ids=str)
def test_kernels_of_cuda(monkeypatch: pytest.MonkeyPatch, prefer: tuple[SDPBackend, ...], tile: int) -> None:
    """Stand-ins for the kernels of CUDA get what they ask for, and what is made of their results is right."""
    there = CudaKernels(*prefer)
    monkeypatch.setattr(kernels, "aten", there)
    for module in (blocks, one_kernel):
        monkeypatch.setattr(module, "kernel_for", kernels.cuda_kernel)
    monkeypatch.setattr(blocks, "TILE", tile)
    for case in cases(60, tile):
        *sizes, width, value = case.sizes
        case = replace(case, sizes=(*sizes, 2 * width, 2 * value), softcap=0.0, dropout=0.0)
        given = case.operands()
        out, grad, grads = expected_of(case, given)
        made, logsumexp = FORWARD(*given.values(), *case.literals)
        found = BACKWARD(grad, *given.values(), made, logsumexp, *case.literals)
        compare([made, *found], [out, *grads], case)
    names = {one: f"_scaled_dot_product_{one.name.split('_')[0].lower()}_attention" for one in prefer}
    assert there.called >= {name + end for name in names.values() for end in ("", "_backward")}


@pytest.mark.parametrize("prefer", [(FLASH, EFFICIENT), (EFFICIENT,), (CUDNN, EFFICIENT)], ids=str)
def test_kernels_of_cuda_drop_by_a_seed(monkeypatch: pytest.MonkeyPatch, prefer: tuple[SDPBackend, ...]) -> None:
    """Backward drops what forward dropped: the gradient is that of the result, by small differences. The default
    generator is left as it was."""
    there = CudaKernels(*prefer)
    monkeypatch.setattr(kernels, "aten", there)
    monkeypatch.setattr(kernels, "default_generator", lambda _: there.generator)
    for module in (blocks, one_kernel):
        monkeypatch.setattr(module, "kernel_for", kernels.cuda_kernel)
    before = there.generator.get_state()
    for case in (
        Case((2, 2, 0, 9, 9, 8, 8), causal=True, dropout=0.4),
        Case((1, 2, 2, 6, 11, 8, 8), causal=True, dropout=0.4),
        Case((1, 2, 0, 5, 7, 8, 8), ("bool", (1, 0, 1, 1)), dropout=0.4),
    ):
        given = {**case.operands(), "draw": torch.arange(8, dtype=torch.uint8)}
        out, logsumexp = FORWARD(*given.values(), *case.literals)
        grads = BACKWARD(torch.ones_like(out), *given.values(), out, logsumexp, *case.literals)
        for name, grad in zip("qkv", grads, strict=False):
            step = torch.randn_like(given[name]) * 1e-5
            sums = [FORWARD(*{**given, name: given[name] + s}.values(), *case.literals)[0].sum() for s in (step, -step)]
            torch.testing.assert_close((sums[0] - sums[1]) / 2, (grad * step).sum(), rtol=1e-5, atol=1e-12)
    assert torch.equal(there.generator.get_state(), before)
    chosen = "flash" if prefer[0] is not EFFICIENT else "efficient"
    assert f"_scaled_dot_product_{chosen}_attention_backward" in there.called
    assert not any("cudnn" in name for name in there.called)


DIMS = {
    "q": "bhgrd", "k": "bhsd", "v": "bhse", "mask": "bhgrs", "sinks": "hg", "draw": "z", "out": "bhgre",
}  # fmt: skip


def letters(name: str, grouped: bool) -> str:
    return DIMS[name] if grouped else DIMS[name].replace("g", "")


def sliced(x: Any, names: str, parts: dict[str, Part], told: dict[str, Part]) -> Any:
    """A rank's part. Its padding is NaN along the dims that the body is told of, and zero along others."""
    if x is None:
        return None
    names = names[len(names) - x.dim() :] if "r" in names and "s" in names else names
    for dim, name in enumerate(names):
        part = parts.get(name)
        if part is not None and x.shape[dim] != 1:
            own = x.narrow(dim, min(part.start, part.size), part.valid)
            shape = [*own.shape[:dim], part.length - part.valid, *own.shape[dim + 1 :]]
            padding = torch.full(shape, math.nan if x.is_floating_point() and name in told else 0, dtype=x.dtype)
            x = torch.cat([own, padding], dim)
    return x


def summed(
    made: list[Tensor], names: str, spans: list[dict[str, tuple[int, int]]], shape: Sequence[int], over: str
) -> Tensor:
    """The result of which each rank has a part, or an addend where a factor of `over` is split."""
    whole, added = torch.zeros(tuple(shape), dtype=torch.float64), set[Any]()
    for x, of_rank in zip(made, spans, strict=True):
        own = {name: span for name, span in of_rank.items() if name in names or name in over}
        if tuple(own.items()) not in added:  # ranks that hold the same count once
            added.add(tuple(own.items()))
            place = tuple(slice(own[n][0], sum(own[n])) if n in own else slice(None) for n in names)
            whole[place] += x[tuple(slice(0, own[n][1]) if n in own else slice(None) for n in names)]
    return whole


SPLITS: tuple[tuple[dict[str, int], dict[str, tuple[str, ...]]], ...] = (
    ({"x": 2}, {"r": ("x",)}), ({"x": 3}, {"s": ("x",)}), ({"x": 4}, {"r": ("x",)}), ({"x": 4}, {"s": ("x",)}),
    ({"x": 2, "y": 2}, {"r": ("x",), "s": ("y",)}), ({"x": 2, "y": 2}, {"r": ("x", "y")}),
    ({"x": 2, "y": 2}, {"h": ("x",), "s": ("y",)}), ({"x": 2, "y": 2}, {"b": ("x",), "r": ("y",)}),
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(SPLITS)))
def test_parts_equal_mathematics(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Queries split, keys split, both, heads and batch, evenly or not."""
    axes, split = SPLITS[number]
    machine = VirtualMesh(axes)
    monkeypatch.setattr(blocks, "TILE", 700)
    for case in cases(24, 100 + number):
        given = case.operands()
        out, grad, grads = expected_of(case, given)
        grouped = case.sizes[2] > 0
        sizes = dict(zip("bhgrs", case.sizes[:5], strict=False))
        parts = {name: Part(on, sizes[name]) for name, on in split.items() if sizes[name] > 1}

        def run(
            case: Case = case, given: dict[str, Any] = given, grad: Tensor = grad, parts: dict[str, Part] = parts,
            grouped: bool = grouped,
        ) -> Any:  # fmt: skip
            passed = parts if case.dropout else {n: p for n, p in parts.items() if n in "rs"}
            own = {name: sliced(x, letters(name, grouped), parts, passed) for name, x in given.items()}
            made, total = attention_in_parts(*own.values(), *case.literals, **passed)
            upper = sliced(grad, letters("out", grouped), parts, passed)
            back = attention_in_parts_backward(upper, *own.values(), made, total, *case.literals, **passed)
            return made, back, {name: (min(p.start, p.size), p.valid) for name, p in parts.items()}

        ran = machine.run(run, lambda _: ())
        spans = [spans for _, _, spans in ran]
        found = [summed([made for made, _, _ in ran], letters("out", grouped), spans, out.shape, "")]
        for place, (name, over) in enumerate((("q", "s"), ("k", "r"), ("v", "r"), ("sinks", "br"))[: len(grads)]):
            made = [back[place] for _, back, _ in ran]
            found.append(summed(made, letters(name, grouped), spans, grads[place].shape, over))
        compare(found, [out, *grads], (case, split))


class Largest(TorchDispatchMode):
    """The most bytes of any tensor that is made meanwhile. Views of what was there do not count."""

    def __init__(self, there: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.most, self._there = 0, {x.untyped_storage().data_ptr() for x in there if x is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._there:
                self.most = max(self.most, x.untyped_storage().nbytes())
        return made


LONG = 2048
LARGE = (
    Case((1, 2, 0, LONG, LONG, 4, 4), causal=True), Case((1, 1, 2, LONG, LONG, 4, 4)),
    Case((1, 2, 0, LONG, LONG, 4, 3), causal=True, window=600), Case((1, 1, 0, LONG, LONG, 4, 4), window=64),
    Case((1, 1, 2, LONG, LONG, 4, 4), causal=True, softcap=2.0, sinking=True),
    Case((1, 1, 0, LONG, LONG, 4, 4), ("bool", (0, 0, 1, 1))),
    Case((1, 1, 0, LONG, LONG, 4, 4), causal=True, dropout=0.1),
)  # fmt: skip


@pytest.mark.parametrize("split", [{}, {"r": ("x",)}, {"s": ("x",)}])
@pytest.mark.parametrize("number", range(len(LARGE)))
def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch, number: int, split: dict[str, tuple[str, ...]]) -> None:
    """No tensor is larger than a tile or an operand. The scores would have 16 or 32 MiB."""
    monkeypatch.setattr(blocks, "TILE", 1 << 18)
    case = LARGE[number]
    given = case.operands(torch.float32)
    parts = {name: Part(on, LONG) for name, on in split.items()}

    def run() -> int:
        own = {name: sliced(x, letters(name, case.sizes[2] > 0), parts, parts) for name, x in given.items()}
        with Largest(list(own.values())) as largest:
            made, total = attention_in_parts(*own.values(), *case.literals, **parts)
            attention_in_parts_backward(made, *own.values(), made, total, *case.literals, **parts)
        return largest.most

    assert max(VirtualMesh({"x": 2}).run(run, lambda _: ())) <= 1 << 19
