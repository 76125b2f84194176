"""What rules say that operators and bodies allocate, against what they do allocate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from checks.brute_force import Call
from checks.peaks import peaks
from samples.calls.sample import Sample
from shardc.ir.mesh import Mesh
from shardc.rules.factors.strategy import PLAIN, Strategy, workspace
from shardc.rules.families import attention_workspace
from shardc.rules.families.window_workspace import Convolution
from shardc.runtime.kernels.attention import blocks

FORWARD, BACKWARD = torch.ops.shardc.attention.default, torch.ops.shardc.attention_backward.default
aten = torch.ops.aten
LENGTH = 1536


def by_position(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    batch, *heads, length, width = shape
    return torch.randn(batch, length, *heads, width).to(dtype).movedim(1, -2)


def attention(backward: bool = False, **asked: Any) -> Sample:
    """A call of attention with 2 heads of keys and rows of 64 numbers."""
    dtype, group, value = asked.get("dtype", torch.float32), asked.get("group", 0), asked.get("value", 64)
    heads = (2, group) if group else (2,)
    q, k, v = (
        by_position(1, *of, LENGTH, width, dtype=dtype) for of, width in ((heads, 64), ((2,), 64), ((2,), value))
    )
    mask = torch.rand(1, 1, LENGTH, LENGTH) > 0.1 if asked.get("masked") else None
    sinks = torch.randn(heads).to(dtype) if asked.get("sinking") else None
    draw = torch.get_rng_state() if asked.get("dropout") else None
    draw = torch.arange(8, dtype=torch.uint8) if asked.get("seeded") else draw
    literals = (
        asked.get("causal", True),
        0.1,
        asked.get("window", 0),
        asked.get("softcap", 0.0),
        asked.get("dropout", 0.0),
    )
    given = q, k, v, mask, sinks, draw
    if not backward:
        return Sample(FORWARD, (*given, *literals))
    out, total = FORWARD(*given, *literals)
    return Sample(BACKWARD, (torch.randn_like(out), *given, out, total, *literals))


ASKED: dict[str, dict[str, Any]] = {
    "causal": {}, "full": {"causal": False}, "half": {"dtype": torch.bfloat16}, "grouped": {"group": 3},
    "window": {"window": 400}, "capped": {"softcap": 5.0}, "capped half": {"softcap": 5.0, "dtype": torch.bfloat16},
    "masked": {"masked": True, "causal": False}, "dropout": {"dropout": 0.1}, "narrow values": {"value": 32},
    "dropout by a seed": {"dropout": 0.1, "seeded": True},
    "wide values": {"value": 96}, "sinks": {"sinking": True}, "window half": {"window": 400, "dtype": torch.bfloat16},
}  # fmt: skip


def nbytes(values: Any) -> int:
    return sum(
        {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in values if isinstance(x, Tensor)}.values()
    )


def allocated(sample: Sample) -> int:
    """The most bytes that are there while an operator runs, its operands included, as torch's allocator reports."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        made = sample.target(*sample.args)
    held = most = 0
    events = profiled.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert made is not None
    return most + nbytes(sample.args)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ASKED)
def test_attention_whole(name: str, backward: bool) -> None:
    sample = attention(backward, **ASKED[name])
    call, mesh = Call(sample), Mesh((("x", 2),))
    plain = next(s for s in call.strategies(mesh) if s.variant == PLAIN and not any(s.split) and not s.passes)
    made = sample.target(*sample.args)
    predicted = nbytes(sample.args) + nbytes(made) + workspace(call.shape, plain, mesh)
    assert predicted == pytest.approx(allocated(sample), rel=0.05)


SPLIT = [*((name, factor, back) for name in ASKED for factor in "rs" for back in (False, True))]


@pytest.mark.parametrize(("name", "factor", "backward"), SPLIT)
def test_attention_in_parts(monkeypatch: pytest.MonkeyPatch, name: str, factor: str, backward: bool) -> None:
    monkeypatch.setattr(attention_workspace, "inside_kernel", lambda *_: [])
    monkeypatch.setattr(blocks, "TILE", 1 << 16)
    sample = attention(backward, **ASKED[name])
    call, mesh = Call(sample), Mesh((("x", 2),))
    place = next(i for i, f in enumerate(call.shape.factors) if f.name == factor)
    split = tuple(("x",) if i == place else () for i in range(len(call.shape.factors)))
    strategy = next(s for s in call.strategies(mesh) if s.split == split and s.variant == "parts")
    # whether the widened addends of split keys are still there beside their sum depends on how threads take turns
    compare(call, strategy, mesh, 0.17 if factor == "s" and "half" in name and not backward else 0.05)


