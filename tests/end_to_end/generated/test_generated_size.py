"""Generated code has one function for each kind of layer, however many layers there are, and whatever travels beside
them: buckets that hold less than a layer, or several. It gives what one device gives."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

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


def test_a_loop_stays_where_one_list_of_all_that_its_runs_leave_would_hold_too_much() -> None:
    """Gradients of a layer go into two buckets, of which the second is sent much later: a list for each."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=1024, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model, ids = LlamaForCausalLM(config), torch.empty(8, 512, dtype=torch.int64)
    code = shardc.compile(model, "dp=2,tp=4", {"input_ids": ids, "labels": ids}, hardware="h100").code
    forward, backward = code[code.index("\ndef forward") :].split("\ndef backward")
    assert "for i in range(8):  # model.layers.0 to model.layers.7" in forward
    assert "# model.layers.7 to model.layers.5" in backward
    assert "made_2 +=" in backward and "del made_2" in backward


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
