"""A step of a sharded model runs the kernels of the plain model, and no more of them. They are counted, not timed."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from checks.operators_run import COPY, operators_run
from shardc import shard

OF_THE_LOSS = 20
"""Kernels by which a cross-entropy that any axis may split has more than torch's own, each a number a token."""

MATRICES = ("mm", "addmm", "bmm", "baddbmm")


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope="module", params=[llama, gpt2])
def both(request: pytest.FixtureRequest) -> tuple[Counter[str], Counter[str]]:
    """The kernels of a training step: of the plain model, and of the same on a mesh of one."""
    torch.manual_seed(0)
    plain: nn.Module = request.param()
    ids = torch.randint(1, 64, (2, 16))

    def step(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()

        run()
        return run

    eager, ours = step(plain), step(shard(copy.deepcopy(plain), mesh="a=1"))
    return operators_run(eager)[0], operators_run(ours)[0]


def test_no_more_kernels_than_the_plain_model(both: tuple[Counter[str], Counter[str]]) -> None:
    eager, ours = both
    assert eager.total() > 100
    assert ours.total() <= eager.total() + OF_THE_LOSS


def test_matrix_products_and_fused_kernels_are_those_of_the_plain_model(
    both: tuple[Counter[str], Counter[str]],
) -> None:
    eager, ours = both
    assert sum(map(eager.get, MATRICES, [0] * 4)) == sum(map(ours.get, MATRICES, [0] * 4)) > 0
    fused = [name for name in eager if "attention" in name or "norm" in name or "softmax" in name or "silu" in name]
    assert fused and {name: ours[name] for name in fused} == {name: eager[name] for name in fused}


def test_no_more_copies_than_the_plain_model(both: tuple[Counter[str], Counter[str]]) -> None:
    """Two more of them are those of the loss: a mask of tokens, in numbers."""
    eager, ours = both
    assert ours[COPY] <= eager[COPY] + 2
