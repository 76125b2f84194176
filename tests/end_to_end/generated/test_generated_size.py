"""Generated code has one function for each kind of layer, however many layers there are, and whatever travels beside
them: buckets that hold less than a layer, or several. It gives what one device gives."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import shardc
from samples.repeated_layers import Stack
from shardc.compiled import Compiled
from shardc.cost.buckets import Buckets
from shardc.cost.hardware import Hardware, hardware
from shardc.source.grammar import read

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
LAYER_BYTES = 1184
BATCH = {name: ("dp", None) for name in ("layers.*.up", "layers.*.down", "first")}
LINES_OF_A_BUCKET = 13


def busy() -> Hardware:
    """Computes long enough for everything to be sent meanwhile."""
    h100 = hardware("h100")
    return replace(h100, flops=dict.fromkeys(h100.flops, 1e8), launch=1e-5)


def compiled(model: nn.Module) -> Compiled:
    return shardc.compile(model, "dp=4", (X,), hardware=busy(), memory="unbounded", constraints=BATCH)


def functions(code: str) -> int:
    return sum(name.startswith("layer") for name in read(code))


@pytest.mark.parametrize("layers_in_bucket", [0.8, 2.2])
def test_buckets_leave_layers_alike(layers_in_bucket: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buckets, "full", lambda *_: layers_in_bucket * LAYER_BYTES)
    torch.manual_seed(0)
    few, many = Stack(depth=5), Stack(depth=9)
    expected = copy.deepcopy(many)
    short, long = compiled(few), compiled(many)
    buckets = long.code.count("_bucket.start(") - short.code.count("_bucket.start(")
    assert max(functions(short.code), functions(long.code)) <= 3
    assert long.code.count("\n") - short.code.count("\n") <= buckets * LINES_OF_A_BUCKET + 4
    expected(X).backward()
    long(X).backward()
    for (name, one), other in zip(many.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
