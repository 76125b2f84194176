"""Generation of transformers on sharded models: values, and how many programs it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import shardc

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
TWO_LAYERS = SIZES | {"num_hidden_layers": 2}
TOKENS = 8


def pair(kind: Any, config: Any, mesh: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    single, model = kind(config).eval(), kind(config).eval()
    model.load_state_dict(single.state_dict())
    return single, shardc.shard(model, mesh=mesh)


def generated(model: Any, prompt: Tensor, **options: Any) -> Tensor:
    return model.generate(prompt, max_new_tokens=TOKENS, do_sample=False, **options)


@pytest.mark.parametrize("mesh", ["a=1", "tp=2", "dp=2,tp=2"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_two_programs_generate_all_tokens(mesh: str, options: dict[str, Any], traces: list[object]) -> None:
    single, model = pair(LlamaForCausalLM, LlamaConfig(**SIZES), mesh)
    prompt = torch.randint(1, 64, (2, 7))
    assert torch.equal(generated(model, prompt, **options), generated(single, prompt, **options))
    assert len(traces) == 2
    assert ("SIZES" in model.code) == (not options)
    assert torch.equal(generated(model, prompt + 0, **options), generated(single, prompt, **options))
    assert len(traces) == 2


def test_padding_on_the_left_takes_no_more_programs(traces: list[object]) -> None:
    single, model = pair(LlamaForCausalLM, LlamaConfig(**SIZES), "tp=2")
    prompt = torch.randint(1, 64, (2, 5))
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    made = [of.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False) for of in (single, model)]
    assert torch.equal(*made)
    assert len(traces) == 2 and "SIZES" in model.code


WINDOW = SIZES | {"sliding_window": 8}
ALTERNATING = WINDOW | {
    "num_hidden_layers": 2, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "config", "mesh", "options"),
    [
        (MistralForCausalLM, MistralConfig(**WINDOW), "a=1", {}),
        (Gemma3ForCausalLM, Gemma3TextConfig(**ALTERNATING), "dp=2,tp=2", {}),
        (MistralForCausalLM, MistralConfig(**WINDOW), "dp=2,tp=2", {"cache_implementation": "static"}),
    ],
    ids=["every_layer", "alternating_layers", "static"],
)
def test_three_programs_generate_beyond_a_window(
    kind: type[nn.Module], config: Any, mesh: str, options: dict[str, Any], traces: list[object]
) -> None:
    single, model = pair(kind, config, mesh)
    asked: dict[str, Any] = {"return_dict_in_generate": True, "eos_token_id": None, **options}
    prompt = torch.randint(1, 64, (2, 4))
    for length in (4, 3):  # the second prompt is prefilled by a program of its own
        one, other = (generated(of, prompt[:, :length], **asked) for of in (single, model))
        assert torch.equal(one.sequences, other.sequences)
        assert length == 3 or "SIZES" in model.code
        for expected, layer in zip(one.past_key_values.layers, other.past_key_values.layers, strict=True):
            assert vars(layer).keys() == vars(expected).keys()
            for name, value in vars(expected).items():
                assert type(getattr(layer, name)) is type(value)
                if isinstance(value, (int, Tensor)):
                    torch.testing.assert_close(getattr(layer, name), value)
    assert len(traces) == 4


def test_the_cache_that_a_call_gets_is_the_one_that_it_fills_and_returns() -> None:
    single, model = pair(LlamaForCausalLM, LlamaConfig(**TWO_LAYERS), "tp=2")
    words = torch.randint(1, 64, (2, 7))
    caches: list[Any] = []
    with torch.no_grad():
        for of in (single, model):
            cache = transformers.DynamicCache()
            for start, stop in ((0, 4), (4, 5), (5, 7)):
                out = of(words[:, start:stop], past_key_values=cache, use_cache=True)
                assert out.past_key_values is cache
            caches.append(cache)
    assert caches[1].get_seq_length() == 7
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close((one.keys, one.values), (other.keys, other.values))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (
            Mamba2ForCausalLM,
            Mamba2Config(vocab_size=64, hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1,
                         num_hidden_layers=2, chunk_size=4, pad_token_id=0),
        ),
    ],
    ids=["state_space"],
)  # fmt: skip
def test_other_caches(kind: type[nn.Module], config: Any) -> None:
    single, model = pair(kind, config, "tp=2")
    prompt = torch.randint(1, 64, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), single.generate(prompt, **options))
