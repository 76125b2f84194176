"""Repeated layers: a trace of a few of them, with the others filled in, is the trace of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from checks.stitched import Spy, check_values, in_full
from samples.repeated_layers import Block, Stack, X
from shardc.capture.trace import capture
from shardc.ir.program import Role, value_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 7, "num_attention_heads": 4, "intermediate_size": 64}
CAUSAL = {**SMALL, "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 16, "use_cache": False}
TOKENS = torch.arange(2 * 8).reshape(2, 8) * 5 % 32


def transformer(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 7, "n_head": 4, "n_positions": 16, "vocab_size": 32}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, use_cache=False))
    if name == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(**CAUSAL, num_local_experts=4))
    if name == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(vocab_size=32, max_position_embeddings=16, **SMALL))
    if name == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 7, "num_heads": 4, "vocab_size": 32}
        return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, use_cache=False, decoder_start_token_id=0))
    if name == "gemma2":  # a layer that looks at a window and one that looks at everything, in turn
        sizes = {**CAUSAL, "num_hidden_layers": 9, "head_dim": 8, "sliding_window": 4}
        return hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes))
    return hf.LlamaForCausalLM(hf.LlamaConfig(**CAUSAL))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "t5", "gemma2"])
def test_transformers_are_stitched_to_what_a_full_trace_gives(
    name: str, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = transformer(name)
    program = in_full(module, monkeypatch, input_ids=TOKENS, labels=TOKENS)
    hole = {"t5": [range(4, 6)] * 2, "gemma2": [range(5, 7)]}.get(name, [range(3, 6)])
    assert (spy.filled, spy.refused) == (hole, [])
    if name in ("llama", "mixtral"):
        check_values(program, module, input_ids=TOKENS, labels=TOKENS)


class Dropping(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1)


class Frozen(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up.requires_grad_(False)


class Pair(Block):
    """Takes and returns two values, of which one only passes through."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x) * y, y


class Pairs(Stack):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for layer in self.layers:
            x, y = layer(x, y)
        return (x * y).sum()


class Attributes(nn.Module):
    """Equal children that are no list, with other names than numbers."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcdefgh":
            self.add_module(name, Block())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x.sum()


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "blocks": Stack,
    "random": lambda: Stack(lambda _: Dropping()),
    "frozen": lambda: Stack(lambda _: Frozen()),
    "two_kinds": lambda: Stack(lambda i: Block() if i % 2 else nn.Linear(8, 8), 10),
    "one_of_another_kind_first": lambda: Stack(lambda i: Block() if i else nn.Linear(8, 8), 9),
    "shared_value": lambda: Pairs(lambda _: Pair()),
    "children": Attributes,
    "sequential": lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(8))),
    "torch": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 7),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_modules_are_stitched(name: str, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    module = PLAIN[name]()
    program = in_full(module, monkeypatch, X[None] if name == "torch" else X)
    assert len(spy.filled) == 1 and not spy.refused
    if name in ("blocks", "shared_value", "two_kinds"):
        check_values(program, module, x=X)


def test_without_gradients(spy: Spy) -> None:
    program = capture(Stack(), (X,), grad=False)
    assert spy.filled and {port.role for port in program.outputs} == {Role.OUTPUT}
    modules = {node.meta["module"] for node in program.graph.nodes if node.op == "call_function"}
    assert {f"layers.{i}.up" for i in range(8)} <= modules


def test_shallow_models_are_traced_in_full(spy: Spy) -> None:
    capture(Stack(depth=5), (X,))
    assert not spy.filled and not spy.refused


def test_values_are_shared_with_nothing_that_changes(spy: Spy) -> None:
    program = capture(Stack(), (X,))
    names = [node.name for node in program.graph.nodes]
    assert spy.filled and len(set(names)) == len(names)
    assert all(value_of(node) is not None for node in program.graph.nodes if node.op != "output")