def compare(call: Call, strategy: Strategy, mesh: Mesh, within: float = 0.05) -> None:
    def local(sides: Any) -> int:
        sizes = [f.size // (2 if on else 1) for f, on in zip(call.shape.factors, strategy.split, strict=True)]
        total = 0
        for side in sides:
            elements = 1
            for size, factor in zip(side.sizes, side.factors, strict=True):
                # a dim of windows may have more rows than its factor has points
                elements *= size if factor is None else size // call.shape.factors[factor].size * sizes[factor]
            total += elements * side.itemsize
        return total

    predicted = local(call.shape.operands) + local(call.shape.results) + workspace(call.shape, strategy, mesh)
    found: list[int] = []
    for _ in range(4):  # in collectives the threads of a virtual mesh hold what belongs to others, as long as they take
        found += peaks(call, strategy, mesh)
        if any(predicted == pytest.approx(one, rel=within) for one in found):
            return
    raise AssertionError((predicted, found))


def softmaxes(dtype: torch.dtype, backward: bool) -> list[Sample]:
    """Softmax, and what a loss over the vocabulary consists of."""
    x = torch.randn(64, 8192).to(dtype)
    if backward:
        made, logs = torch.softmax(x, 1), torch.log_softmax(x, 1)
        return [
            Sample(aten._softmax_backward_data.default, (x, made, 1, dtype)),
            Sample(aten._log_softmax_backward_data.default, (x, logs, 1, dtype)),
        ]
    return [
        Sample(aten._softmax.default, (x, 1, False)),
        Sample(aten._log_softmax.default, (x, 1, False)),
        Sample(aten.logsumexp.default, (x, [1])),
    ]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_over_a_split_vocabulary(dtype: torch.dtype, backward: bool) -> None:
    mesh = Mesh((("x", 2),))
    for sample in softmaxes(dtype, backward):
        call = Call(sample)
        for strategy in call.strategies(mesh):
            names = [f.name for f, axes in zip(call.shape.factors, strategy.split, strict=True) if axes]
            if names in (["s"], ["d1"]):
                compare(call, strategy, mesh)


CONVOLUTIONS: dict[str, dict[str, int]] = {
    "plain": {}, "single": {"kernel": 1, "padding": 0, "inputs": 64}, "strided": {"stride": 2},
    "dilated": {"dilation": 2, "padding": 2}, "in groups": {"groups": 4}, "depthwise": {"groups": 16, "outputs": 16},
    "colours": {"inputs": 3, "kernel": 7},
    "transposed": {"transposed": 1, "kernel": 2, "stride": 2, "padding": 0},
}  # fmt: skip


def convolution(dtype: torch.dtype, backward: bool, asked: dict[str, int]) -> Sample:
    inputs, outputs, kernel = asked.get("inputs", 16), asked.get("outputs", 32), asked.get("kernel", 3)
    groups, transposed = asked.get("groups", 1), bool(asked.get("transposed"))
    x = torch.randn(8, inputs, 48, 48, dtype=dtype)
    channels = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    weight = torch.randn(*channels, kernel, kernel, dtype=dtype)
    settings = [[asked.get(name, least)] * 2 for name, least in (("stride", 1), ("padding", 1), ("dilation", 1))]
    literals = *settings, transposed, [0, 0], groups
    if not backward:
        return Sample(aten.convolution.default, (x, weight, None, *literals))
    grad = torch.randn_like(aten.convolution(x, weight, None, *literals))
    return Sample(aten.convolution_backward.default, (grad, x, weight, [outputs], *literals, [True, True, True]))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_whole(name: str, dtype: torch.dtype, backward: bool) -> None:
    sample = convolution(dtype, backward, CONVOLUTIONS[name])
    call, mesh = Call(sample), Mesh((("x", 2),))
    plain = next(s for s in call.strategies(mesh) if s.variant == PLAIN and not any(s.split) and not s.passes)
    sample.target(*sample.args)  # the first call of a shape prepares more
    made = sample.target(*sample.args)
    predicted = nbytes(sample.args) + nbytes([made] if isinstance(made, Tensor) else made)
    predicted += workspace(call.shape, plain, mesh)
    # of few channels, oneDNN makes blocks that are more than half empty
    within = 0.16 if name == "colours" and backward and dtype == torch.float32 else 0.05
    assert predicted == pytest.approx(allocated(sample), rel=within)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["plain", "in groups", "transposed"])
def test_convolution_in_parts(monkeypatch: pytest.MonkeyPatch, name: str, backward: bool) -> None:
    for inside in ("forward", "backward"):
        monkeypatch.setattr(Convolution, inside, lambda *_: ())
    call, mesh = Call(convolution(torch.float32, backward, CONVOLUTIONS[name])), Mesh((("x", 2),))
    split = [s for s in call.strategies(mesh) if s.variant != PLAIN]
    assert split
    for strategy in split:
        compare(call, strategy, mesh)
